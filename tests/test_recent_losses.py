"""A loss that is not finite is told by its step and its samples, once it is asked for."""

import pytest
import torch

from accel_distill import recent_losses
from accel_distill.errors import NotFinite
from accel_distill.recent_losses import RecentLosses


def test_the_first_loss_that_is_not_finite_is_named() -> None:
    recent = RecentLosses()
    for step, value in enumerate([1.0, 2.0, float("inf"), float("nan")]):
        recent.note(step, torch.tensor([10 * step, 10 * step + 1]), torch.tensor(value))
    with pytest.raises(NotFinite, match=r"the loss is inf at step 2, on the samples \[20, 21\] of the cache"):
        recent.check(is_finite_everywhere=False)


def test_a_process_with_good_losses_only_points_to_the_other() -> None:
    recent = RecentLosses()
    recent.note(0, torch.tensor([0]), torch.tensor(1.0))
    with pytest.raises(NotFinite, match="not finite on another process"):
        recent.check(is_finite_everywhere=False)


def test_good_losses_are_forgotten() -> None:
    recent = RecentLosses()
    recent.note(0, torch.tensor([0]), torch.tensor(float("nan")))
    recent.check(is_finite_everywhere=True)
    with pytest.raises(NotFinite, match="on another process"):
        recent.check(is_finite_everywhere=False)


def test_where_more_were_noted_than_are_remembered_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_losses, "MOST", 3)
    said = "only the last 3 of 5 micro-batches are remembered; lower training.logging_steps"
    recent = RecentLosses()
    for values, match in (
        ([float("inf"), 1.0, 1.0, float("nan"), 1.0], rf"nan at step 3, .* \(the first that is remembered: {said}\); "),
        ([float("inf"), 1.0, 1.0, 1.0, 1.0], f"on another process, which names the samples, or earlier: {said}"),
        ([float("inf"), 1.0, 1.0], r"inf at step 0, on the samples \[0\] of the cache; lower"),
    ):
        for step, value in enumerate(values):
            recent.note(step, torch.tensor([step]), torch.tensor(value))
        with pytest.raises(NotFinite, match=match):
            recent.check(is_finite_everywhere=False)
