"""The trainer against plainly written references, and against itself on other layouts of the same data."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_run import (
    EVAL_SIZES,
    PARAMETERS,
    STEPS,
    VOCAB,
    cached_samples,
    evaluate,
    make_trainer,
    ragged_ids,
    tiny_llama,
    train,
)
from transformers import LlamaForCausalLM

from accel_distill.cache import CachedSample
from accel_distill.codec import Method
from accel_distill.collator import CachedLogitCollator
from accel_distill.divergences import DIVERGENCES, Divergence
from accel_distill.errors import RunError
from accel_distill.fused_head import FullLogits, Ran
from accel_distill.losses import Objective
from accel_distill.targets import SparseTargets, concatenate

HERE = Path(__file__).parent
TIMES = ("runtime", "per_second", "preparation_time", "memory_bytes", "wait_share")  # what no two runs share


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return train(tmp_path_factory.mktemp("1x4"), batch=4, accumulation=1)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Really launch two processes, each with half of the batch; the directory of what they wrote."""
    output = tmp_path_factory.mktemp("2x2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command += [str(HERE / "trainer_run.py"), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    start = tiny_llama(seed=1).state_dict()
    moved = max((expected[name] - start[name]).abs().max() for name in expected)
    assert moved > 1e-2  # the run did train
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def without_times(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in log.items() if not key.endswith(TIMES)} for log in logs]


def assert_same_logs(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for ours, theirs in zip(without_times(found)[:-1], without_times(expected)[:-1], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)


def test_two_accumulation_steps_give_the_weights_and_logs_of_one_large_batch(
    one_process: tuple[dict[str, Tensor], list[dict[str, float]]], tmp_path: Path
) -> None:
    for batch, accumulation in [(2, 2), (1, 4)]:
        weights, log = train(tmp_path, batch=batch, accumulation=accumulation)
        assert_same_weights(weights, one_process[0])
        assert_same_logs(log, one_process[1])


def test_two_processes_give_the_weights_and_logs_of_one(
    one_process: tuple[dict[str, Tensor], list[dict[str, float]]], two_processes: Path
) -> None:
    run = json.loads((two_processes / "run.json").read_text())
    assert run["world_size"] == 2
    assert_same_weights(torch.load(two_processes / "weights.pt"), one_process[0])
    assert_same_logs(run["log"], one_process[1])


def test_two_processes_evaluate_as_one_and_count_no_sample_twice(two_processes: Path, tmp_path: Path) -> None:
    run = json.loads((two_processes / "run.json").read_text())
    expected = evaluate(tmp_path, EVAL_SIZES)
    lengths = [len(ids) for ids in ragged_ids(max(EVAL_SIZES))]
    for size in EVAL_SIZES:
        found, want = without_times([run["metrics"][str(size)], expected[str(size)]])
        assert found == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert found["eval_positions"] == sum(max(length - 1, 0) for length in lengths[:size]) > 0


def test_every_step_logs_kd_and_ce_that_make_its_loss(
    one_process: tuple[dict[str, Tensor], list[dict[str, float]]],
) -> None:
    logs = [log for log in one_process[1] if "loss" in log]
    assert len(logs) == STEPS
    for log in logs:
        assert log["loss"] == pytest.approx(0.7 * log["kd"] + 0.3 * log["ce"], rel=1e-4)
        assert log["kd"] > 0.1 and log["ce"] > 1.0


def test_the_ce_baseline_logs_kd_too_and_kd_alone_logs_ce(tmp_path: Path) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(8))
    for kd_weight, ce_weight in [(0.0, 1.0), (1.0, 0.0)]:
        trainer = make_trainer(tmp_path, kd_weight=kd_weight, ce_weight=ce_weight, train=samples, steps=2)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["kd"] > 0.1 and log["ce"] > 1.0
        assert log["loss"] == pytest.approx(kd_weight * log["kd"] + ce_weight * log["ce"], rel=1e-4)


