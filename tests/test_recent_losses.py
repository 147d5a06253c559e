"""A loss that is not finite is told by its step and its samples, once it is asked for."""

import pytest
import torch

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
