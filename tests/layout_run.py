"""Training runs that must end alike whatever the layout: the same 8 samples in each of 5 steps.

`test_layouts.py` makes those of one process itself. Run by torchrun, this file makes those of a backend with two
processes: `layout_run.py DIRECTORY ddp+zero | fsdp2`, and writes a directory for each beside the students.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from trainer_run import VOCAB, cached_samples, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from accel_distill import head_jobs
from accel_distill.adapters import add_adapters
from accel_distill.cache import CachedSample
from accel_distill.collator import CachedLogitCollator, Row
from accel_distill.config import LoraSection
from accel_distill.fused_head import FusedHead
from accel_distill.losses import Objective
from accel_distill.processes import leave_processes
from accel_distill.stopping import end
from accel_distill.trainer import DistillationTrainer

STEPS, GLOBAL_BATCH = 5, 8
EVALUATED = 7  # samples: an uneven end for two processes
# Ragged; of the second step, samples 12 to 15 have no target: all that the second of two processes gets.
LENGTHS = [0 if n in range(12, 16) else 1 if n % 9 == 5 else 2 + (5 * n) % 11 for n in range(STEPS * GLOBAL_BATCH)]


class Layout(NamedTuple):
    """How the 8 samples of a step are dealt."""

    backend: str  # one, ddp, zero1, zero2, zero3, fsdp2, fsdp2-linear (every linear layer is a unit)
    batch: int  # rows of a process
    accumulation: int
    packed: int = 1  # samples of a row

    @property
    def name(self) -> str:
        """A directory's name."""
        return f"{self.backend}-{self.batch}x{self.accumulation}" + f"x{self.packed}" * (self.packed > 1)

    @property
    def optimizers(self) -> list[str]:
        """The runs that there are: FSDP2 refuses tied weights in units of their own; adapters without accumulation."""
        if self.packed > 1:
            return ["adamw"]
        left_out = TIED if self.backend == "fsdp2-linear" else []
        return [name for name in OPTIMIZERS if name not in left_out and (name != "lora" or self.accumulation == 1)]


ONE = [Layout("one", 8, 1), Layout("one", 4, 2), Layout("one", 2, 4), Layout("one", 2, 2, packed=2)]
TWO = {
    "ddp+zero": [Layout("ddp", 4, 1), Layout("ddp", 2, 2), *(Layout(f"zero{n}", 4, 1) for n in (1, 2, 3))]
    + [Layout("zero3", 1, 4), Layout("ddp", 2, 1, packed=2), Layout("zero3", 2, 1, packed=2)],
    "fsdp2": [Layout("fsdp2", 4, 1), Layout("fsdp2-linear", 2, 2), Layout("fsdp2", 1, 2, packed=2)],
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2},
    "sgd": {"optim": "sgd", "learning_rate": 0.5},
    "lora": {"optim": "adamw_torch", "learning_rate": 1e-2},  # adapters are trained instead
}
TIED = ["sgd"]  # runs whose student has its head tied to its embeddings


def make_students(directory: Path) -> None:
    """Save the students that all layouts start from."""
    for optimizer in OPTIMIZERS:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=VOCAB + 8,  # padded
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            tie_word_embeddings=optimizer in TIED,
        )
        LlamaForCausalLM(config).save_pretrained(student_path(directory, optimizer))


def student_path(directory: Path, optimizer: str) -> Path:
    """Return where a student is before training."""
    return directory / f"student-{optimizer}"


def make_samples() -> list[CachedSample]:
    """Return the 40 samples, ragged, in the order of the steps."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]
    return cached_samples(tiny_llama(spread=0.3), ids)


@dataclass
class Recording:
    """The collator, which remembers the samples of every batch."""

    collate: CachedLogitCollator
    seen: list[list[int]]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate."""
        batch = self.collate(rows)
        self.seen.append(batch["sample_index"].tolist())
        return batch