def plain_sums(model: torch.nn.Module, samples: list[CachedSample], temperature: float) -> tuple[Tensor, Tensor]:
    """Return summed KD and CE, position after position, from dense targets and one sample at a time."""
    kd = ce = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        if len(sample.targets):
            logits = model(input_ids=sample.input_ids[None]).logits[0].double()
            targets = sample.targets.to_dense(logits.shape[1]).double()
            for position, target in zip(sample.target_mask.nonzero()[:, 0], targets, strict=True):
                logprob = torch.log_softmax(logits[position] / temperature, dim=0)
                ce = ce - torch.log_softmax(logits[position], dim=0)[sample.input_ids[position + 1]]
                if sample.targets.method == "top_k":
                    kept = target > 0
                    p = torch.cat([target[kept], 1 - target[kept].sum()[None]])
                    logq = torch.cat([logprob[kept], logprob[~kept].logsumexp(0)[None]])
                    kd = kd + temperature**2 * (p * (p.log() - logq)).sum()
                else:
                    kd = kd - temperature**2 * (target * logprob).sum()
            if sample.targets.method != "top_k":
                kd = kd - temperature**2 * sample.teacher_entropy
    return kd, ce


@pytest.mark.parametrize("method", list(PARAMETERS))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4)], ids=str)
def test_the_loss_and_its_gradient_are_those_of_dense_targets(
    method: Method,
    temperature: float,
    weights: tuple[float, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("accel_distill.head_jobs.CHUNK", 7)  # several chunks, the last one short
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(9), method=method, temperature=temperature)
    trainer = make_trainer(tmp_path, method=method, temperature=temperature, kd_weight=weights[0], ce_weight=weights[1])
    model, plain = trainer.model, tiny_llama(seed=1).double()
    batch = trainer.data_collator(samples)
    assert len(batch["target_positions"]) > 14
    loss = trainer.compute_loss(model, batch, num_items_in_batch=50)
    loss.backward()
    kd, ce = plain_sums(plain, samples, temperature)
    expected = (weights[0] * kd + weights[1] * ce) / 50
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for found, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and want.grad is not None and want.grad.any()
        torch.testing.assert_close(found.grad.double(), want.grad, rtol=1e-4, atol=2e-7)


def test_evaluation_metrics_are_those_counted_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_distill.head_jobs.CHUNK", 7)
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(9))
    student = tiny_llama(spread=0.3)
    with torch.no_grad():  # neither the teacher nor a stranger to it
        student.lm_head.weight += 0.3 * torch.randn(student.lm_head.weight.shape)
    metrics = make_trainer(tmp_path, model=student).evaluate(samples)
    with torch.no_grad():
        kd, ce = plain_sums(student, samples, 1.0)
    positions, agreed, bins = 0, 0, [[0.0, 0.0] for _ in range(15)]
    for sample in samples:
        if not len(sample.targets):
            continue
        with torch.no_grad():
            probabilities = torch.softmax(student(input_ids=sample.input_ids[None]).logits[0, :-1], dim=-1)
        offsets, ids, _ = sample.targets.entries()
        for q, teacher_top, label in zip(probabilities, ids[offsets[:-1]], sample.input_ids[1:], strict=True):
            positions += 1
            agreed += int(q.argmax() == teacher_top)
            bins[int(q.max() * 15)][0] += float(q.max())
            bins[int(q.max() * 15)][1] += float(q.argmax() == label)
    assert sum(confidence > 0 for confidence, _ in bins) >= 4
    assert 0 < agreed < positions
    expected = {
        "eval_ce": float(ce) / positions,
        "eval_kl": float(kd) / positions,
        "eval_loss": (0.7 * float(kd) + 0.3 * float(ce)) / positions,
        "eval_teacher_ce": -sum(sample.teacher_logprob for sample in samples) / positions,
        "eval_top1_agreement": agreed / positions,
        "eval_ece": sum(abs(confidence - correct) for confidence, correct in bins) / positions,
        "eval_positions": positions,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_dropping_the_last_batch_of_training_drops_no_sample_of_evaluation(tmp_path: Path) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(5))
    trainer = make_trainer(tmp_path)
    whole = trainer.evaluate(samples)
    trainer.args.dataloader_drop_last = True
    assert without_times([trainer.evaluate(samples)]) == without_times([whole])
    assert trainer.args.dataloader_drop_last is True


