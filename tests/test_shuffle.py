"""The order of training: every item once, shards together, a function of seed and epoch alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_cache import make_cache, make_rows
from torch.utils.data import Subset, TensorDataset

from accel_distill.cache import MOST_OPEN, TeacherCache
from accel_distill.shuffle import WindowSampler, window_sampler

SHARD_OF_ITEM = np.arange(600) % 20  # 20 shards of 30 items, dealt as lanes are
POSITIONS = np.full(20, 100)


def sampler(seed: int = 1, window: int = 300) -> WindowSampler:
    return WindowSampler(SHARD_OF_ITEM, POSITIONS, seed=seed, epoch=lambda: 0, window=window)


def test_every_item_comes_once_in_every_epoch() -> None:
    for epoch in range(3):
        assert sorted(sampler().order(epoch).tolist()) == list(range(600))


def test_shards_stay_together_in_windows_and_items_are_mixed_inside() -> None:
    shards = SHARD_OF_ITEM[sampler().order(0)]
    windows = [set(shards[start : start + 90].tolist()) for start in range(0, 600, 90)]
    assert [len(window) for window in windows] == [3, 3, 3, 3, 3, 3, 2]
    assert sorted(shard for window in windows for shard in window) == list(range(20))
    assert (np.diff(shards[:90]) != 0).mean() > 0.5  # not one shard after the other


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = sampler().order(0)
    assert (first == sampler().order(0)).all()
    assert (first != sampler().order(1)).any()
    assert (first != sampler(seed=2).order(0)).any()
    shards = [SHARD_OF_ITEM[sampler().order(epoch)[:90]] for epoch in (0, 1)]
    assert set(shards[0].tolist()) != set(shards[1].tolist())


def test_a_window_has_at_least_one_shard_and_not_too_many() -> None:
    assert len(set(SHARD_OF_ITEM[sampler(window=1).order(0)[:30]].tolist())) == 1
    many = WindowSampler(np.arange(1000), np.zeros(1000, np.int64), seed=0, epoch=lambda: 0)
    first = many.order(0)[:MOST_OPEN]
    assert len(set(first.tolist())) == MOST_OPEN
    assert set(many.order(0)[: 2 * MOST_OPEN].tolist()) > set(first.tolist())


def test_iterating_asks_for_the_epoch_each_time() -> None:
    epoch = 0
    items = WindowSampler(SHARD_OF_ITEM, POSITIONS, seed=1, epoch=lambda: epoch)
    first = list(items)
    epoch = 1
    assert list(items) != first == items.order(0).tolist()
    assert len(items) == 600


def test_a_subset_of_a_cache_is_shuffled_by_its_own_shards(tmp_path: Path) -> None:
    make_cache(tmp_path, make_rows([[5]] * 24), lanes=2, samples_per_shard=4)
    cache = TeacherCache(tmp_path)
    found = window_sampler(Subset(cache, list(range(4, 24))), seed=0, epoch=lambda: 0)  # type: ignore[arg-type]
    assert found is not None and sorted(found) == list(range(20))
    assert found._shard_of_item.tolist() == [cache.shard_of_item[item] for item in range(4, 24)]
    assert cache.shard_positions.tolist() == [16] * 6
    assert window_sampler(TensorDataset(torch.zeros(3)), seed=0, epoch=lambda: 0) is None


@pytest.mark.parametrize("shard", [0, 5])
def test_a_cache_says_which_shard_an_item_is_in(shard: int, tmp_path: Path) -> None:
    make_cache(tmp_path, make_rows([[5]] * 24), lanes=2, samples_per_shard=4)
    cache = TeacherCache(tmp_path)
    group, lane = divmod(shard, 2)
    items = np.flatnonzero(cache.shard_of_item == shard).tolist()
    assert items == [group * 8 + lane + 2 * number for number in range(4)]
