"""Which sample belongs to which shard, and which shard to which rank; plain integers.

The one decision: a shard is a function of the sample index and of the layout alone. Sample i belongs to lane i mod L;
group g of a lane holds its samples number g*S to (g+1)*S - 1. World size, crashes and time only decide who makes a
shard: the j-th shard that is not yet committed, in the order (group, lane), belongs to rank j mod W.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SHARD_NAME = re.compile(r"shard-(\d{6,})-(\d{3,})-(\d+)\.h5")


@dataclass(frozen=True)
class Layout:
    """How a stream is cut into shards."""

    lanes: int
    samples_per_shard: int

    @property
    def group_samples(self) -> int:
        """The samples of the stream that one group of shards covers."""
        return self.lanes * self.samples_per_shard

    def first_sample(self, group: int, lane: int) -> int:
        """Return the stream index of a shard's first sample."""
        return group * self.group_samples + lane

    def samples_in(self, group: int, lane: int, total: int) -> int:
        """Return how many samples shard (group, lane) holds when the stream has `total`; 0: it does not exist."""
        after_first = total - self.first_sample(group, lane)
        return max(0, min(self.samples_per_shard, -(-after_first // self.lanes)))

    def shards(self, total: int) -> Iterator[tuple[int, int, int]]:
        """Yield (group, lane, samples) of every shard of a stream of `total` samples, in order."""
        for group in range(-(-total // self.group_samples)):
            for lane in range(self.lanes):
                if samples := self.samples_in(group, lane, total):
                    yield group, lane, samples

    def first_open_group(self, committed: Mapping[tuple[int, int], int]) -> int:
        """Return the first group of which not every shard is committed with all of its samples."""
        for group in itertools.count():
            if any(committed.get((group, lane)) != self.samples_per_shard for lane in range(self.lanes)):
                return group
        raise AssertionError("a cache has an end")

    def place(self, sample_index: int) -> tuple[int, int, int]:
        """Return (group, lane, number in the shard) of a sample."""
        group, inside = divmod(sample_index, self.group_samples)
        return group, inside % self.lanes, inside // self.lanes


def shard_name(group: int, lane: int, samples: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{group:06d}-{lane:03d}-{samples}.h5"


def parse_shard_name(name: str) -> tuple[int, int, int] | None:
    """Return (group, lane, samples) of a shard's file name; None: it is not one."""
    match = SHARD_NAME.fullmatch(name)
    found = (int(match[1]), int(match[2]), int(match[3])) if match else None
    return found if found and shard_name(*found) == name else None


class Dealer:
    """Deals the shards that are not committed to `world_size` ranks, group after group, the same on every rank."""

    def __init__(self, layout: Layout, committed: dict[tuple[int, int], int], *, rank: int, world_size: int) -> None:
        """`committed`: (group, lane) to the number of samples of the shard that is there."""
        self._layout, self._committed = layout, committed
        self._rank, self._world_size = rank, world_size
        self._dealt = 0  # shards dealt to anyone so far

    def lanes_to_keep(self, group: int) -> set[int]:
        """Return the lanes of a group whose texts this rank may need.

        That a committed short shard stays is known only when the stream has ended, so such a group is kept whole.
        """
        full = self._layout.samples_per_shard
        there = {lane: self._committed.get((group, lane)) for lane in range(self._layout.lanes)}
        if any(samples is not None and samples < full for samples in there.values()):
            return set(there)
        missing = [lane for lane, samples in there.items() if samples is None]
        return {lane for j, lane in enumerate(missing, self._dealt) if j % self._world_size == self._rank}

    def deal(self, group: int, total: int) -> list[int]:
        """Return the lanes of a group that this rank makes, `total` being the samples of the stream seen by its end."""
        mine = []
        for lane in range(self._layout.lanes):
            samples = self._layout.samples_in(group, lane, total)
            if samples and self._committed.get((group, lane)) != samples:
                if self._dealt % self._world_size == self._rank:
                    mine.append(lane)
                self._dealt += 1
        return mine
