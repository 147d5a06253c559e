"""A teacher's targets of a training batch: dense ones against a float64 reference, sampled ones against a cache."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor
from trainer_run import VOCAB, ragged_ids, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, TrainingArguments

from accel_distill.divergences import DIVERGENCES, Divergence
from accel_distill.fused_head import FullLogits, FusedHead
from accel_distill.losses import Objective
from accel_distill.online_targets import OnlineTargets
from accel_distill.targets import concatenate
from accel_distill.teacher import Sampling, Teacher
from accel_distill.text_collator import TextCollator
from accel_distill.text_rows import TextRow
from accel_distill.tokens import TokenSequence
from accel_distill.trainer import DistillationTrainer

PADDED = VOCAB + 6  # of the teacher; the student has more still
WIDE = VOCAB + 11


def rows_of(sequences: list[Tensor], *, start: int = 0) -> list[TextRow]:
    return [TextRow(TokenSequence(5 + n, start, ids.numpy().astype(np.int64))) for n, ids in enumerate(sequences)]


def batch_of(count: int) -> dict[str, Tensor]:
    """Return a ragged batch, with rows of no token and of one."""
    return TextCollator(pad_token_id=0)(rows_of(ragged_ids(count)))


def make_teacher(kind: str = "llama") -> Teacher:
    """Return a teacher with a padded vocabulary, whose logits chunks are short."""
    model: Any = tiny_llama(vocab=PADDED, spread=0.3)
    if kind == "gemma2":  # caps its logits
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        capped = Gemma2Config(
            vocab_size=PADDED, head_dim=8, num_key_value_heads=1, final_logit_softcapping=1.5, initializer_range=0.3,
            pad_token_id=0, **sizes,
        )  # fmt: skip
        model = Gemma2ForCausalLM(capped)
    return Teacher(model, head_chunk=7, valid_ids=VOCAB)


def make_trainer(output_dir: Path, teacher: Teacher, objective: Objective, sampling: Sampling | None = None) -> Any:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
    )
    return DistillationTrainer(
        tiny_llama(vocab=WIDE, seed=1),
        arguments,
        objective=objective,
        targets_of=OnlineTargets(teacher, sampling),
        data_collator=TextCollator(pad_token_id=0),
    )


def plain_kd(logp: Tensor, logq: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence of log-probabilities (V,), written as in the papers, with the defaults of `Objective`."""
    p, q, least = logp.exp(), logq.exp(), torch.tensor(2.0**-24, dtype=torch.float64)
    if divergence == "forward_kl":
        return torch.special.xlogy(p, p).sum() - (p * logq).sum()
    if divergence == "reverse_kl":
        return (q * (logq - torch.where(p == 0, least, p).log())).sum()
    if divergence == "tvd":
        return 0.5 * (p - q).abs().sum()
    if divergence == "alpha_beta":
        a, b = 0.2, 0.7
        return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum() / (a * b)
    share = 0.5 if divergence == "jsd" else 0.1
    m = share * p + (1 - share) * q
    to_mixture = torch.special.xlogy(p, p).sum() - (p * m.log()).sum()
    if divergence == "skew_kl":
        return to_mixture
    return share * to_mixture + (1 - share) * (q * (logq - m.log())).sum()


def plain_sums(student: LlamaForCausalLM, teacher: Any, batch: dict[str, Tensor], objective: Objective) -> list[Tensor]:
    """Return summed KD, CE, KL and the teacher's CE, a position at a time, from full float64 logits."""
    sums = [torch.zeros((), dtype=torch.float64)] * 4
    temperature = objective.temperature
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[: int(mask.sum())][None]
        z = student(input_ids=ids).logits[0]
        with torch.no_grad():
            t = teacher(input_ids=ids).logits[0, :, :VOCAB]
        for position, label in enumerate(ids[0, 1:]):
            logq = torch.log_softmax(z[position] / temperature, dim=0)
            logp = torch.log_softmax(t[position] / temperature, dim=0)
            logp = torch.cat([logp, logp.new_full((WIDE - VOCAB,), -torch.inf)])
            found = [
                temperature**2 * plain_kd(logp, logq, objective.divergence),
                -torch.log_softmax(z[position], dim=0)[label],
                temperature**2 * plain_kd(logp, logq, "forward_kl"),
                -torch.log_softmax(t[position], dim=0)[label],
            ]
            sums = [total + part for total, part in zip(sums, found, strict=True)]
    return sums


