"""Sparse targets as compact integer columns, and back; numpy only, dicts of arrays at the boundary.

The one decision: store integers of which nothing can be derived from another. A `threshold` position is its head
(ids in descending probability, integer weights) and its tail ids; the number of tail ids and their weight follow from
what the head leaves of the total. Ids are recoded by frequency rank, tails are sorted by rank and delta-coded, so that
byte shuffle and gzip find small numbers. It costs a sort and a cumulative sum for a shard.

Plain arrays ("arrays" below), all int64, for P positions with H head and K tail entries in all:
    head_count (P,), head_ids (H,), head_values (H,), tail_count (P,), tail_ids (K,), tail_values (K,) or (0,)
Columns: the same names, narrow unsigned integers; `threshold` has neither `tail_count` nor `tail_values`, `top_k` no
tail at all.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

Method = Literal["threshold", "top_k", "random"]
Arrays = dict[str, np.ndarray]

LOGPROB_STEPS = 2048  # of a nat: top_k stores -log p in 1/2048 nat, 16 bits, so at most 32 nats (p = 1e-14)
LOGPROB_MAX = 65535
STAT_STEPS = 256  # of a nat: entropies and log-probabilities summed over a sample


def total_weight(threshold: float) -> int:
    """Return M, the integer that a position's weights sum to: the smallest power of two >= 15 / threshold."""
    return 1 << int(np.ceil(np.log2(15 / threshold)))


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


def column_dtypes(method: Method, parameter: float, vocab_size: int) -> dict[str, np.dtype]:
    """Return name and dtype of each target column, wide enough for every value that the settings allow."""
    ids = _unsigned(vocab_size - 1)
    if method == "threshold":
        most = int(1 / parameter) + 2
        return {
            "head_count": _unsigned(most),
            "head_ids": ids,
            "head_values": _unsigned(total_weight(parameter)),
            "tail_ids": ids,
        }
    if method == "top_k":
        return {
            "head_count": _unsigned(int(parameter)),
            "head_ids": ids,
            "head_values": _unsigned(LOGPROB_MAX),
        }
    draws = _unsigned(int(parameter))
    return {
        "head_count": _unsigned(1),
        "head_ids": ids,
        "head_values": draws,
        "tail_count": draws,
        "tail_ids": ids,
        "tail_values": draws,
    }


def encode(arrays: Mapping[str, np.ndarray], *, method: Method, parameter: float, ranks: np.ndarray) -> Arrays:
    """Turn plain arrays into columns; `ranks` (vocab_size,) maps an id to its frequency rank.

    Raises ValueError where a value does not fit its column: nothing wraps.
    """
    plain: Arrays = dict(arrays)
    plain["head_ids"] = ranks[arrays["head_ids"]]
    order, deltas = _sorted_deltas(ranks[arrays["tail_ids"]], arrays["tail_count"], vocab_size=len(ranks))
    plain["tail_ids"] = deltas
    if method == "random":
        plain["tail_values"] = arrays["tail_values"][order]
    dtypes = column_dtypes(method, parameter, len(ranks))
    return {name: narrow(plain[name], dtype, name=name) for name, dtype in dtypes.items()}


