"""The encoding of targets: exact round trips, hand-worked columns, values at the edge of every width."""

import numpy as np
import pytest

from accel_distill.codec import (
    COUNTED_BY,
    Column,
    column_dtypes,
    decode,
    encode,
    invert,
    narrow,
    offsets,
    rank_tokens,
    tail_counts,
)
from accel_distill.packing import Bits

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
        tail_count = np.zeros(positions, np.int64)
        values = np.concatenate([np.sort(rng.integers(0, 65536, count)) for count in head_count])
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


def rows_of(positions: int) -> np.ndarray:
    """Offsets of rows of uneven lengths, an empty one among them."""
    return np.array([0, positions // 3, positions // 3, positions])


def cut(
    columns: dict[str, np.ndarray], row: int | None, counted: dict[str, np.ndarray]
) -> dict[str, np.ndarray | Bits]:
    """Return what `decode` takes of one row, or of all: slices of the columns and of the bit streams."""
    found: dict[str, Column] = {}
    rows = slice(0, None) if row is None else slice(row, row + 1)
    for name, values in columns.items():
        if name.startswith("row_"):
            continue
        counts = columns[f"row_{name}"] if name.endswith("_bits") else counted[COUNTED_BY[name]]
        ends = offsets(counts)
        start, stop = int(ends[:-1][rows][0]), int(ends[1:][rows][-1])
        if name.endswith("_bits"):
            found[name] = Bits(values[start // 8 : -(-stop // 8)], start % 8, stop - start)
        else:
            found[name] = values[start:stop]
    return found


def row_counts(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return how many elements of each kind a row has."""
    found = {name: columns[f"row_{name}"].astype(np.int64) for name in ("positions", "heads", "tails")}
    return {**found, "rest": found["heads"] - found["positions"]}


def parts_of(arrays: dict[str, np.ndarray], first: int, last: int) -> dict[str, np.ndarray]:
    """Return the plain arrays of positions `first` to `last`."""
    heads, tails = (slice(*offsets(arrays[name])[[first, last]]) for name in ("head_count", "tail_count"))
    parts = {"head_count": slice(first, last), "tail_count": slice(first, last)}
    return {
        name: values[parts.get(name, heads if name.startswith("head") else tails)] for name, values in arrays.items()
    }


@pytest.mark.parametrize("vocab", [2, 256, 257, 50_257, 65_536, 65_537, 151_936, 262_208, 1 << 24])
@pytest.mark.parametrize(("method", "parameter"), METHODS)
def test_ids_and_weights_come_back_exactly_for_every_method_and_vocabulary(method, parameter, vocab):
    arrays = random_arrays(method, parameter, vocab=vocab, positions=200)
    ids_by_rank = np.random.default_rng(1).permutation(vocab).astype("<u4")
    ranks, rows = invert(ids_by_rank), rows_of(200)
    columns = encode(arrays, method=method, parameter=parameter, ranks=ranks, rows=rows)
    assert {name: column.dtype for name, column in columns.items()} == column_dtypes(method, parameter)
    settings = {"method": method, "parameter": parameter, "ids_by_rank": ids_by_rank}
    expected = in_rank_order(arrays, ranks)
    found = decode(cut(columns, None, row_counts(columns)), **settings)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    for row in range(3):  # each row alone
        found = decode(cut(columns, row, row_counts(columns)), **settings)
        for name, values in parts_of(expected, *rows[row : row + 2]).items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"row {row}: {name}")


HAND = {
    "head_count": np.array([2, 1]),
    "head_ids": np.array([0, 3, 6]),
    "head_values": np.array([2, 1, 1]),  # M = 8 at t = 0.25: 5 and 7 are left
    "tail_count": np.array([2, 3]),  # floor(4 / 2) and floor(6 / 2)
    "tail_ids": np.array([6, 1, 2, 4, 0]),
    "tail_values": np.zeros(0, np.int64),
}


def test_columns_are_the_numbers_worked_out_by_hand():
    # V = 7; ranks: the ids 3, 1, 0, 2, 4, 5, 6 in descending count
    ids_by_rank = rank_tokens(np.array([3, 5, 2, 9, 0, 0, 0]))
    assert ids_by_rank.tolist() == [3, 1, 0, 2, 4, 5, 6]
    columns = encode(HAND, method="threshold", parameter=0.25, ranks=invert(ids_by_rank), rows=np.array([0, 1, 2]))
    assert {name: column.tolist() for name, column in columns.items()} == {
        "row_positions": [1, 1],
        "row_heads": [2, 1],
        "row_tails": [2, 3],
        "head_count": [2, 1],
        "top_values": [2, 1],
        "rest_values": [1],
        "head_ids": [2, 0, 6],
        "head_ids_bits": [],  # ranks below 16 are symbols
        "row_head_ids_bits": [0, 0],
        "tail_ids": [1, 5, 2, 1, 1],  # ranks 1, 6 and 2, 3, 4: the first, then the step
        "tail_ids_bits": [],
        "row_tail_ids_bits": [0, 0],
    }


def test_a_top_k_position_stores_the_steps_between_its_log_probabilities():
    arrays = {name: np.zeros(0, np.int64) for name in HAND} | {
        "head_count": np.array([3, 2]),
        "head_ids": np.array([4, 0, 2, 1, 3]),
        "head_values": np.array([5, 12, 12, 0, 7]),
        "tail_count": np.array([0, 0]),
    }
    columns = encode(arrays, method="top_k", parameter=3, ranks=np.arange(5), rows=np.array([0, 2]))
    assert columns["head_values"].tolist() == [5, 7, 0, 0, 7]
    assert columns["head_ids"].tolist() == [4, 0, 2, 1, 3]


def test_no_position_at_all_is_encoded_and_decoded():
    for method, parameter in METHODS:
        empty = {name: np.zeros(0, np.int64) for name in HAND}
        ids_by_rank = np.arange(9, dtype="<u4")
        settings = {"method": method, "parameter": parameter}
        columns = encode(empty, **settings, ranks=invert(ids_by_rank), rows=np.array([0, 0]))
        found = decode(cut(columns, None, row_counts(columns)), **settings, ids_by_rank=ids_by_rank)
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
        ("top_values", [9, 1], "head values sum to 10 at a position, more than the total 8"),
        ("top_values", [2], "top_values holds 1 values where its counts say 2"),
        ("rest_values", [1, 1], "rest_values holds 2 values where its counts say 1"),
        ("head_ids", [2, 7, 6], "head_ids: rank 7, but the vocabulary has 7 ids"),
        ("head_ids", [2, 16, 6], "head_ids: its symbols need 1 bits, and it has 0"),
        ("head_ids", [2, 255, 6], "head_ids: symbol 255 stands for no value"),
        ("tail_ids", [1, 9, 2, 1, 1], "tail_ids: rank 10, but the vocabulary has 7 ids"),
        ("tail_ids", [1, 5, 3], "tail_ids holds 3 values where its counts say 5"),
    ],
)
def test_columns_that_contradict_each_other_are_refused_by_name(name, values, message):
    ids_by_rank = np.arange(7, dtype="<u4")
    columns = encode(HAND, method="threshold", parameter=0.25, ranks=invert(ids_by_rank), rows=np.array([0, 2]))
    parts = cut(columns, None, row_counts(columns))
    parts[name] = np.array(values, parts[name].dtype)
    with pytest.raises(ValueError, match=message):
        decode(parts, method="threshold", parameter=0.25, ids_by_rank=ids_by_rank)