@pytest.mark.parametrize(
    ("divergence", "temperature", "kind", "head"),
    [
        *(("forward_kl", temperature, "llama", "fused") for temperature in (0.5, 1.0, 2.0)),
        *((divergence, 2.0, "llama", "fused") for divergence in DIVERGENCES if divergence != "forward_kl"),
        ("forward_kl", 0.5, "gemma2", "fused"),
        ("jsd", 1.0, "gemma2", "full"),
    ],
)
def test_the_dense_loss_and_its_gradient_are_those_of_full_float64_logits(
    divergence: Divergence, temperature: float, kind: str, head: str, tmp_path: Path
) -> None:
    objective = Objective(0.6, 0.4, temperature, "dense", divergence)
    teacher = make_teacher(kind)
    trainer = make_trainer(tmp_path, teacher, objective)
    assert isinstance(trainer._head, FusedHead)
    if head == "full":
        trainer._head = FullLogits()
        trainer.model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, trainer.model.lm_head.weight)
    batch, plain = batch_of(9), tiny_llama(vocab=WIDE, seed=1).double()
    assert len(batch["target_positions"]) > 3 * 7  # several chunks
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=50)
    loss.backward()
    kd, ce, kl, teacher_ce = plain_sums(plain, make_teacher(kind).model.double(), batch, objective)
    expected = (0.6 * kd + 0.4 * ce) / 50
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(trainer._since_log[1:4], torch.stack([ce, kl, teacher_ce]).detach(), rtol=3e-6, atol=0)
    for found, want in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and want.grad is not None and want.grad.any()
        torch.testing.assert_close(found.grad.double(), want.grad, rtol=1e-4, atol=3e-7)


def test_dense_evaluation_counts_what_full_logits_say(tmp_path: Path) -> None:
    objective, teacher = Objective(0.6, 0.4, 2.0, "dense", "reverse_kl"), make_teacher()
    trainer = make_trainer(tmp_path, teacher, objective)
    batch = batch_of(9)
    metrics = trainer.evaluate(rows_of(ragged_ids(9)))
    with torch.no_grad():
        plain = tiny_llama(vocab=WIDE, seed=1).double()
        sums = plain_sums(plain, make_teacher().model.double(), batch, objective)
        agreed = 0
        for row in ragged_ids(9):
            if len(row) > 1:
                top = trainer.model(input_ids=row[None]).logits[0, :-1].argmax(dim=-1)
                agreed += int((top == teacher.model(input_ids=row[None]).logits[0, :-1, :VOCAB].argmax(dim=-1)).sum())
    count = metrics["eval_positions"]
    assert count == len(batch["target_positions"])
    found = [metrics[f"eval_{name}"] for name in ("kd", "ce", "kl", "teacher_ce")]
    assert found == pytest.approx([float(total) / count for total in sums], rel=1e-5)
    assert metrics["eval_top1_agreement"] == pytest.approx(agreed / count)
    assert metrics["eval_loss"] == pytest.approx(0.6 * metrics["eval_kd"] + 0.4 * metrics["eval_ce"])


def test_the_teacher_as_its_own_student_has_kl_zero_and_agrees_everywhere(tmp_path: Path) -> None:
    teacher = Teacher(tiny_llama(spread=0.3), head_chunk=5, valid_ids=VOCAB)
    trainer = make_trainer(tmp_path, teacher, Objective(kind="dense"))
    trainer = DistillationTrainer(
        tiny_llama(spread=0.3),
        trainer.args,
        objective=Objective(kind="dense"),
        targets_of=OnlineTargets(teacher, None),
        data_collator=TextCollator(pad_token_id=0),
    )
    metrics = trainer.evaluate(rows_of(ragged_ids(20)))
    assert metrics["eval_positions"] > 50 and abs(metrics["eval_kl"]) < 1e-6
    assert metrics["eval_top1_agreement"] == 1.0
    assert metrics["eval_ce"] == pytest.approx(metrics["eval_teacher_ce"], rel=1e-6)