def test_batches_without_any_target_train_and_evaluate_to_zero_not_nan(tmp_path: Path) -> None:
    empty = cached_samples(tiny_llama(), [torch.tensor([], dtype=torch.int64), torch.tensor([3])] * 2)
    trainer = make_trainer(tmp_path, train=empty, steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert [log[key] for key in ("loss", "kd", "ce", "grad_norm")] == [0.0] * 4
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(empty), num_items_in_batch=torch.tensor(0))
    assert loss.item() == 0.0  # the Trainer's log hides a NaN
    metrics = trainer.evaluate(empty)
    assert metrics["eval_positions"] == 0
    assert metrics["eval_loss"] == metrics["eval_kl"] == metrics["eval_ce"] == 0.0


def rolled(targets: SparseTargets) -> SparseTargets:
    """Return the targets, each at the position after its own; the last one comes first."""
    last = max(len(targets) - 1, 0)
    return concatenate([targets.position_slice(last, len(targets)), targets.position_slice(0, last)])


@pytest.mark.parametrize("method", ["threshold", "random"])
def test_a_student_that_is_the_teacher_has_kl_zero_within_sampling_error_and_shifted_targets_raise_it(
    method: Method, tmp_path: Path
) -> None:
    teacher = tiny_llama(spread=0.3)
    samples = cached_samples(teacher, ragged_ids(400, longest=60), method=method)
    trainer = make_trainer(tmp_path, model=teacher)
    trainer.args.per_device_eval_batch_size = 16
    metrics = trainer.evaluate(samples)
    batch = trainer.data_collator(samples[:100])
    with torch.no_grad():
        rows = trainer._sample_sums(teacher, batch)
    has_target = rows[:, 0] > 0
    error = float(rows[has_target, 1].std() * 400**0.5 / metrics["eval_positions"])
    assert metrics["eval_positions"] > 5000 and 0 < error < 0.01
    assert abs(metrics["eval_kl"]) < 4 * error
    assert metrics["eval_top1_agreement"] == 1.0
    assert metrics["eval_ce"] == pytest.approx(metrics["eval_teacher_ce"], abs=1e-4)
    shifted = [replace(sample, targets=rolled(sample.targets)) for sample in samples]
    assert trainer.evaluate(shifted)["eval_kl"] > metrics["eval_kl"] + 0.5


def test_all_of_the_vocabulary_as_top_k_gives_the_teacher_kl_zero(tmp_path: Path) -> None:
    teacher = tiny_llama(spread=0.3)
    samples = cached_samples(teacher, ragged_ids(9), method="top_k", parameter=float(VOCAB))
    metrics = make_trainer(tmp_path, model=teacher, method="top_k").evaluate(samples)
    assert abs(metrics["eval_kl"]) < 1e-3  # log-probabilities are stored in steps of 1/2048 nat


def test_a_student_with_a_wider_padded_vocabulary_trains(tmp_path: Path) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(16))
    trainer = make_trainer(tmp_path, model=tiny_llama(vocab=VOCAB + 35, seed=1), train=samples, steps=15)
    before = trainer.evaluate(samples)["eval_kl"]
    trainer.train()
    assert trainer.evaluate(samples)["eval_kl"] < before - 0.2


def test_the_model_is_never_given_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    forward, seen = trainer.model.forward, []

    def spy(**inputs: Tensor) -> object:
        seen.append(set(inputs))
        return forward(**inputs)

    monkeypatch.setattr(trainer.model, "forward", spy)
    batch = trainer.data_collator(cached_samples(tiny_llama(), ragged_ids(3)))
    trainer.compute_loss(trainer.model, batch)
    trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert seen == [{"input_ids", "attention_mask", "use_cache"}] * 2


