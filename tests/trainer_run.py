"""One small training run and evaluations, as `test_trainer.py` makes them in its own process and on two.

Run by torchrun it does both with two processes and writes what came out to the directory of its argument.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from accel_distill.cache import CachedSample
from accel_distill.codec import Method
from accel_distill.collator import CachedLogitCollator
from accel_distill.losses import Objective
from accel_distill.processes import leave_processes
from accel_distill.stopping import end
from accel_distill.targets import concatenate, no_targets, read_logits, sample
from accel_distill.trainer import DistillationTrainer

VOCAB = 29
PARAMETERS: dict[Method, float] = {"threshold": 0.06, "random": 20.0, "top_k": 8.0}
EVAL_SIZES = [
    1,
    2,
    3,
    5,
    7,
    8,
    9,
]  # with 2 samples a process: fewer than processes, than a batch, a remainder
STEPS = 5


def tiny_llama(*, vocab: int = VOCAB, seed: int = 0, spread: float = 0.02) -> LlamaForCausalLM:
    """Return a random Llama; a larger `spread` of its weights makes it surer of its next token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def ragged_ids(count: int, *, longest: int = 12) -> list[Tensor]:
    """Return `count` random sequences of 0 to `longest` tokens; every seventh has none, every eighth one."""
    generator = torch.Generator().manual_seed(7)
    lengths = [0 if n % 7 == 3 else 1 if n % 8 == 6 else 2 + (5 * n) % (longest - 1) for n in range(count)]
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


def cached_samples(
    teacher: LlamaForCausalLM,
    sequences: list[Tensor],
    *,
    method: Method = "threshold",
    temperature: float = 1.0,
    parameter: float | None = None,
) -> list[CachedSample]:
    """Return what a cache of these sequences would hold: a target wherever there is a next token."""
    parameter = PARAMETERS[method] if parameter is None else parameter
    samples = []
    for index, ids in enumerate(sequences):
        positions = max(len(ids) - 1, 0)
        targets, entropy, logprob = [no_targets(method, parameter)], 0.0, 0.0
        if positions:
            with torch.no_grad():
                logits = teacher(input_ids=ids[None]).logits[0, :-1]
            chunk = read_logits(logits, next_ids=ids[1:], temperature=temperature)
            entropy, logprob = float(chunk.entropy.sum()), float(chunk.logprob.sum())
            place = torch.full((positions,), index), torch.arange(positions)
            targets.append(
                sample(
                    chunk,
                    method=method,
                    parameter=parameter,
                    seed=0,
                    sample_index=place[0],
                    position=place[1],
                )
            )
        mask = torch.arange(len(ids)) < positions
        samples.append(CachedSample(index, ids, mask, concatenate(targets), entropy, logprob))
    return samples


def make_trainer(
    output_dir: Path,
    *,
    batch: int = 4,
    accumulation: int = 1,
    steps: int = STEPS,
    kd_weight: float = 0.7,
    ce_weight: float = 0.3,
    method: Method = "threshold",
    temperature: float = 1.0,
    train: list[CachedSample] | None = None,
    evaluation: list[CachedSample] | None = None,
    model: LlamaForCausalLM | None = None,
    objective: Objective | None = None,
    settings: dict[str, Any] | None = None,
) -> DistillationTrainer:
    """Return a trainer of a tiny student on the CPU that logs every step and saves nothing; `settings` are more."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps" if train and evaluation else "no",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
        **(settings or {}),
    )
    return DistillationTrainer(
        model if model is not None else tiny_llama(seed=1),
        arguments,
        objective=objective or Objective(kd_weight, ce_weight, temperature, method),
        data_collator=CachedLogitCollator(pad_token_id=0),
        train_dataset=train,
        eval_dataset=evaluation,
    )


def train(output_dir: Path, *, batch: int, accumulation: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train STEPS steps of 4 samples in all, with evaluations of 5 in between; return weights and log."""
    teacher = tiny_llama(spread=0.3)
    samples = cached_samples(teacher, ragged_ids(4 * STEPS))
    trainer = make_trainer(output_dir, batch=batch, accumulation=accumulation, train=samples, evaluation=samples[:5])
    trainer.train()
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {name: weight.clone() for name, weight in weights.items()}, trainer.state.log_history


def evaluate(output_dir: Path, sizes: list[int]) -> dict[str, dict[str, float]]:
    """Return the metrics of an untrained student on the first `size` samples, by size."""
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(max(sizes)))
    trainer = make_trainer(output_dir)
    return {str(size): trainer.evaluate(samples[:size]) for size in sizes}


def main(output_dir: Path) -> None:
    """Train and evaluate on the processes of the launcher; rank 0 writes `weights.pt` and `run.json`."""
    weights, log = train(output_dir, batch=2, accumulation=1)
    metrics = evaluate(output_dir, EVAL_SIZES)
    if int(os.environ["RANK"]) == 0:
        torch.save(weights, output_dir / "weights.pt")
        run = {"log": log, "metrics": metrics, "world_size": torch.distributed.get_world_size()}
        (output_dir / "run.json").write_text(json.dumps(run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    leave_processes()
    end(0)