def train(directory: Path, layout: Layout, optimizer: str) -> None:
    """Train, save the student to `DIRECTORY/LAYOUT-OPTIMIZER`, and what happened beside it."""
    output = directory / f"{layout.name}-{optimizer}"
    settings: dict[str, Any] = OPTIMIZERS[optimizer] | backend_settings(layout.backend, directory)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=layout.batch,
        gradient_accumulation_steps=layout.accumulation,
        max_steps=STEPS,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
        **settings,
    )
    # as the command does it: after the arguments, so that ZeRO-3 divides the weights while they are loaded
    model = AutoModelForCausalLM.from_pretrained(student_path(directory, optimizer))
    if layout.backend == "zero3":  # the proof that the head can be fused is made on divided weights
        assert all(parameter.numel() == 0 for parameter in model.parameters())
    if optimizer == "lora":
        lora, base = LoraSection(r=4, lora_alpha=16), str(student_path(directory, optimizer))
        model = add_adapters(model, lora, name=base, revision=None, seed=1)
    recording = Recording(CachedLogitCollator(pad_token_id=0), [])
    head_jobs.CHUNK = 7  # several chunks
    samples, size = make_samples(), layout.packed
    rows = [samples[start : start + size] for start in range(0, len(samples), size)]
    trainer = DistillationTrainer(
        model,
        arguments,
        objective=Objective(kd_weight=0.7, ce_weight=0.3),
        data_collator=recording,
        train_dataset=rows if size > 1 else samples,
    )
    assert isinstance(trainer._head, FusedHead)
    trainer.train()
    assert trainer._keeps_documents_apart == (size > 1)
    trainer.save_model()
    record = {
        "backend": describe(trainer.model_wrapped, trainer.accelerator.distributed_type.value),
        "world_size": trainer.args.world_size,
        "log": list(trainer.state.log_history),
        "batches": gather_object([recording.seen[:]]),
        "metrics": trainer.evaluate(make_samples()[:EVALUATED]),
    }
    if trainer.args.process_index == 0:
        (output / "record.json").write_text(json.dumps(record))


def backend_settings(backend: str, directory: Path) -> dict[str, Any]:
    """Return what TrainingArguments need for a backend; the environment says the rest."""
    if backend.startswith("zero"):
        file = directory / f"{backend}-{os.environ['RANK']}.json"
        file.write_text(json.dumps(deepspeed_settings(int(backend[-1]))))
        return {"use_cpu": True, "deepspeed": str(file)}
    return {"use_cpu": not backend.startswith("fsdp2")}


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """Return a configuration; without the threshold's 0 a small model stays whole under ZeRO-3."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return {
        **dict.fromkeys(auto, "auto"),
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def describe(model: nn.Module, distributed_type: str) -> dict[str, Any]:
    """Return what the wrapped model really is: launchers and libraries fall back silently."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    return {
        "distributed_type": distributed_type,
        "wrapper": type(model).__name__,
        "zero_stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
        "sharded": sum(isinstance(p, DTensor) for p in parameters),
        "divided": sum(hasattr(p, "ds_id") and p.numel() == 0 for p in parameters),
        "parameters": len(parameters),
        "layers": sum(
            isinstance(module, FSDPModule) and "Layer" in type(module).__name__ for module in model.modules()
        ),
    }


def prepare_fsdp2() -> None:
    """Let accelerate run FSDP2 on a CPU with gloo, which it does not offer (accelerate 1.15; a private method)."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, cpu=False, smdp=False, backend=None: (  # type: ignore[method-assign]
        "gloo",
        DistributedType.MULTI_GPU,
    )
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }


def main(directory: Path, group: str) -> None:
    """Make all runs of a group of layouts, in one process group."""
    torch.set_num_threads(1)
    if group == "fsdp2":
        prepare_fsdp2()
    else:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    for layout in TWO[group]:
        linear = layout.backend == "fsdp2-linear"
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Linear" if linear else "LlamaDecoderLayer"
        for optimizer in layout.optimizers:
            train(directory, layout, optimizer)
            AcceleratorState._reset_state()
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave_processes()
    end(0)
