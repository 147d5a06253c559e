"""Which samples share a row: a few by hand, all of them exactly once, and only from one shard."""

from pathlib import Path

import numpy as np
import pytest
from made_cache import make_cache, make_rows, same_targets

from accel_distill.cache import TeacherCache
from accel_distill.packs import PackedCache, best_fit

LENGTHS = [[2 + (7 * n) % 30] for n in range(24)]


def packed(path: Path, items: list[int] | None = None, *, most: int = 40) -> PackedCache:
    make_cache(path, make_rows(LENGTHS), lanes=2, samples_per_shard=4)
    return PackedCache(TeacherCache(path), list(range(24)) if items is None else items, most=most)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([10], [[0]]),
        ([3, 7, 5, 5, 10], [[4], [1, 0], [2, 3]]),
        ([6, 5, 4, 3, 2], [[0, 2], [1, 3, 4]]),
        ([6, 7, 3, 4], [[1, 2], [0, 3]]),  # each to the fullest that has room
        ([4, 4, 4, 4], [[0, 1], [2, 3]]),
        ([1, 1, 1], [[0, 1, 2]]),
    ],
)
def test_packs_are_those_written_by_hand(lengths: list[int], expected: list[list[int]]) -> None:
    assert best_fit(lengths, most=10) == expected


def test_every_index_is_in_one_pack_and_no_pack_is_too_long() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 1000)
    packs = best_fit(lengths.tolist(), most=100)
    assert sorted(index for pack in packs for index in pack) == list(range(1000))
    sums = [int(lengths[pack].sum()) for pack in packs]
    assert max(sums) <= 100
    assert len(packs) < 1.05 * lengths.sum() / 100  # few would do with less


def test_each_item_is_in_one_pack_with_items_of_its_own_shard(tmp_path: Path) -> None:
    items = [item for item in range(24) if item not in (0, 5)]
    packs = packed(tmp_path, items)
    found = [packs.items(row).tolist() for row in range(len(packs))]
    assert sorted(item for pack in found for item in pack) == items
    assert packs.samples == 22 and 6 <= len(packs) < 22
    for row, pack in enumerate(found):
        assert {packs.cache.shard_of_item[item] for item in pack} == {packs.shard_of_row[row]}
        assert packs.lengths[row] == sum(LENGTHS[item][0] for item in pack) <= 40


def test_packs_are_the_same_whatever_the_order_of_the_items_of_different_shards(tmp_path: Path) -> None:
    packs = packed(tmp_path)
    again = PackedCache(packs.cache, sorted(range(24), key=lambda item: packs.cache.shard_of_item[item]), most=40)
    assert [packs.items(row).tolist() for row in range(len(packs))] == [
        again.items(row).tolist() for row in range(len(again))
    ]


def test_a_row_is_its_samples_as_the_cache_has_them(tmp_path: Path) -> None:
    packs = packed(tmp_path)
    row = int(np.argmax([len(packs.items(row)) for row in range(len(packs))]))
    assert len(packs.items(row)) > 1
    for sample, item in zip(packs[row], packs.items(row), strict=True):
        assert sample.sample_index == item
        assert same_targets(sample.targets, packs.cache[int(item)].targets, vocab=50)
    assert packs[-1][0].sample_index == packs[len(packs) - 1][0].sample_index
    with pytest.raises(IndexError, match=f"row {len(packs)} of {len(packs)}"):
        packs[len(packs)]
