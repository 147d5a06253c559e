"""Sparse targets as compact integer columns, and back; numpy only, dicts of arrays at the boundary.

The one decision: store integers of which nothing can be derived from another. A `threshold` position is its head
(ids in descending probability, integer weights) and its tail ids; the number of tail ids and their weight follow from
what the head leaves of the total. Ids are recoded by frequency rank, tails are sorted by rank and delta-coded, and both
are packed as symbols and bits (packing.py). It costs a sort and a cumulative sum for a shard.

Plain arrays ("arrays" below), integers, for P positions with H head and K tail entries in all:
    head_count (P,), head_ids (H,), head_values (H,), tail_count (P,), tail_ids (K,), tail_values (K,) or (0,)
Columns: unsigned bytes and words, for P positions in n rows:
    head_ids (H,), tail_ids (K,), top_k's head_values (H,)  symbols, each with its bit stream `*_bits`
    head_count (P,); top_values (P,) and rest_values (H - P,): the first head value of each position, and the others
    row_positions, row_heads, row_tails, row_*_bits (n,)    how much of each belongs to a row
`threshold` has neither `tail_count` nor `tail_values`, `top_k` no tail at all.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from accel_distill.packing import Bits, pack, unpack

Method = Literal["threshold", "top_k", "random"]
Arrays = dict[str, np.ndarray]
Column = np.ndarray | Bits

LOGPROB_STEPS = 2048  # of a nat: top_k stores -log p in 1/2048 nat, 16 bits, so at most 32 nats (p = 1e-14)
LOGPROB_MAX = 65535
STAT_STEPS = 256  # of a nat: entropies and log-probabilities summed over a sample

# What a column has one element for; a position's first head value is in `top_values`, so `rest` are the heads but one.
COUNTED_BY = {
    "head_count": "positions",
    "head_ids": "heads",
    "head_values": "heads",
    "top_values": "positions",
    "rest_values": "rest",
    "tail_count": "positions",
    "tail_ids": "tails",
    "tail_values": "tails",
    "input_ids": "tokens",
}
PACKED: dict[Method, tuple[str, ...]] = {
    "threshold": ("head_ids", "tail_ids"),
    "top_k": ("head_ids", "head_values"),
    "random": ("head_ids", "tail_ids"),
}


def total_weight(threshold: float) -> int:
    """Return M, the integer that a position's weights sum to: the smallest power of two >= 1.5 / threshold."""
    return 1 << int(np.ceil(np.log2(1.5 / threshold)))


def weight_scale(method: Method, parameter: float) -> int:
    """Return what one unit of a stored value is a fraction of: M, the number of draws, or steps of a nat."""
    if method == "threshold":
        return total_weight(parameter)
    return int(parameter) if method == "random" else LOGPROB_STEPS


@functools.lru_cache(maxsize=16)
def tail_counts(threshold: float) -> np.ndarray:
    """Return the table (M + 1,) int64: how many tail ids a position has whose head leaves R of the total M.

    One table serves sampler and reader, so that they cannot round differently.
    """
    total = total_weight(threshold)
    left = np.arange(total + 1, dtype=np.float64)
    counts = np.maximum(np.floor((left - 1) / (total * threshold)), 1).astype(np.int64)
    counts[0] = 0
    counts.setflags(write=False)
    return counts


def column_dtypes(method: Method, parameter: float) -> dict[str, np.dtype]:
    """Return name and dtype of each target column, wide enough for every value that the settings allow."""
    dtypes: dict[str, np.dtype] = {name: np.dtype("<u4") for name in ("row_positions", "row_heads", "row_tails")}
    if method == "threshold":
        dtypes["head_count"] = _unsigned(int(1 / parameter) + 2)
        dtypes["top_values"] = dtypes["rest_values"] = _unsigned(total_weight(parameter))
    elif method == "top_k":
        dtypes["head_count"] = _unsigned(int(parameter))
    else:
        dtypes["head_count"] = _unsigned(1)
        dtypes["top_values"] = dtypes["rest_values"] = _unsigned(int(parameter))
        dtypes["tail_count"] = dtypes["tail_values"] = _unsigned(int(parameter))
    for name in PACKED[method]:
        dtypes |= {name: np.dtype("u1"), f"{name}_bits": np.dtype("u1"), f"row_{name}_bits": np.dtype("<u4")}
    return dtypes


