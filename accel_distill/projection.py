"""What a whole run takes, from what was measured on some of its samples; plain arithmetic.

The one decision: a figure is low, mid and high, and each is 95 % of what sampling can do: the mean length over the
samples that were counted, the bytes a position over those that the teacher saw. The two are independent, so their
relative errors add as squares. Where all samples were counted there is no error of sampling left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from accel_distill.deal import Layout

Verdict = Literal["fits", "tight", "does not fit", "unknown"]

NORMAL = 1.96  # standard errors of 95 %, of many samples ...
STUDENT = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # ... and of 1 to 10 degrees of freedom
BLOCKS = 1_500  # bytes: HDF5 allots in blocks, so what a shard takes by itself is known to so much on either side
COMFORT = 0.8  # of the room; a run whose high figure is below that fits
MOST_SAMPLES = 10**12


@dataclass(frozen=True)
class Interval:
    """A figure, and between what it lies."""

    low: float
    mid: float
    high: float

    def times(self, factor: float) -> "Interval":
        """Return the interval of `factor` times the figure."""
        return Interval(self.low * factor, self.mid * factor, self.high * factor)

    def plus(self, more: float) -> "Interval":
        """Return the interval of the figure and something that is known."""
        return Interval(self.low + more, self.mid + more, self.high + more)

    def within(self, share: float) -> "Interval":
        """Return an interval that is, on both sides, at least `share` of the figure away."""
        return Interval(min(self.low, self.mid * (1 - share)), self.mid, max(self.high, self.mid * (1 + share)))


def exactly(figure: float) -> Interval:
    """Return the interval of a figure that is known."""
    return Interval(figure, figure, figure)


def product(first: Interval, second: Interval) -> Interval:
    """Return the interval of the product of two independent figures, none of them negative."""
    mid = first.mid * second.mid
    if not mid:
        return exactly(0.0)
    down, up = (
        math.hypot(*(_log_ratio(end, figure.mid) for figure, end in ends))
        for ends in (((first, first.low), (second, second.low)), ((first, first.high), (second, second.high)))
    )
    return Interval(mid * math.exp(-down), mid, mid * math.exp(up))


def mean_of(values: Sequence[float] | np.ndarray, *, population: int) -> Interval:
    """Return the mean of a population of which `values` are a random sample, drawn without putting back."""
    found = np.asarray(values, np.float64)
    mean, count = float(found.mean()) if len(found) else 0.0, len(found)
    if count >= population:
        return exactly(mean)
    if count < 2:
        return Interval(0.0, mean, 2 * mean)
    error = float(found.std(ddof=1)) / math.sqrt(count) * math.sqrt(1 - count / population)
    half = _quantile(count - 1) * error
    return Interval(max(0.0, mean - half), mean, mean + half)


@dataclass(frozen=True)
class ShardBytes:
    """What shards take: so much each, and so much for each of their positions."""

    fixed: float
    per_position: Interval


def fixed_bytes(parts: Sequence[tuple[int, int]], whole: int) -> float:
    """Return what a shard takes by itself: what `parts` (bytes, positions) take more than the `whole` of them."""
    return max(0.0, (sum(size for size, _ in parts) - whole) / (len(parts) - 1)) if len(parts) > 1 else 0.0


def shard_bytes_of(
    parts: Sequence[tuple[int, int]], whole: int, *, fixed: float, samples: int, population: int
) -> ShardBytes:
    """Return what shards take, from a shard of `whole` bytes, and how sure that is, from the same samples in `parts`.

    `parts` are (bytes, positions); what these bytes differ by for each position is what samples differ by. They are
    `samples` of `population`.
    """
    positions = sum(count for _, count in parts)
    if not positions:
        return ShardBytes(float(whole), exactly(0.0))
    mid = max(0.0, (whole - fixed) / positions)
    if len(parts) < 2:
        return ShardBytes(fixed, exactly(mid) if samples >= population else Interval(0.5 * mid, mid, 2 * mid))
    own = fixed_bytes(parts, whole)
    each = sum(size - own for size, _ in parts) / positions
    squares = sum((size - own - each * count) ** 2 for size, count in parts)
    error = math.sqrt(squares * len(parts) / (len(parts) - 1)) / positions
    half = _quantile(len(parts) - 1) * error * math.sqrt(max(0.0, 1 - samples / population))
    return ShardBytes(fixed, Interval(max(0.0, mid - half), mid, mid + half))


def shard_count(layout: Layout, samples: int) -> int:
    """Return how many shards a stream of so many samples makes."""
    groups, rest = divmod(samples, layout.group_samples)
    return groups * layout.lanes + min(rest, layout.lanes)


def shards_bytes(samples: int, *, layout: Layout, positions: Interval, shard: ShardBytes) -> Interval:
    """Return the bytes of all shards of a cache of so many samples, each of so many `positions`."""
    shards = shard_count(layout, samples)
    fixed = Interval(max(0.0, shard.fixed - BLOCKS), shard.fixed, shard.fixed + BLOCKS).times(shards)
    columns = product(positions, shard.per_position).times(samples)
    return Interval(columns.low + fixed.low, columns.mid + fixed.mid, columns.high + fixed.high)


def verdict(needed: Interval, room: float | None) -> Verdict:
    """Say whether what is yet to be written goes into the room (bytes; None: it is not known)."""
    if room is None:
        return "unknown"
    if needed.mid > room:
        return "does not fit"
    return "fits" if needed.high <= COMFORT * room else "tight"


def most_samples(total: Callable[[int], Interval], *, there: float, room: float) -> int:
    """Return the largest number of samples whose cache fits; `there` bytes of it are written already."""
    low, high = 0, MOST_SAMPLES
    while low < high:
        middle = (low + high + 1) // 2
        if verdict(total(middle).plus(-there), room) == "fits":
            low = middle
        else:
            high = middle - 1
    return low


def speed_up(processes: int, *, cores: int, threads: int) -> float:
    """Return how much faster N processes of one machine's CPU are than the one of `threads` that was measured.

    They share the cores: more threads in all than there are cores are no faster.
    """
    return max(1.0, min(float(processes), cores / threads))


def _log_ratio(end: float, mid: float) -> float:
    return abs(math.log(end / mid)) if end > 0 else math.inf


def _quantile(degrees: int) -> float:
    """Return Student's 97.5 % quantile, to a few per cent."""
    return STUDENT[degrees - 1] if degrees <= len(STUDENT) else NORMAL + 2.5 / degrees
