"""Packs: which samples of a cache share a row of training, and the dataset of these rows.

The one decision: packs are made once, of the samples of one shard each, by best fit of the longest first. So a dataset
of packs has a length, an epoch has the same rows in another order, reading stays as local as that of samples, and a
run that goes on finds the rows that it left. It costs that samples share their row with the same others in each epoch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from accel_distill.cache import CachedSample, TeacherCache
from accel_distill.codec import offsets


class PackedCache:
    """The packs of some items of a cache: `len(packs)`, `packs[n]` (a list of samples); a map-style dataset."""

    def __init__(self, cache: TeacherCache, items: Sequence[int], *, most: int) -> None:
        """Pack the items into rows of at most `most` tokens; a longer item, of which there is none, would be alone."""
        self.cache, self.most = cache, most
        wanted = np.asarray(items, np.int64)
        order = np.argsort(cache.shard_of_item[wanted], kind="stable")
        shards = cache.shard_of_item[wanted][order]
        parts = np.split(wanted[order], np.flatnonzero(np.diff(shards)) + 1)
        packs = [part[pack] for part in parts for pack in best_fit(cache.lengths[part].tolist(), most=most)]
        self._items = np.concatenate([np.zeros(0, np.int64), *packs])  # pack after pack
        self._starts = offsets(np.array([len(pack) for pack in packs], np.int64))  # (packs + 1,)
        self.shard_of_row = cache.shard_of_item[self._items[self._starts[:-1]]]  # (packs,)
        self.lengths = np.add.reduceat(cache.lengths[self._items], self._starts[:-1])  # (packs,) tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> list[CachedSample]:
        return [self.cache[int(item)] for item in self.items(row)]

    def __getitems__(self, rows: Sequence[int]) -> list[list[CachedSample]]:
        """Return many rows, as torch's DataLoader asks for them."""
        items = [self.items(row).tolist() for row in rows]
        samples = iter(self.cache.__getitems__([item for row in items for item in row]))
        return [[next(samples) for _ in row] for row in items]

    @property
    def samples(self) -> int:
        """How many samples all packs hold."""
        return len(self._items)

    def items(self, row: int) -> np.ndarray:
        """Return the items of the cache that a row holds, in their order in it."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self._items[self._starts[row] : self._starts[row + 1]]


def best_fit(lengths: Sequence[int], *, most: int) -> list[list[int]]:
    """Return packs of indices whose lengths sum to at most `most`, each index in one.

    The longest goes first, each to the fullest pack that has room for it, among equals to the first.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, pack), ascending; full packs are left out
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(rooms, (lengths[index], 0))
        if at < len(rooms):
            room, pack = rooms.pop(at)
            packs[pack].append(index)
        else:
            room, pack = most, len(packs)
            packs.append([index])
        if (left := room - lengths[index]) > 0:
            insort(rooms, (left, pack))
    return packs
