"""Progress of a run on standard error: a bar on a terminal, a line every 30 s elsewhere.

The one decision: other ranks are seen through the files they publish, not through a collective, so progress can
neither hang nor slow a run. Between two shards only this rank's own positions move.
"""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds


class Progress:
    """Counts committed samples of all ranks, and positions of this one; silent where `shown` is false."""

    def __init__(self, *, total: int | None, done: int, world_size: int, shown: bool) -> None:
        """`total` samples of the run (None: not known), `done` of them already there."""
        self.shown = shown
        self._total, self._first, self._world_size = total, done, world_size
        self._samples, self._positions = done, 0
        self._bytes_per_position: float | None = None
        self._begun = self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._bar = tqdm(
            total=total, initial=done, unit=" samples", disable=not (shown and terminal), smoothing=0.05, leave=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def positions(self, count: int) -> None:
        """Say that this rank has finished so many more positions."""
        self._positions += count
        self._show()

    def committed(self, samples: int, *, bytes_per_position: float | None) -> None:
        """Say how many samples of the run are committed, by all ranks, and what a position takes on disk."""
        self._samples = max(self._samples, samples)
        self._bytes_per_position = bytes_per_position or self._bytes_per_position
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        details = {"positions/s": f"{self._positions * self._world_size / max(now - self._begun, 1e-9):,.0f}"}
        if self._bytes_per_position is not None:
            details["bytes/position"] = f"{self._bytes_per_position:.1f}"
        self._bar.set_postfix(details, refresh=False)
        self._bar.update(self._samples - self._bar.n)
        if self._lines and now - self._said >= LINE_EVERY:
            self._said = now
            total = "?" if self._total is None else f"{self._total:,}"
            shown = "  ".join(f"{value} {name}" for name, value in details.items())
            line = f"{self._samples:,} of {total} samples  {shown}  {self._eta(now)}"
            print(line, file=sys.stderr, flush=True)

    def _eta(self, now: float) -> str:
        made = self._samples - self._first
        if self._total is None or made <= 0:
            return "time left unknown"
        left = (now - self._begun) / made * (self._total - self._samples)
        return f"{left / 60:.0f} min left" if left >= 120 else f"{left:.0f} s left"
