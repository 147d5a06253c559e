"""The stored curves: their points, what lies between and beyond, and that a large vocabulary is inside."""

import math

import pytest

from accel_distill.byte_curves import stored_bytes_per_position


def test_a_measured_point_is_itself_and_its_interval_is_wide() -> None:
    found = stored_bytes_per_position("threshold", 0.03)
    assert found.mid == pytest.approx(math.sqrt(9.64 * 26.92))
    assert (found.low, found.high) == (pytest.approx(9.64 / 2), pytest.approx(26.92 * 1.25))


def test_between_and_beyond_the_points_a_curve_is_straight_in_logarithms() -> None:
    ends = [stored_bytes_per_position("top_k", k).mid for k in (32, 64)]
    assert stored_bytes_per_position("top_k", math.sqrt(32 * 64)).mid == pytest.approx(math.sqrt(ends[0] * ends[1]))
    assert stored_bytes_per_position("top_k", 128).mid == pytest.approx(ends[1] ** 2 / ends[0])
    lower = [stored_bytes_per_position("random", n).mid for n in (25, 12)]
    assert stored_bytes_per_position("random", 12 * 12 / 25).mid == pytest.approx(lower[1] ** 2 / lower[0])


@pytest.mark.parametrize(("method", "parameters"), [("threshold", (0.5, 0.06, 0.003)), ("random", (5, 50, 500))])
def test_more_precise_targets_take_more(method, parameters) -> None:
    mids = [stored_bytes_per_position(method, parameter).mid for parameter in parameters]
    assert mids == sorted(mids) and mids[0] > 0


def test_the_targets_of_a_large_vocabulary_are_inside_the_interval() -> None:
    found = stored_bytes_per_position("threshold", 0.06)
    assert found.low < 12.88 < found.high  # 11.76, and 1.12 for input_ids: `bench/targets.py --proxy`
    assert abs(math.log(12.88 / found.mid)) < math.log(1.3)
