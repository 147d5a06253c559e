"""The order in which training reads a cache: shards shuffled, and samples inside windows of a few shards.

The one decision: a window holds no more shards than a cache keeps open, so a reader opens and inflates each once an
epoch, and reading is nearly as fast as in file order. It costs that samples of two windows never share a batch; but
each epoch chooses the shards of a window anew, and a shard already holds every L-th sample of a part of the stream.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler, Subset

from accel_distill.cache import MOST_OPEN, OPEN_BYTES, TeacherCache
from accel_distill.text_rows import MapRows


class WindowSampler(Sampler[int]):
    """Yields each item of a dataset once, in an order that is a function of seed and epoch alone."""

    def __init__(
        self,
        shard_of_item: np.ndarray,
        shard_bytes: np.ndarray,
        *,
        seed: int,
        epoch: Callable[[], int],
        window: int = OPEN_BYTES,
    ) -> None:
        """`shard_of_item` (items,) and `shard_bytes` (shards,) say which shard an item is in, and how large it is.

        A window is as many shards as have `window` bytes, one to 64. `epoch` is asked when an epoch begins.
        """
        self._shard_of_item, self._shard_bytes = shard_of_item, shard_bytes
        self._seed, self._epoch, self._window = seed, epoch, window

    def __len__(self) -> int:
        return len(self._shard_of_item)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self._epoch()).tolist())

    def order(self, epoch: int) -> np.ndarray:
        """Return the items (len,) int64 in the order of an epoch."""
        rng = np.random.default_rng((self._seed, epoch))
        shards = rng.permutation(len(self._shard_bytes))
        window_of_shard = np.empty(len(shards), np.int64)
        window_of_shard[shards] = _windows(self._shard_bytes[shards], self._window)
        items = rng.permutation(len(self))
        return items[np.argsort(window_of_shard[self._shard_of_item[items]], kind="stable")]


def window_sampler(dataset: object, *, seed: int, epoch: Callable[[], int]) -> WindowSampler | None:
    """Return the sampler for a `TeacherCache`, a `Subset` of one or `MapRows`; None for another dataset."""
    cache = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(cache, MapRows):  # any order costs the same: one window
        return WindowSampler(np.zeros(len(cache), np.int64), np.zeros(1, np.int64), seed=seed, epoch=epoch)
    if not isinstance(cache, TeacherCache):
        return None
    shards = cache.shard_of_item
    if isinstance(dataset, Subset):
        shards = shards[np.asarray(dataset.indices, np.int64)]
    return WindowSampler(shards, cache.shard_bytes, seed=seed, epoch=epoch)


def _windows(sizes: np.ndarray, most: int) -> np.ndarray:
    """Number the windows of shards in order: a new one begins where `most` bytes would be exceeded."""
    numbers, number, first, held = np.empty(len(sizes), np.int64), 0, 0, 0
    for shard, size in enumerate(sizes.tolist()):
        if shard > first and (held + size > most or shard - first == MOST_OPEN):
            number, first, held = number + 1, shard, 0
        numbers[shard] = number
        held += size
    return numbers