@pytest.mark.parametrize("method", ["threshold", "random", "top_k"])
def test_sampled_targets_are_those_that_a_cache_has_of_the_same_positions(method: Any) -> None:
    sampling = Sampling(method, {"threshold": 0.06, "random": 20, "top_k": 8}[method], 1.5, 3)
    teacher, rows = make_teacher(), rows_of(ragged_ids(9), start=4)
    with_targets = [row.sequence for row in rows if len(row.sequence.ids) > 1]
    cached = [teacher.targets_for([sequence], sampling=sampling) for sequence in with_targets]  # in other batches
    batch = TextCollator(pad_token_id=0)(rows)
    objective = Objective(kind=method, temperature=1.5)
    taught = OnlineTargets(teacher, sampling)(batch, objective)
    offsets, ids, weights = concatenate([output.targets for output in cached]).entries()
    assert len(ids) > len(batch["target_positions"]) > 30
    found = [chunk.entries for chunk in taught.job.chunks]
    assert torch.equal(torch.cat([entries[1] for entries in found]), ids)
    assert torch.equal(torch.cat([entries[2] for entries in found]), weights)
    assert torch.equal(taught.top_ids, ids[offsets[:-1]])
    assert float(taught.logprob.sum()) == pytest.approx(sum(output.logprob.sum() for output in cached), rel=1e-6)
    entropy = 0.0 if method == "top_k" else 1.5**2 * sum(output.entropy.sum() for output in cached)
    assert float(taught.entropy.sum()) == pytest.approx(entropy, rel=1e-6)


@pytest.mark.parametrize("sampling", [None, Sampling("threshold", 0.05, 1.0, 0)], ids=["dense", "threshold"])
def test_the_teacher_runs_once_for_each_batch_also_for_one_without_any_target(
    sampling: Sampling | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, calls = make_teacher(), []
    forward = teacher.model.base_model.forward
    monkeypatch.setattr(
        teacher.model.base_model,
        "forward",
        lambda **inputs: calls.append(inputs["input_ids"].shape) or forward(**inputs),
    )
    trainer = make_trainer(tmp_path, teacher, Objective(kind=sampling.method if sampling else "dense"), sampling)
    empty = TextCollator(pad_token_id=0)(rows_of([torch.tensor([], dtype=torch.int64), torch.tensor([3])]))
    for batch in (batch_of(9), empty):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(9))
        loss.backward()
        assert loss.isfinite()
    assert calls == [(9, 12), (2, 1)]
    assert trainer.evaluate(rows_of([torch.tensor([3])]))["eval_loss"] == 0.0
    assert len(calls) == 3


def test_the_teacher_is_no_part_of_the_student_and_keeps_its_dtype_under_the_students_autocast(tmp_path: Path) -> None:
    teacher = Teacher(tiny_llama(spread=0.3), head_chunk=7, valid_ids=VOCAB)
    trainer = make_trainer(tmp_path, teacher, Objective(kind="dense"))
    batch, seen = batch_of(9), []
    teacher.model.base_model.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.last_hidden_state.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        trainer.compute_loss(trainer.model, batch).backward()
    assert seen == [torch.float32]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.model.parameters())
    assert not teacher.model.training
    mine = {id(parameter) for parameter in trainer.model.parameters()}
    assert not mine & {id(parameter) for parameter in teacher.model.parameters()}


def test_neither_the_teachers_nor_the_students_logits_exist_whole() -> None:
    vocab, positions = 50_000, 2048
    command = [sys.executable, str(ROOT / "tests" / "online_memory.py"), str(vocab), str(positions)]
    # glibc else keeps the chunks, which are below 32 MB each, in a heap that grows by its holes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    whole = vocab * positions * 4  # of one of the two, in float32
    assert 0 < int(done.stdout) < 0.6 * whole
