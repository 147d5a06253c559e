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
    """Samples, positions and bytes that all ranks have committed, and what this one has in hand; for rank 0."""

    def __init__(self, *, total: int | None, done: int, world_size: int, shown: bool) -> None:
        """`total` samples of the run (None: not known), `done` of them already there; silent unless `shown`."""
        self.shown = shown
        self._total, self._first, self._world_size = total, done, world_size
        self._samples = done
        self._made = self._in_hand = 0  # positions: committed by all ranks in this run; not yet, by this rank
        self._bytes_per_position: float | None = None
        self._retries = 0
        self._begun = self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._lines = shown and not terminal
        self._bar = tqdm(
            total=total, initial=done, unit=" samples", disable=not (shown and terminal), smoothing=0, leave=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def positions(self, count: int) -> None:
        """Say that this rank has finished so many more positions (negative: that they are committed)."""
        self._in_hand += count
        self._show()

    def committed(self, samples: int, *, made: int, bytes_per_position: float | None) -> None:
        """Say how many samples are committed, how many positions in this run, and what a position takes."""
        self._samples, self._made = max(self._samples, samples), made
        self._bytes_per_position = bytes_per_position or self._bytes_per_position
        self._show()

    def retried(self) -> None:
        """Say that this rank reads its dataset again, after an error that may pass."""
        self._retries += 1
        self._show()

    def _show(self) -> None:
        if not self.shown:
            return
        now = time.monotonic()
        self._bar.set_postfix(self._details(now), refresh=False)
        self._bar.update(self._samples - self._bar.n)
        if self._lines and now - self._said >= LINE_EVERY:
            self._said = now
            total = "?" if self._total is None else f"{self._total:,}"
            details = "  ".join(f"{value} {name}" for name, value in self._details(now).items())
            print(f"{self._samples:,} of {total} samples  {details}  {self._eta(now)}", file=sys.stderr, flush=True)

    def _details(self, now: float) -> dict[str, str]:
        """Return positions/s, taking it that the other ranks have as much in hand as this one, and bytes/position."""
        positions = self._made + self._in_hand * self._world_size
        details = {"positions/s": f"{positions / max(now - self._begun, 1e-9):,.0f}"}
        if self._bytes_per_position is not None:
            details["bytes/position"] = f"{self._bytes_per_position:.1f}"
        if self._retries:
            details["retries"] = str(self._retries)
        return details

    def _eta(self, now: float) -> str:
        made = self._samples - self._first
        if self._total is None or made <= 0:
            return "time left unknown"
        left = (now - self._begun) / made * (self._total - self._samples)
        return f"{left / 60:.0f} min left" if left >= 120 else f"{left:.0f} s left"
