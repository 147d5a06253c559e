"""The losses of the last micro-batches of training, so that one that is not finite can be told by its samples.

The one decision: a step costs no wait for the device. Losses stay on it until the next line of the log, or the next
checkpoint, asks whether all were finite; so the run stops a few steps late, and before it saves what NaN has touched.
The last MOST micro-batches are remembered; where there were more, the message says that the first culprit may be gone.
"""

from collections import deque

import torch
from torch import Tensor

from accel_distill.errors import NotFinite

MOST = 10_000  # micro-batches


class RecentLosses:
    """What was noted since the last `check`, on one process."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._noted: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=MOST)
        self._count = 0  # of what was noted, also of what is forgotten again

    def note(self, step: int, sample_index: Tensor, loss: Tensor) -> None:
        """Remember a micro-batch of `step`: `sample_index` (B,) and its loss, a scalar."""
        self._count += 1
        self._noted.append((step, sample_index, loss.detach()))

    def check(self, *, is_finite_everywhere: bool) -> None:
        """Raise NotFinite, naming step and samples, where a loss is not finite; then forget."""
        noted, forgotten = list(self._noted), self._count - len(self._noted)
        self._noted.clear()
        self._count = 0
        if is_finite_everywhere:
            return
        finite = torch.stack([loss for *_, loss in noted]).isfinite().tolist() if noted else []
        only = (
            f"only the last {MOST:,} of {MOST + forgotten:,} micro-batches are remembered; lower training.logging_steps"
        )
        for (step, samples, loss), is_finite in zip(noted, finite, strict=True):
            if not is_finite:
                raise NotFinite(
                    f"the loss is {loss.item()} at step {step}, on the samples {samples.tolist()} of the cache"
                    f"{f' (the first that is remembered: {only})' if forgotten else ''}; lower "
                    "training.learning_rate, or see what is special about them; an earlier checkpoint is good"
                )
        if forgotten:
            raise NotFinite(f"the loss is not finite on another process, which names the samples, or earlier: {only}")
        raise NotFinite("the loss is not finite on another process, which names the samples")