class Shifted(LlamaForCausalLM):
    """A model whose logits are not what its head gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(0.5, 2.0, output.logits.shape[-1])
        return output


def test_a_model_whose_head_cannot_be_fused_trains_through_its_own_logits_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(9))
    model = Shifted(tiny_llama().config)
    with caplog.at_level("WARNING", logger="accel_distill"):
        trainer = make_trainer(tmp_path, model=model, train=samples, steps=2)
        trainer.train()
        metrics = trainer.evaluate(samples)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("Shifted: the logits of all positions of a batch will exist at once")
    assert "is off by" in said[0]
    with torch.no_grad():
        kd, ce = plain_sums(model, samples, 1.0)
    assert metrics["eval_kl"] == pytest.approx(float(kd) / metrics["eval_positions"], rel=1e-5)
    assert metrics["eval_ce"] == pytest.approx(float(ce) / metrics["eval_positions"], rel=1e-5)
    batch = trainer.data_collator(samples)
    model.zero_grad()
    trainer.compute_loss(model, batch, num_items_in_batch=50).backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    kd, ce = plain_sums(model, samples, 1.0)
    ((0.7 * kd + 0.3 * ce) / 50).backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_trains_from_top_k_targets_and_the_forward_kl_is_reported_beside_it(
    divergence: Divergence, tmp_path: Path
) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(16), method="top_k")
    objective = Objective(kind="top_k", divergence=divergence)
    trainer = make_trainer(tmp_path, objective=objective, train=samples, steps=8)
    before = trainer.evaluate(samples)
    trainer.train()
    after = trainer.evaluate(samples)
    assert after["eval_kd"] < 0.95 * before["eval_kd"]
    assert before["eval_loss"] == before["eval_kd"]
    assert (before["eval_kl"] == before["eval_kd"]) == (divergence == "forward_kl")
    forward = make_trainer(tmp_path, objective=Objective(kind="top_k")).evaluate(samples)
    assert before["eval_kl"] == pytest.approx(forward["eval_kl"], rel=1e-5)


def test_every_step_logs_the_kl_the_teachers_floor_speed_and_memory(
    one_process: tuple[dict[str, Tensor], list[dict[str, float]]],
) -> None:
    for log in [log for log in one_process[1] if "loss" in log]:
        assert log["kl"] == log["kd"]
        assert 0 < log["teacher_ce"] < 6 and log["positions_per_second"] > 0
        assert 10**8 < log["peak_memory_bytes"] < 10**11


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_gives_the_student_no_gradient_ends_the_run(fused: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train=cached_samples(tiny_llama(spread=0.3), ragged_ids(8)), steps=1)
    trainer._head = trainer._head if fused else FullLogits()
    run = trainer._head.run

    def cut(*args: Any, **named: Any) -> Ran:
        ran = run(*args, **named)
        return ran._replace(loss=ran.loss * 0.0)

    trainer._head.run = cut
    with pytest.raises(RunError, match="of the first step gave the student no gradient"):
        trainer.train()


class DeadKD(Objective):
    """An objective whose KD has the right value and no gradient."""

    def from_outcomes(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return tuple(loss.detach() for loss in super().from_outcomes(*arguments, **named))  # type: ignore[return-value]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_without_a_gradient_ends_the_run_also_where_the_labels_give_one(
    fused: bool, temperature: float, tmp_path: Path
) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(8), temperature=temperature)
    for kd_weight, dead in [(0.7, True), (0.7, False), (0.0, True)]:
        objective = (DeadKD if dead else Objective)(kd_weight, 0.3, temperature, "threshold")
        trainer = make_trainer(tmp_path, train=samples, steps=1, objective=objective)
        trainer._head = trainer._head if fused else FullLogits()
        if dead and kd_weight:
            with pytest.raises(RunError, match="KD gave the student no gradient in the first step"):
                trainer.train()
        else:
            trainer.train()
            assert trainer._head.watch_kd is None


def test_one_process_with_several_gpus_does_not_use_data_parallel(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    args = trainer.args
    args._n_gpu = 4  # as transformers sets it on a machine with four
    again = type(trainer)(tiny_llama(), args, data_collator=CachedLogitCollator(pad_token_id=0))
    assert again.args.n_gpu == 1 and again.args.train_batch_size == args.per_device_train_batch_size


def test_under_deepspeed_a_batch_keeps_its_float32_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the Trainer's own way would make all floats of a batch bfloat16, as the model's are
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(4))
    trainer = make_trainer(tmp_path, train=samples)
    half = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", half, raising=False)
    trainer.is_deepspeed_enabled = True
    batch = trainer._prepare_inputs(trainer.data_collator(samples))
    floats = [name for name, part in batch.items() if part.is_floating_point()]
    assert floats == ["target_weights", "teacher_entropy", "teacher_logprob"]
    assert all(batch[name].dtype == torch.float32 for name in floats)
