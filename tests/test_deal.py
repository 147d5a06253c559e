"""Which sample is in which shard, and who makes it: checked for every small stream, world size and committed set."""

import itertools
import random

import pytest

from accel_distill.deal import Dealer, Layout, parse_shard_name, shard_name

WORLD_SIZES = (1, 2, 3, 4, 5)


def samples_of(layout: Layout, group: int, lane: int, samples: int) -> list[int]:
    first = layout.first_sample(group, lane)
    return list(range(first, first + samples * layout.lanes, layout.lanes))


def deal_all(
    layout: Layout, total: int, *, committed: dict[tuple[int, int], int], world_size: int
) -> dict[int, list[tuple[int, int, int]]]:
    """Return what each rank makes, walking group after group as the walk of the stream does."""
    made: dict[int, list[tuple[int, int, int]]] = {}
    for rank in range(world_size):
        dealer = Dealer(layout, committed, rank=rank, world_size=world_size)
        made[rank] = []
        for group in range(total // layout.group_samples + 1):
            kept = dealer.lanes_to_keep(group)
            seen = min(total, (group + 1) * layout.group_samples)
            for lane in dealer.deal(group, seen):
                assert lane in kept, "a rank makes a shard only of texts that it kept"
                made[rank].append((group, lane, layout.samples_in(group, lane, seen)))
    return made


def test_the_first_shards_of_a_layout_of_two_lanes_are_these() -> None:
    layout = Layout(lanes=2, samples_per_shard=3)
    assert list(layout.shards(9)) == [(0, 0, 3), (0, 1, 3), (1, 0, 2), (1, 1, 1)]
    assert samples_of(layout, 0, 1, 3) == [1, 3, 5]
    assert samples_of(layout, 1, 0, 2) == [6, 8]
    assert list(layout.shards(7)) == [(0, 0, 3), (0, 1, 3), (1, 0, 1)]
    assert list(layout.shards(0)) == []


@pytest.mark.parametrize(("lanes", "samples_per_shard"), [(1, 1), (1, 4), (2, 3), (3, 2), (5, 1), (4, 5)])
def test_shards_are_disjoint_and_complete_for_every_length_of_the_stream(lanes: int, samples_per_shard: int) -> None:
    layout = Layout(lanes, samples_per_shard)
    for total in range(3 * layout.group_samples + 2):
        shards = list(layout.shards(total))
        assert sorted(i for shard in shards for i in samples_of(layout, *shard)) == list(range(total))
        assert shards == sorted(shards)


def test_place_is_where_the_shards_have_the_sample() -> None:
    layout = Layout(lanes=3, samples_per_shard=4)
    seen = 0
    for group, lane, samples in layout.shards(31):
        for number, index in enumerate(samples_of(layout, group, lane, samples)):
            assert layout.place(index) == (group, lane, number)
            seen += 1
    assert seen == 31
    assert layout.place(12 + 7) == (1, 1, 2)  # written by hand: the eighth sample of the second group of 12


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_fresh_start_with_a_lane_for_each_rank_deals_sample_after_sample(world_size: int) -> None:
    layout = Layout(lanes=world_size, samples_per_shard=3)
    made = deal_all(layout, 40, committed={}, world_size=world_size)
    for rank, shards in made.items():
        assert [i for shard in shards for i in samples_of(layout, *shard)] == list(range(rank, 40, world_size))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_deal_is_disjoint_and_complete_for_every_committed_subset(world_size: int) -> None:
    layout = Layout(lanes=3, samples_per_shard=2)
    for total in (11, 12, 13):
        shards = list(layout.shards(total))
        for chosen in itertools.product((False, True), repeat=len(shards)):
            there = {shard[:2]: shard[2] for shard, is_there in zip(shards, chosen, strict=True) if is_there}
            made = deal_all(layout, total, committed=there, world_size=world_size)
            dealt = sorted(shard for part in made.values() for shard in part)
            assert dealt == [shard for shard in shards if shard[:2] not in there]
            counts = [len(part) for part in made.values()]
            assert max(counts) - min(counts) <= 1, "and it is even"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_cache_that_grows_makes_its_short_shards_again_and_keeps_the_full_ones(world_size: int) -> None:
    layout, choice = Layout(lanes=3, samples_per_shard=4), random.Random(0)
    short_ones = 0
    for before, after in itertools.combinations(range(1, 40, 3), 2):
        there = {(group, lane): samples for group, lane, samples in layout.shards(before) if choice.random() < 0.7}
        made = deal_all(layout, after, committed=there, world_size=world_size)
        dealt = sorted(shard for part in made.values() for shard in part)
        expected = [shard for shard in layout.shards(after) if there.get(shard[:2]) != shard[2]]
        assert dealt == expected
        short_ones += any(shard[:2] in there for shard in dealt)
    assert short_ones > 10


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_keeps_the_texts_of_its_share_of_the_lanes_only(world_size: int) -> None:
    layout = Layout(lanes=7, samples_per_shard=2)
    most = 0
    for rank in range(world_size):
        dealer = Dealer(layout, {(1, 2): 2}, rank=rank, world_size=world_size)
        for group in range(4):
            most = max(most, len(dealer.lanes_to_keep(group)))
            dealer.deal(group, 56)
    assert most == -(-7 // world_size)


def test_the_names_of_shards_round_trip() -> None:
    places = [(0, 0, 1), (1, 2, 1024), (999_999, 999, 10**6), (1_000_000, 1000, 7)]
    assert [parse_shard_name(shard_name(*place)) for place in places] == places
    assert shard_name(0, 1, 1024) == "shard-000000-001-1024.h5"


def test_other_names_are_not_those_of_shards() -> None:
    names = ["shard-0-0-1.h5", "shard-000000-000-01.h5", "shard-0000000-000-1.h5", "shard-000000-000-1.h5.tmp"]
    names += ["shard-000000-000-1.H5", "xshard-000000-000-1.h5", "shard-000000-000-٣.h5", "shard-00000a-000-1.h5"]
    assert [name for name in names if parse_shard_name(name) is not None] == []
