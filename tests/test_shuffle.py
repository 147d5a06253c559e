"""The order of training: every item once, shards together, a function of seed and epoch alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_cache import make_cache, make_rows
from torch.utils.data import Subset, TensorDataset

from accel_distill.cache import MOST_OPEN, TeacherCache
from accel_distill.packs import PackedCache
from accel_distill.padding import padding_share
from accel_distill.shuffle import Grouping, WindowSampler, window_sampler

SHARD_OF_ITEM = np.arange(600) % 20  # 20 shards of 30 items, dealt as lanes are
SIZES = np.full(20, 100)


def sampler(seed: int = 1, window: int = 300) -> WindowSampler:
    return WindowSampler(SHARD_OF_ITEM, SIZES, seed=seed, epoch=lambda: 0, window=window)


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
    items = WindowSampler(SHARD_OF_ITEM, SIZES, seed=1, epoch=lambda: epoch)
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
    assert cache.shard_bytes.tolist() == [path.stat().st_size for path in sorted((tmp_path / "shards").iterdir())]
    assert window_sampler(TensorDataset(torch.zeros(3)), seed=0, epoch=lambda: 0) is None


@pytest.mark.parametrize("shard", [0, 5])
def test_a_cache_says_which_shard_an_item_is_in(shard: int, tmp_path: Path) -> None:
    make_cache(tmp_path, make_rows([[5]] * 24), lanes=2, samples_per_shard=4)
    cache = TeacherCache(tmp_path)
    group, lane = divmod(shard, 2)
    items = np.flatnonzero(cache.shard_of_item == shard).tolist()
    assert items == [group * 8 + lane + 2 * number for number in range(4)]


LENGTHS = np.random.default_rng(5).integers(1, 500, 600)


def grouped(size: int = 8, *, seed: int = 1, window: int = 300) -> WindowSampler:
    return WindowSampler(
        SHARD_OF_ITEM, SIZES, seed=seed, epoch=lambda: 0, window=window, grouping=Grouping(LENGTHS, size)
    )


@pytest.mark.parametrize("size", [1, 7, 8, 64, 601])
def test_grouped_by_length_every_item_comes_once_in_every_epoch(size: int) -> None:
    for epoch in range(3):
        assert sorted(grouped(size).order(epoch).tolist()) == list(range(600))


def test_the_items_of_a_step_have_about_equal_lengths() -> None:
    spread = [
        np.ptp(LENGTHS[order].reshape(-1, 8), axis=1).mean() for order in (grouped().order(0), sampler().order(0))
    ]
    assert spread[0] < 0.15 * spread[1]
    shares = [padding_share(LENGTHS[order], batch=8) for order in (grouped().order(0), sampler().order(0))]
    assert shares[0] < 0.1 and shares[1] > 0.35


def test_steps_come_in_no_order_of_length_and_what_fills_none_comes_last() -> None:
    order = grouped(7).order(0)
    means = LENGTHS[order[: 600 // 7 * 7]].reshape(-1, 7).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    assert len(order) % 7 == 5 and np.ptp(LENGTHS[order[-5:]]) > 50


def test_grouped_steps_stay_in_windows_but_for_what_fills_no_step() -> None:
    size = 8
    shards = SHARD_OF_ITEM[grouped(size).order(0)]
    windows = SHARD_OF_ITEM[sampler().order(0)]
    strays = 0
    for start in range(0, 600, 90):
        strays += len([shard for shard in shards[start : start + 90] if shard not in set(windows[start : start + 90])])
    assert strays < 2 * size * 7


def test_the_grouped_order_is_a_function_of_seed_epoch_and_step() -> None:
    first = grouped().order(0)
    assert (first == grouped().order(0)).all()
    for other in (grouped().order(1), grouped(seed=2).order(0), grouped(4).order(0)):
        assert (first != other).any()


def test_a_cache_is_grouped_by_its_own_lengths_and_packs_by_their_shards(tmp_path: Path) -> None:
    lengths = [[2 + (7 * n) % 30] for n in range(24)]
    make_cache(tmp_path, make_rows(lengths), lanes=2, samples_per_shard=4)
    cache = TeacherCache(tmp_path)
    assert cache.lengths.tolist() == [length for (length,) in lengths]
    subset = Subset(cache, list(range(4, 24)))  # type: ignore[arg-type]
    found = window_sampler(subset, seed=0, epoch=lambda: 0, group=4)
    assert found is not None and sorted(found) == list(range(20))
    assert found._grouping is not None and found._grouping.lengths.tolist() == cache.lengths[4:].tolist()
    packs = PackedCache(cache, range(4, 24), most=40)
    rows = window_sampler(packs, seed=0, epoch=lambda: 0)
    assert rows is not None and sorted(rows) == list(range(len(packs)))
    assert (rows._shard_of_item == packs.shard_of_row).all()


def test_the_share_of_padding_is_that_counted_by_hand() -> None:
    assert padding_share(np.array([4, 2, 3, 3, 1]), batch=2) == pytest.approx(2 / 15)
    assert padding_share(np.array([4, 2, 3, 3, 1]), batch=8) == pytest.approx(7 / 20)
    assert padding_share(np.array([4, 2, 3]), batch=1) == 0
