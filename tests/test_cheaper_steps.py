"""What makes a step smaller or faster changes nothing: gradient checkpointing, bfloat16, `torch.compile`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from trainer_run import STEPS, VOCAB, cached_samples, make_trainer, ragged_ids, tiny_llama

from accel_distill.fused_head import FusedHead

Logs = list[dict[str, float]]


def trained(output: Path, *, ids: list[Tensor] | None = None, **settings: Any) -> tuple[dict[str, Tensor], Logs]:
    """Train STEPS steps through the fused head, with evaluations; return weights and log."""
    samples = cached_samples(tiny_llama(spread=0.3), ids or ragged_ids(4 * STEPS))
    trainer = make_trainer(output, train=samples, evaluation=samples[:5], settings=settings)
    assert isinstance(trainer._head, FusedHead)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return {name: weight.clone() for name, weight in model.state_dict().items()}, trainer.state.log_history


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of weights, as a part of the largest weight."""
    largest = max(float(weight.abs().max()) for weight in others.values())
    return max(float((some[name] - others[name]).abs().max()) for name in others) / largest


def losses(logs: Logs) -> list[float]:
    return [log[key] for log in logs for key in ("loss", "kd", "ce", "eval_loss") if key in log]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_weights(reentrant: bool, tmp_path: Path) -> None:
    plain, _ = trained(tmp_path)
    kwargs = {"use_reentrant": reentrant}
    found, _ = trained(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert largest_difference(plain, tiny_llama(seed=1).state_dict()) > 0.02  # the run did train
    assert largest_difference(found, plain) <= 1e-6


def test_gradient_checkpointing_does_run_the_layers_again(tmp_path: Path) -> None:
    samples, calls = cached_samples(tiny_llama(spread=0.3), ragged_ids(4)), []
    for on in (False, True):
        trainer = make_trainer(tmp_path, train=samples, steps=1, settings={"gradient_checkpointing": on})
        trainer.model.model.layers[0].self_attn.register_forward_hook(lambda *_, on=on: calls.append(on))
        trainer.train()
    assert calls == [False, True, True]


def test_bfloat16_trains_float32_weights_and_its_losses_are_near_those_of_float32(tmp_path: Path) -> None:
    plain, half = trained(tmp_path), trained(tmp_path, bf16=True)
    assert all(weight.dtype == torch.float32 for weight in half[0].values())
    assert losses(half[1]) != losses(plain[1])
    assert losses(half[1]) == pytest.approx(losses(plain[1]), rel=0.02)
    steps = [log["loss"] for log in half[1] if "loss" in log]
    assert len(steps) == STEPS and 1e-4 < largest_difference(half[0], plain[0]) < 0.1


@pytest.mark.slow
def test_a_compiled_student_has_the_losses_and_weights_of_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(torch.randint(VOCAB, (4 * STEPS, 9), generator=torch.Generator().manual_seed(0)))  # one shape
    plain = trained(tmp_path, ids=ids)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the Trainer sets it: this takes it back
    counters.clear()
    compiled = trained(tmp_path, ids=ids, torch_compile=True, torch_compile_backend="aot_eager")
    torch._dynamo.reset()
    assert counters["frames"]["ok"] > 0
    assert losses(compiled[1]) == pytest.approx(losses(plain[1]), rel=1e-5)
    assert largest_difference(compiled[0], plain[0]) <= 1e-5
