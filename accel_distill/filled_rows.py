"""Rows without a token behind a dataset's own, so that an epoch's last batches are whole on every process.

The one decision: what is missing of the last batches is filled with nothing, where accelerate would repeat the first
samples of the epoch. So W processes take each sample once an epoch, as one process does, and end with its weights.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset, Sampler, Subset

from accel_distill.cache import CachedSample, TeacherCache
from accel_distill.packs import PackedCache
from accel_distill.targets import no_targets
from accel_distill.text_rows import NO_SAMPLE, MapRows, no_row

T = TypeVar("T")


class FilledRows(Dataset, Generic[T]):
    """The rows of a dataset, and behind them `nothing`, so that there are a multiple of `multiple`."""

    def __init__(self, rows: Any, *, multiple: int, nothing: T) -> None:
        self.rows, self._nothing = rows, nothing
        self._length = -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> T:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[T]:
        """Return many rows, as torch's DataLoader asks for them."""
        there = [item for item in items if item < len(self.rows)]
        rows = iter(self.rows.__getitems__(there) if there else ())
        return [next(rows) if item < len(self.rows) else self._nothing for item in items]


class FilledSampler(Sampler[int]):
    """The items of a sampler of `FilledRows.rows`, and behind them those that are filled in."""

    def __init__(self, sampler: Sampler[int], dataset: FilledRows) -> None:
        self._sampler, self._dataset = sampler, dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        yield from self._sampler
        yield from range(len(self._dataset.rows), len(self._dataset))


def filled(dataset: Any, *, multiple: int) -> Any:
    """Return the dataset, filled up where it is one of the package's: a cache, a `Subset` of one, packs, `MapRows`."""
    rows = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(rows, TeacherCache):
        return FilledRows(dataset, multiple=multiple, nothing=_no_sample(rows))
    if isinstance(rows, PackedCache):
        return FilledRows(dataset, multiple=multiple, nothing=[_no_sample(rows.cache)])
    if isinstance(rows, MapRows):
        return FilledRows(dataset, multiple=multiple, nothing=no_row())
    return dataset


def _no_sample(cache: TeacherCache) -> CachedSample:
    nothing, targets = torch.zeros(0, dtype=torch.int64), no_targets(cache.method, cache.parameter)
    return CachedSample(NO_SAMPLE, nothing, nothing.bool(), targets, 0.0, 0.0)