def decode(columns: Mapping[str, np.ndarray], *, method: Method, parameter: float, ids_by_rank: np.ndarray) -> Arrays:
    """Turn columns, whole or cut at a position, into plain arrays; tails come in the order of their ranks.

    Raises ValueError, naming the column, where the columns contradict each other or hold an id beyond the vocabulary.
    """
    wide = {name: np.asarray(column).astype(np.int64) for name, column in columns.items()}
    head_count, head_values = wide["head_count"], wide["head_values"]
    if len(head_count) and head_count.min() < 1:
        raise ValueError("head_count is 0 at a position: every position has at least the teacher's top id")
    _expect_length("head_ids", wide["head_ids"], head_count.sum())
    _expect_length("head_values", head_values, head_count.sum())
    none = np.zeros(0, np.int64)
    if method == "threshold":
        tail_count = _derived_tail_count(head_count, head_values, threshold=parameter)
    else:
        tail_count = wide.get("tail_count", np.zeros_like(head_count))
    tail_ranks = _undo_deltas(wide.get("tail_ids", none), tail_count)
    if method == "random":
        _expect_length("tail_values", wide["tail_values"], len(tail_ranks))
    return {
        "head_count": head_count,
        "head_ids": _ids(wide["head_ids"], ids_by_rank, name="head_ids"),
        "head_values": head_values,
        "tail_count": tail_count,
        "tail_ids": _ids(tail_ranks, ids_by_rank, name="tail_ids"),
        "tail_values": wide.get("tail_values", none),
    }


def rank_tokens(counts: np.ndarray) -> np.ndarray:
    """Return the ids (vocab_size,) uint32 in descending count, ties by id: position in it is an id's rank."""
    return np.argsort(-counts.astype(np.int64), kind="stable").astype("<u4")


def invert(ids_by_rank: np.ndarray) -> np.ndarray:
    """Return the rank of each id (vocab_size,) int64, given the ids in order of rank."""
    ranks = np.empty(len(ids_by_rank), np.int64)
    ranks[ids_by_rank] = np.arange(len(ids_by_rank))
    return ranks


def narrow(values: np.ndarray, dtype: np.dtype, *, name: str) -> np.ndarray:
    """Return `values` as the narrow `dtype`; raise ValueError instead of wrapping."""
    if len(values) and (values.min() < 0 or values.max() > np.iinfo(dtype).max):
        found = int(values.min()) if values.min() < 0 else int(values.max())
        raise ValueError(f"column {name}: {found} does not fit {dtype}")
    return values.astype(dtype)


def offsets(counts: np.ndarray) -> np.ndarray:
    """Return (n + 1,) int64: where each of n runs starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _derived_tail_count(head_count: np.ndarray, head_values: np.ndarray, *, threshold: float) -> np.ndarray:
    total = total_weight(threshold)
    if not len(head_count):
        return np.zeros(0, np.int64)
    left = total - np.add.reduceat(head_values, offsets(head_count)[:-1])
    if left.min() < 0:
        raise ValueError(f"head_values sum to {total - int(left.min())} at a position, more than the total {total}")
    return tail_counts(threshold)[left]


def _sorted_deltas(ranks: np.ndarray, counts: np.ndarray, *, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort ranks inside their positions; return the order and the first rank, then differences, of each."""
    position = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(position * vocab_size + ranks, kind="stable")
    ascending = ranks[order]
    deltas = ascending.copy()
    deltas[1:] -= ascending[:-1]
    starts = offsets(counts)[:-1][counts > 0]
    deltas[starts] = ascending[starts]
    return order, deltas


def _undo_deltas(deltas: np.ndarray, counts: np.ndarray) -> np.ndarray:
    _expect_length("tail_ids", deltas, counts.sum())
    sums = np.concatenate([[0], np.cumsum(deltas)])
    return sums[1:] - np.repeat(sums[offsets(counts)[:-1]], counts)


def _ids(ranks: np.ndarray, ids_by_rank: np.ndarray, *, name: str) -> np.ndarray:
    if len(ranks) and ranks.max() >= len(ids_by_rank):
        raise ValueError(f"column {name}: rank {int(ranks.max())}, but the vocabulary has {len(ids_by_rank)} ids")
    return ids_by_rank[ranks].astype(np.int64)


def _expect_length(name: str, column: np.ndarray, expected: int) -> None:
    if len(column) != expected:
        raise ValueError(f"column {name} holds {len(column)} values where its counts say {int(expected)}")


def _unsigned(largest: int) -> np.dtype:
    return np.dtype("u1" if largest < 1 << 8 else "<u2" if largest < 1 << 16 else "<u4")
