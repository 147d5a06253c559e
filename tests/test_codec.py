"""The encoding of targets: exact round trips, hand-worked columns, values at the edge of every width."""

import numpy as np
import pytest

from accel_distill.codec import column_dtypes, decode, encode, invert, narrow, offsets, rank_tokens, tail_counts

METHODS = [("threshold", 0.06), ("threshold", 0.001), ("top_k", 64.0), ("random", 50.0), ("random", 300.0)]


def random_arrays(method: str, parameter: float, *, vocab: int, positions: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Targets that a sampler could have made, with ids up to the last of the vocabulary."""
    rng = np.random.default_rng(seed)
    head_count = rng.integers(1, 6, positions) if method != "random" else np.ones(positions, np.int64)
    heads = int(head_count.sum())
    starts = offsets(head_count)[:-1]
    if method == "threshold":
        table = tail_counts(parameter)
        values = rng.integers(0, (len(table) - 1) // 6, heads)
        tail_count = table[len(table) - 1 - np.add.reduceat(values, starts)]
    elif method == "top_k":
        values, tail_count = np.sort(rng.integers(0, 65536, heads)), np.zeros(positions, np.int64)
    else:
        values, tail_count = rng.integers(0, int(parameter) + 1, heads), rng.integers(0, 20, positions)
    tails = int(tail_count.sum())
    tail_values = rng.integers(1, int(parameter) + 1, tails) if method == "random" else np.zeros(0, np.int64)
    ids = rng.integers(0, vocab, heads + tails)
    ids[-1] = vocab - 1
    return {
        "head_count": head_count,
        "head_ids": ids[:heads],
        "head_values": values,
        "tail_count": tail_count,
        "tail_ids": ids[heads:],
        "tail_values": tail_values,
    }


def in_rank_order(arrays: dict[str, np.ndarray], ranks: np.ndarray) -> dict[str, np.ndarray]:
    """The same targets with each position's tail in the order of its ranks, one position at a time."""
    ends = offsets(arrays["tail_count"])
    order = np.concatenate(
        [
            a + np.argsort(ranks[arrays["tail_ids"][a:b]], kind="stable")
            for a, b in zip(ends[:-1], ends[1:], strict=True)
        ]
        or [np.zeros(0, np.int64)]
    )
    values = arrays["tail_values"]
    return {**arrays, "tail_ids": arrays["tail_ids"][order], "tail_values": values[order] if len(values) else values}


@pytest.mark.parametrize("vocab", [2, 256, 257, 50_257, 65_536, 65_537, 151_936, 262_208, 1 << 24])
@pytest.mark.parametrize(("method", "parameter"), METHODS)
def test_ids_and_weights_come_back_exactly_for_every_method_and_vocabulary(method, parameter, vocab):
    arrays = random_arrays(method, parameter, vocab=vocab, positions=200)
    ids_by_rank = np.random.default_rng(1).permutation(vocab).astype("<u4")
    ranks = invert(ids_by_rank)
    columns = encode(arrays, method=method, parameter=parameter, ranks=ranks)
    assert {name: column.dtype for name, column in columns.items()} == column_dtypes(method, parameter, vocab)
    found = decode(columns, method=method, parameter=parameter, ids_by_rank=ids_by_rank)
    expected = in_rank_order(arrays, ranks)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_columns_are_the_numbers_worked_out_by_hand():
    # V = 7; ranks: the ids 3, 1, 0, 2, 4, 5, 6 in descending count
    ids_by_rank = rank_tokens(np.array([3, 5, 2, 9, 0, 0, 0]))
    assert ids_by_rank.tolist() == [3, 1, 0, 2, 4, 5, 6]
    arrays = {
        "head_count": np.array([2, 1]),
        "head_ids": np.array([0, 3, 6]),
        "head_values": np.array([20, 10, 20]),  # M = 64 at t = 0.25: 34 and 44 are left
        "tail_count": np.array([2, 2]),  # floor(33 / 16) and floor(43 / 16)
        "tail_ids": np.array([6, 1, 2, 4]),
        "tail_values": np.zeros(0, np.int64),
    }
    columns = encode(arrays, method="threshold", parameter=0.25, ranks=invert(ids_by_rank))
    assert {name: column.tolist() for name, column in columns.items()} == {
        "head_count": [2, 1],
        "head_ids": [2, 0, 6],
        "head_values": [20, 10, 20],
        "tail_ids": [1, 5, 3, 1],  # ranks 1, 6 and 3, 4: the first, then the step
    }


def test_a_cut_at_a_position_decodes_alone():
    arrays = random_arrays("threshold", 0.06, vocab=1000, positions=50)
    ids_by_rank = np.arange(1000, dtype="<u4")
    columns = encode(arrays, method="threshold", parameter=0.06, ranks=invert(ids_by_rank))
    whole = decode(columns, method="threshold", parameter=0.06, ids_by_rank=ids_by_rank)
    heads, tails = offsets(arrays["head_count"]), offsets(arrays["tail_count"])
    cut = {
        "head_count": columns["head_count"][20:30],
        "head_ids": columns["head_ids"][heads[20] : heads[30]],
        "head_values": columns["head_values"][heads[20] : heads[30]],
        "tail_ids": columns["tail_ids"][tails[20] : tails[30]],
    }
    found = decode(cut, method="threshold", parameter=0.06, ids_by_rank=ids_by_rank)
    np.testing.assert_array_equal(found["tail_ids"], whole["tail_ids"][tails[20] : tails[30]])
    np.testing.assert_array_equal(found["tail_count"], arrays["tail_count"][20:30])


def test_no_position_at_all_is_encoded_and_decoded():
    for method, parameter in METHODS:
        empty = {name: np.zeros(0, np.int64) for name in random_arrays("random", 5.0, vocab=9, positions=3)}
        ids_by_rank = np.arange(9, dtype="<u4")
        columns = encode(empty, method=method, parameter=parameter, ranks=invert(ids_by_rank))
        found = decode(columns, method=method, parameter=parameter, ids_by_rank=ids_by_rank)
        assert all(len(values) == 0 for values in found.values())


def test_nothing_wraps():
    with pytest.raises(ValueError, match="column x: 256 does not fit uint8"):
        narrow(np.array([0, 256]), np.dtype("u1"), name="x")
    with pytest.raises(ValueError, match="column x: -1 does not fit"):
        narrow(np.array([-1]), np.dtype("u1"), name="x")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("head_count", [0, 3], "head_count is 0"),
        ("head_count", [2, 2], "head_ids holds 3 values where its counts say 4"),
        ("head_values", [200, 100, 20], "head_values sum to 300 at a position, more than the total 64"),
        ("head_ids", [2, 7, 6], "head_ids: rank 7, but the vocabulary has 7 ids"),
        ("tail_ids", [1, 9, 3, 1], "tail_ids: rank 10, but the vocabulary has 7 ids"),
        ("tail_ids", [1, 5, 3], "tail_ids holds 3 values where its counts say 4"),
    ],
)
def test_columns_that_contradict_each_other_are_refused_by_name(name, values, message):
    columns = {
        "head_count": np.array([2, 1], "u1"),
        "head_ids": np.array([2, 0, 6], "u1"),
        "head_values": np.array([20, 10, 20], "<u2"),
        "tail_ids": np.array([1, 5, 3, 1], "u1"),
    }
    columns[name] = np.array(values, "<u2")
    with pytest.raises(ValueError, match=message):
        decode(columns, method="threshold", parameter=0.25, ids_by_rank=np.arange(7, dtype="<u4"))
