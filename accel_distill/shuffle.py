"""The order in which training reads a cache: shards shuffled, and samples inside windows of a few shards.

The one decision: a window holds no more shards than a cache keeps open, so a reader opens and inflates each once an
epoch, and reading is nearly as fast as in file order. It costs that samples of two windows never share a batch; but
each epoch chooses the shards of a window anew, and a shard already holds every L-th sample of a part of the stream.

Grouped by length, the items of a step (of all processes and micro-batches) are neighbours in the order of lengths of
some hundred items that are drawn together, and the steps are shuffled again. What does not fill a step goes on to the
next window.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler, Subset

from accel_distill.cache import MOST_OPEN, OPEN_BYTES, TeacherCache
from accel_distill.packs import PackedCache
from accel_distill.text_rows import MapRows
from accel_distill.training_arguments import BY_LENGTH

if TYPE_CHECKING:
    from transformers import TrainingArguments

POOL_STEPS = 50  # whose items are sorted by length together: more save little padding, and mix less


@dataclass(frozen=True)
class Grouping:
    """What grouping by length needs to know."""

    lengths: np.ndarray  # (items,) tokens
    size: int  # items of a step: per device, times accumulation, times processes


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
        grouping: Grouping | None = None,
    ) -> None:
        """`shard_of_item` (items,) and `shard_bytes` (shards,) say which shard an item is in, and how large it is.

        A window is as many shards as have `window` bytes, one to 64. `epoch` is asked when an epoch begins. With
        `grouping` the items of a step are of about equal length.
        """
        self._shard_of_item, self._shard_bytes = shard_of_item, shard_bytes
        self._seed, self._epoch, self._window = seed, epoch, window
        self._grouping = grouping

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
        windows = window_of_shard[self._shard_of_item[items]]
        by_window = np.argsort(windows, kind="stable")
        if self._grouping is None:
            return items[by_window]
        ends = np.flatnonzero(np.diff(windows[by_window])) + 1
        return _grouped(np.split(items[by_window], ends), self._grouping, rng)


def training_sampler(dataset: object, args: "TrainingArguments", *, epoch: Callable[[], int]) -> WindowSampler | None:
    """Return the sampler that these arguments ask for; None where it is the Trainer's own."""
    if args.train_sampling_strategy not in ("random", BY_LENGTH):
        return None
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    seed = args.seed if args.data_seed is None else args.data_seed
    return window_sampler(
        dataset, seed=seed, epoch=epoch, group=step if args.train_sampling_strategy == BY_LENGTH else None
    )


def window_sampler(
    dataset: object, *, seed: int, epoch: Callable[[], int], group: int | None = None
) -> WindowSampler | None:
    """Return the sampler for a `TeacherCache`, a `Subset`, a `PackedCache` or `MapRows`; None for others.

    With `group`, the number of items of a step, these are of about equal length.
    """
    if isinstance(dataset, PackedCache):
        return WindowSampler(dataset.shard_of_row, dataset.cache.shard_bytes, seed=seed, epoch=epoch)
    cache = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(cache, MapRows):  # any order costs the same: one window
        return WindowSampler(np.zeros(len(cache), np.int64), np.zeros(1, np.int64), seed=seed, epoch=epoch)
    if not isinstance(cache, TeacherCache):
        return None
    chosen = np.asarray(dataset.indices, np.int64) if isinstance(dataset, Subset) else np.arange(len(cache))
    grouping = Grouping(cache.lengths[chosen], group) if group else None
    return WindowSampler(cache.shard_of_item[chosen], cache.shard_bytes, seed=seed, epoch=epoch, grouping=grouping)


def _grouped(windows: Sequence[np.ndarray], grouping: Grouping, rng: np.random.Generator) -> np.ndarray:
    """Return the items of all windows in steps of about equal length; the last, incomplete one at the end."""
    parts, left = [], np.zeros(0, np.int64)
    for window in windows:
        items = np.concatenate([left, window])  # less than a step of the window before: hardly another shard to open
        whole = len(items) // grouping.size * grouping.size
        items, left = items[:whole], items[whole:]
        pools = np.split(items, range(POOL_STEPS * grouping.size, len(items), POOL_STEPS * grouping.size))
        by_length = [pool[np.argsort(grouping.lengths[pool], kind="stable")] for pool in pools]
        steps = np.concatenate(by_length).reshape(-1, grouping.size)
        parts.append(rng.permutation(steps).flatten())  # of rows: a step stays together
    return np.concatenate([*parts, left])


def _windows(sizes: np.ndarray, most: int) -> np.ndarray:
    """Number the windows of shards in order: a new one begins where `most` bytes would be exceeded."""
    numbers, number, first, held = np.empty(len(sizes), np.int64), 0, 0, 0
    for shard, size in enumerate(sizes.tolist()):
        if shard > first and (held + size > most or shard - first == MOST_OPEN):
            number, first, held = number + 1, shard, 0
        numbers[shard] = number
        held += size
    return numbers
