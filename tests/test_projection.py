"""The arithmetic of an estimate, against figures worked by hand, and its intervals against many draws."""

import math

import numpy as np
import pytest

from accel_distill.deal import Layout
from accel_distill.projection import (
    Interval,
    ShardBytes,
    exactly,
    fixed_bytes,
    mean_of,
    most_samples,
    product,
    shard_bytes_of,
    shard_count,
    shards_bytes,
    speed_up,
    verdict,
)


def test_a_mean_has_the_error_of_its_sample_and_none_when_all_were_counted() -> None:
    # 2, 4, 6, 8: mean 5, standard deviation sqrt(20/3) = 2.582, error 1.291, Student's t of 3 degrees 3.18
    many = mean_of([2, 4, 6, 8], population=10**9)
    assert many.mid == 5 and many.high - 5 == pytest.approx(3.18 * 1.291, rel=1e-3) == 5 - many.low
    # of 16 samples three quarters were not seen: times sqrt(3/4)
    some = mean_of([2, 4, 6, 8], population=16)
    assert some.high - 5 == pytest.approx(3.18 * 1.291 * math.sqrt(0.75), rel=1e-3)
    assert mean_of([2, 4, 6, 8], population=4) == exactly(5.0)


def test_a_mean_of_one_or_of_very_different_samples_is_not_below_zero() -> None:
    assert mean_of([7], population=2) == Interval(0.0, 7.0, 14.0)
    assert mean_of([0, 0, 0, 100], population=100).low == 0.0
    assert mean_of([], population=0) == exactly(0.0)


@pytest.mark.parametrize("sampled", [64, 1000, 4096])
def test_the_interval_of_a_mean_holds_the_true_mean_of_lengths_as_often_as_it_says(sampled: int) -> None:
    rng = np.random.default_rng(0)
    population = np.minimum(rng.lognormal(5.5, 1.0, 10_000), 2048)
    hits = 0
    for _ in range(200):
        found = mean_of(rng.choice(population, sampled, replace=False), population=len(population))
        hits += found.low <= population.mean() <= found.high
    assert 178 <= hits <= 199  # 190 expected; 5.5 standard deviations of the number of hits below, and not all


def test_a_product_adds_relative_errors_as_squares() -> None:
    found = product(Interval(8, 10, 10 * 1.3), Interval(100, 100, 100 * 1.4))
    assert (found.low, found.mid) == (pytest.approx(800), 1000)
    # log 1.3 = 0.2624, log 1.4 = 0.3365: the root of the sum of squares is 0.4267, exp 1.532
    assert found.high == pytest.approx(1532, rel=1e-3)
    assert product(exactly(3), exactly(5)) == exactly(15)
    assert product(Interval(0, 2, 4), exactly(5)) == Interval(0, 10, pytest.approx(20))
    assert product(exactly(0), Interval(1, 2, 3)) == exactly(0)


def test_what_shards_take_by_themselves_is_what_parts_take_more_than_the_whole() -> None:
    # 10 bytes a position and 1,000 a shard: 4 parts of 100, 200, 300, 400 positions
    parts = [(1000 + 10 * n, n) for n in (100, 200, 300, 400)]
    assert fixed_bytes(parts, 1000 + 10 * 1000) == 1000
    assert fixed_bytes(parts[:1], 2000) == 0 == fixed_bytes([(5, 1), (5, 1)], 12)
    found = shard_bytes_of(parts, 1000 + 10 * 1000, fixed=1000, samples=64, population=10_000)
    assert found == ShardBytes(1000.0, exactly(10.0))


def test_the_bytes_of_a_position_are_as_sure_as_the_parts_agree() -> None:
    # two parts of 100 positions at 9 and 11 bytes, and nothing by themselves: the residuals are -100 and 100, so the
    # error is sqrt(20,000 * 2) / 200 = 1, and Student's t of one degree 12.7
    parts = [(900, 100), (1100, 100)]
    found = shard_bytes_of(parts, 2000, fixed=0, samples=2, population=10**9)
    assert found.fixed == 0 and found.per_position == Interval(0.0, 10.0, pytest.approx(22.7))
    assert shard_bytes_of(parts, 2000, fixed=0, samples=2, population=2).per_position == exactly(10.0)
    assert shard_bytes_of(parts, 2000, fixed=400, samples=2, population=2) == ShardBytes(400, exactly(8.0))


def test_one_part_alone_is_no_measure_of_how_samples_differ() -> None:
    assert shard_bytes_of([(500, 100)], 500, fixed=0, samples=1, population=1) == ShardBytes(0.0, exactly(5.0))
    alone = shard_bytes_of([(500, 100)], 500, fixed=0, samples=1, population=2)
    assert alone.per_position == Interval(2.5, 5.0, 10.0)
    empty = shard_bytes_of([(500, 0), (500, 0)], 600, fixed=400, samples=2, population=9)
    assert empty == ShardBytes(600.0, exactly(0.0))


@pytest.mark.parametrize("layout", [Layout(1, 4), Layout(3, 4), Layout(5, 1)])
def test_shards_are_counted_as_they_are_dealt(layout: Layout) -> None:
    for samples in range(40):
        assert shard_count(layout, samples) == len(list(layout.shards(samples)))


def test_the_bytes_of_a_million_samples() -> None:
    # 1 M x 340 positions x 20 bytes = 6.8 GB, and 977 shards of 12 kB, which may be 10.5 or 13.5
    found = shards_bytes(10**6, layout=Layout(1, 1024), positions=exactly(340), shard=ShardBytes(12_000, exactly(20)))
    assert found == Interval(*(6_800_000_000 + 977 * each for each in (10_500, 12_000, 13_500)))


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        (Interval(60, 70, 80), "fits"),  # up to 0.8 of the room
        (Interval(60, 70, 81), "tight"),
        (Interval(90, 100, 130), "tight"),
        (Interval(60, 101, 130), "does not fit"),
        (Interval(-5, -1, 0), "fits"),  # all of it is there
    ],
)
def test_a_verdict_looks_at_the_high_figure_then_at_the_middle(needed: Interval, said: str) -> None:
    assert verdict(needed, 100) == said
    assert verdict(needed, None) == "unknown"


def test_nothing_fits_where_the_reserve_is_touched_already() -> None:
    assert verdict(exactly(1), -5) == "does not fit"
    assert verdict(exactly(0), 0) == "fits"


def test_the_largest_number_of_samples_fits_and_one_more_does_not() -> None:
    def total(samples: int) -> Interval:
        return Interval(8, 10, 12).times(samples).plus(100)

    # 80 % of 10,000 is 8,000; 12 a sample and 100, of which 50 are there: 662 x 12 = 7,944, 663 x 12 = 7,956 ...
    found = most_samples(total, there=50, room=10_000)
    assert found == (8000 - 50) // 12
    assert verdict(total(found).plus(-50), 10_000) == "fits" != verdict(total(found + 1).plus(-50), 10_000)
    assert most_samples(total, there=0, room=50) == 0


def test_processes_share_the_cores() -> None:
    assert speed_up(4, cores=16, threads=16) == 1  # one process used them all
    assert speed_up(4, cores=16, threads=4) == 4
    assert speed_up(8, cores=16, threads=4) == 4
    assert speed_up(1, cores=16, threads=1) == 1
    assert speed_up(4, cores=2, threads=4) == 1
