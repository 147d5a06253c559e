"""Progress of a run on standard error: two lines on a terminal, a line every 30 s elsewhere, and one at the end.

The one decision: other ranks are seen through the files they publish, not through a collective, so progress can
neither hang nor slow a run. Between two shards only this rank's own positions move; the others are taken to be as
fast as this one.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from accel_distill.figures import count, rough_duration, size
from accel_distill.screen import terminal_width

LINE_EVERY = 30.0  # seconds
DRAW_EVERY = 0.25  # seconds, on a terminal
RECENT = 60.0  # seconds over which `now` is meant
LOUD = ("transformers", "datasets", "huggingface_hub")  # libraries whose loggers print by themselves


@dataclass(frozen=True)
class Committed:
    """What the files of the cache say, whoever made them."""

    samples: int
    positions: int
    made: int  # of the positions, those made in this run
    shard_bytes: int
    disk_bytes: int  # of all files of the cache
    room_bytes: int | None  # that may still be written; None: the file system does not tell


class Progress:
    """What all ranks have committed, and what this one has in hand; shown by rank 0."""

    def __init__(self, *, total: int | None, done: int, world_size: int, shown: bool) -> None:
        """`total` samples of the run (None: not known), `done` of them already there; silent unless `shown`."""
        self.shown = shown
        self._total, self._world_size = total, world_size
        self._there = Committed(done, 0, 0, 0, 0, None)
        self._own = self._in_hand = 0  # positions of this rank: all of this run; those not yet committed
        self._retries = 0
        self._begun = self._said = time.monotonic()
        self._drawn = 0.0
        self._marks = deque([(self._begun, 0, 0)])  # time, own positions, positions that all ranks have committed
        self._ended = False
        self._is_terminal = shown and sys.stderr.isatty()
        self._bar, self._details = (_line(at, hidden=not self._is_terminal) for at in (0, 1))
        self._open = ExitStack()

    def __enter__(self) -> "Progress":
        if self._is_terminal:
            self._open.enter_context(logged_above_bars())
            self._draw(self._begun)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._details.leave = self._bar.leave = False
        self._details.close()
        self._bar.close()
        if self.shown and self._own + self._there.made:
            self._ended = True
            self._say_the_end(time.monotonic())

    def positions(self, count: int) -> None:
        """Say that this rank has finished so many more positions (negative: that they are committed)."""
        if not self._own:  # the rate of now leaves out how long the teacher took to load
            self._marks.clear()
        self._own += max(count, 0)
        self._in_hand += count
        self._show()

    def committed(self, there: Committed) -> None:
        """Say what the files of the cache say now."""
        self._there = there
        self._show()

    def retried(self) -> None:
        """Say that this rank reads its dataset again, after an error that may pass."""
        self._retries += 1
        self._show()

    def _show(self) -> None:
        if not self.shown:
            return
        now = time.monotonic()
        self._mark(now)
        if self._is_terminal and now - self._drawn >= DRAW_EVERY:
            self._drawn = now
            self._draw(now)
        elif not self._is_terminal and now - self._said >= LINE_EVERY:
            self._said = now
            self._say(now)

    def _draw(self, now: float) -> None:
        """Write both lines again."""
        left = f", {rough_duration(seconds)} left" if (seconds := self._seconds_left(now)) is not None else ""
        done = f"{self._there.samples:,}"
        if self._total:
            share = min(self._there.samples / self._total, 1.0)
            self._bar.bar_format = f"{share:4.0%} |{{bar}}| {done}/{self._total:,} samples{left}"
            self._bar.total, self._bar.n = self._total, min(self._there.samples, self._total)
        else:
            self._bar.bar_format = f"{done} samples{left}"
        self._details.bar_format = self._fitting(now, width=(terminal_width(sys.stderr) or 80))
        self._bar.refresh()
        self._details.refresh()

    def _fitting(self, now: float, *, width: int) -> str:
        """Return the figures in the longest form that fits the width; the last ones go where none does."""
        long, short = self._figures(now), self._figures(now, short=True)
        if len("  ".join(long)) < width:
            return "  ".join(long)
        while len("  ".join(short)) >= width and len(short) > 1:
            short.pop()
        return "  ".join(short)

    def _say(self, now: float) -> None:
        """Print one whole line."""
        seconds = self._seconds_left(now)
        left = "time left unknown" if seconds is None else f"{rough_duration(seconds)} left"
        print("  ".join([self._samples(), *self._figures(now), left]), file=sys.stderr, flush=True)

    def _say_the_end(self, now: float) -> None:
        """Print how far the run came; on a terminal as two lines that fit it."""
        first = f"{self._samples()} in {rough_duration(now - self._begun)}"
        if self._is_terminal:
            second = self._fitting(now, width=terminal_width(sys.stderr) or 80)
            print(first, second, sep="\n", file=sys.stderr, flush=True)
        else:
            print(first, *self._figures(now), sep="  ", file=sys.stderr, flush=True)

    def _samples(self) -> str:
        samples, total = self._there.samples, self._total
        return f"{samples:,} of {total:,} samples ({samples / total:.0%})" if total else f"{samples:,} of ? samples"

    def _figures(self, now: float, *, short: bool = False) -> list[str]:
        """Return speed, retries, bytes a position and disk, in words or in short words; of the end no speed `now`."""
        there, average, recent = self._there, self._average(now), self._rate_now()
        if self._ended:
            speed = f"{average:,.0f} positions/s on average"
        elif short:
            speed = f"{count(recent)} pos/s (mean {count(average)})"
        else:
            speed = f"{recent:,.0f} positions/s now, {average:,.0f} on average"
        figures = [speed]
        if there.positions:
            each = there.shard_bytes / there.positions
            figures.append(f"{each:.1f} B/pos" if short else f"{each:.2f} bytes/position")
            left = "" if there.room_bytes is None else f", {size(max(there.room_bytes, 0))} left"
            figures.append(f"{size(there.disk_bytes)} on disk{left}")
        if self._retries:
            figures.insert(1, f"{self._retries} retries" if self._retries > 1 else "1 retry")
        return figures

    def _positions(self) -> int:
        """Return the positions of this run, taking it that the other ranks have as much in hand as this one."""
        return self._there.made + self._in_hand * self._world_size

    def _average(self, now: float) -> float:
        return self._positions() / max(now - self._begun, 1e-9)

    def _mark(self, now: float) -> None:
        """Remember where the run stands, and forget what is older than `RECENT`, but for the youngest of that."""
        self._marks.append((now, self._own, self._there.made))
        while len(self._marks) > 2 and self._marks[1][0] <= now - RECENT:
            self._marks.popleft()

    def _rate_now(self) -> float:
        """Return positions a second of all ranks: this one's times their number, or once it is done, what appears."""
        (begun, own, made), (end, own_now, made_now) = self._marks[0], self._marks[-1]
        if begun == end:
            return self._average(end)
        return ((own_now - own) * self._world_size or made_now - made) / (end - begun)

    def _seconds_left(self, now: float) -> float | None:
        """Return the time that the missing samples take at the rate of now; None: not known (yet)."""
        there, rate = self._there, self._rate_now() or self._average(now)
        if self._total is None or not there.samples or not there.positions or rate <= 0:
            return None
        missing = (self._total - there.samples) * there.positions / there.samples
        return max(missing - self._in_hand * self._world_size, 0.0) / rate


@contextmanager
def logged_above_bars() -> Iterator[None]:
    """Let what is logged, and Python's warnings, go above the bars of this process instead of across them."""
    printing = [logger for logger in map(logging.getLogger, ("", *LOUD)) if logger.handlers]
    logging.captureWarnings(True)
    try:
        with logging_redirect_tqdm(printing):
            yield
    finally:
        logging.captureWarnings(False)


def _line(position: int, *, hidden: bool) -> tqdm:
    return tqdm(position=position, disable=hidden, dynamic_ncols=True, bar_format=" ", leave=False)