def encode(
    arrays: Mapping[str, np.ndarray], *, method: Method, parameter: float, ranks: np.ndarray, rows: np.ndarray
) -> Arrays:
    """Turn plain arrays into columns.

    `ranks` (vocab_size,) maps an id to its frequency rank; `rows` (n + 1,) are the positions at which rows start, and
    where the last one ends. Raises ValueError where a value does not fit its column: nothing wraps.
    """
    heads, tails = offsets(arrays["head_count"]), offsets(arrays["tail_count"])
    plain: Arrays = {"head_count": arrays["head_count"], "row_positions": np.diff(rows)}
    plain["row_heads"], plain["row_tails"] = np.diff(heads[rows]), np.diff(tails[rows])
    plain["head_ids"] = ranks[arrays["head_ids"]]
    order, plain["tail_ids"] = _sorted_deltas(ranks[arrays["tail_ids"]], arrays["tail_count"], vocab_size=len(ranks))
    if method == "top_k":
        plain["head_values"] = _deltas(arrays["head_values"], arrays["head_count"])
    else:
        is_top = _is_first(arrays["head_count"])
        plain["top_values"], plain["rest_values"] = arrays["head_values"][is_top], arrays["head_values"][~is_top]
    if method == "random":
        plain["tail_count"], plain["tail_values"] = arrays["tail_count"], arrays["tail_values"][order]
    for name in PACKED[method]:
        ends = (heads if name.startswith("head") else tails)[rows]
        plain |= pack_column(plain[name], ends, name=name)
    dtypes = column_dtypes(method, parameter)
    return {name: narrow(plain[name], dtype, name=name) for name, dtype in dtypes.items()}


def decode(columns: Mapping[str, Column], *, method: Method, parameter: float, ids_by_rank: np.ndarray) -> Arrays:
    """Turn the columns of whole rows into plain arrays (int64, ids int32); tails come in the order of their ranks.

    `columns` holds `Bits` for each bit stream; row columns are not needed. Raises ValueError, naming the column, where
    the columns contradict each other or hold an id beyond the vocabulary.
    """
    head_count = columns["head_count"].astype(np.int64)  # type: ignore[union-attr]
    if len(head_count) and head_count.min() < 1:
        raise ValueError("head_count is 0 at a position: every position has at least the teacher's top id")
    found = {name: unpack_column(columns, name) for name in PACKED[method]}
    expect_length("head_ids", found["head_ids"], head_count.sum())
    none = np.zeros(0, np.int64)
    if method == "top_k":
        expect_length("head_values", found["head_values"], head_count.sum())
        head_values = _undo_deltas(found["head_values"], head_count)
    else:
        head_values = _joined(columns["top_values"], columns["rest_values"], head_count)  # type: ignore[arg-type]
    tail_count, tail_values = np.zeros_like(head_count), none
    if method == "threshold":
        tail_count = _derived_tail_count(head_count, head_values, threshold=parameter)
    elif method == "random":
        tail_count, tail_values = (columns[name].astype(np.int64) for name in ("tail_count", "tail_values"))  # type: ignore[union-attr]
        expect_length("tail_count", tail_count, len(head_count))
        expect_length("tail_values", tail_values, tail_count.sum())
    tail_deltas = found.get("tail_ids", none)
    expect_length("tail_ids", tail_deltas, tail_count.sum())
    return {
        "head_count": head_count,
        "head_ids": ids_of_ranks(found["head_ids"], ids_by_rank, name="head_ids"),
        "head_values": head_values,
        "tail_count": tail_count,
        "tail_ids": ids_of_ranks(_undo_deltas(tail_deltas, tail_count), ids_by_rank, name="tail_ids"),
        "tail_values": tail_values,
    }


def pack_column(values: np.ndarray, rows: np.ndarray, *, name: str) -> Arrays:
    """Return a packed column: its symbols, its bit stream, and the bits of each row; `rows` (n + 1,) cuts `values`."""
    symbols, stream, width = pack(values, name=name)
    return {name: symbols, f"{name}_bits": stream, f"row_{name}_bits": np.diff(offsets(width)[rows])}


def unpack_column(columns: Mapping[str, Column], name: str) -> np.ndarray:
    """Return the values (n,) int64 of a packed column."""
    return unpack(columns[name], columns[f"{name}_bits"], name=name)  # type: ignore[arg-type]


def rank_tokens(counts: np.ndarray) -> np.ndarray:
    """Return the ids (vocab_size,) uint32 in descending count, ties by id: position in it is an id's rank."""
    return np.argsort(-counts.astype(np.int64), kind="stable").astype("<u4")


def invert(ids_by_rank: np.ndarray) -> np.ndarray:
    """Return the rank of each id (vocab_size,) int64, given the ids in order of rank."""
    ranks = np.empty(len(ids_by_rank), np.int64)
    ranks[ids_by_rank] = np.arange(len(ids_by_rank))
    return ranks


def ids_of_ranks(ranks: np.ndarray, ids_by_rank: np.ndarray, *, name: str) -> np.ndarray:
    """Return the ids (n,) int32 of ranks; raise ValueError for a rank beyond the vocabulary."""
    if len(ranks) and ranks.max() >= len(ids_by_rank):
        raise ValueError(f"column {name}: rank {int(ranks.max())}, but the vocabulary has {len(ids_by_rank)} ids")
    return ids_by_rank[ranks].astype(np.int32)


def narrow(values: np.ndarray, dtype: np.dtype, *, name: str) -> np.ndarray:
    """Return `values` as the narrow `dtype`; raise ValueError instead of wrapping."""
    if len(values) and (values.min() < 0 or values.max() > np.iinfo(dtype).max):
        found = int(values.min()) if values.min() < 0 else int(values.max())
        raise ValueError(f"column {name}: {found} does not fit {dtype}")
    return values.astype(dtype)


def offsets(counts: np.ndarray) -> np.ndarray:
    """Return (n + 1,) int64: where each of n runs starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def expect_length(name: str, column: np.ndarray, expected: int) -> None:
    """Raise ValueError where a column has not as many values as the counts of others say."""
    if len(column) != expected:
        raise ValueError(f"column {name} holds {len(column)} values where its counts say {int(expected)}")


def _derived_tail_count(head_count: np.ndarray, head_values: np.ndarray, *, threshold: float) -> np.ndarray:
    total = total_weight(threshold)
    if not len(head_count):
        return np.zeros(0, np.int64)
    left = total - np.add.reduceat(head_values, offsets(head_count)[:-1])
    if left.min() < 0:
        raise ValueError(f"head values sum to {total - int(left.min())} at a position, more than the total {total}")
    return tail_counts(threshold)[left]


def _is_first(counts: np.ndarray) -> np.ndarray:
    """Return for each element of runs of `counts` (each at least 1) whether it is the first of its run."""
    first = np.zeros(int(counts.sum()), bool)
    first[offsets(counts)[:-1]] = True
    return first


def _joined(top: np.ndarray, rest: np.ndarray, head_count: np.ndarray) -> np.ndarray:
    """Put the first value of each position before its others."""
    expect_length("top_values", top, len(head_count))
    expect_length("rest_values", rest, head_count.sum() - len(head_count))
    is_top = _is_first(head_count)
    values = np.empty(len(is_top), np.int64)
    values[is_top], values[~is_top] = top, rest
    return values


def _sorted_deltas(ranks: np.ndarray, counts: np.ndarray, *, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort ranks inside their positions; return the order and the first rank, then differences, of each."""
    position = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(position * vocab_size + ranks, kind="stable")
    return order, _deltas(ranks[order], counts)


def _deltas(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the first value, then differences, of each run of values."""
    deltas = values.copy()
    deltas[1:] -= values[:-1]
    starts = offsets(counts)[:-1][counts > 0]
    deltas[starts] = values[starts]
    return deltas


def _undo_deltas(deltas: np.ndarray, counts: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(deltas)])
    return sums[1:] - np.repeat(sums[offsets(counts)[:-1]], counts)


def _unsigned(largest: int) -> np.dtype:
    return np.dtype("u1" if largest < 1 << 8 else "<u2" if largest < 1 << 16 else "<u4")
