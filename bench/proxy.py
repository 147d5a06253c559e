"""Sparse targets of a file of 20,000 positions, as rows of a cache: what a teacher with a large vocabulary would give.

The one decision: the file's own targets are encoded as they are, though they were made with other rounding. Its head
probabilities become integer weights by systematic rounding, and where these would leave another number of tail ids
than the file has, the top weight moves by the few units that it takes. It costs that no variance can be measured: the
file does not hold the distributions.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from accel_distill.codec import Arrays, offsets, tail_counts, total_weight
from accel_distill.rows import Rows

ROW_TOKENS = 341  # FineWeb's mean: 15 T tokens in 44 G documents


class Proxy(NamedTuple):
    """What the file holds."""

    rows: Rows
    threshold: float
    unigram_counts: np.ndarray  # (vocab_size,) of other text, for the frequency ranks
    promoted: int  # positions whose first tail id became the head that every position has


def read_proxy(path: Path) -> Proxy:
    """Read the file; its positions, dealt into rows of 341 tokens, the last one shorter."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    threshold = float(found["threshold"])
    targets, promoted = _targets(found, threshold)
    positions = len(targets["head_count"])
    starts = np.append(np.arange(0, positions, ROW_TOKENS - 1), positions)
    tokens = starts + np.arange(len(starts))  # a row has one token before its first target's
    mask = np.ones(tokens[-1], bool)
    mask[tokens[1:] - 1] = False
    rows = Rows(
        sample_index=np.arange(len(starts) - 1),
        tokens=tokens,
        positions=starts,
        input_ids=np.insert(found["input_ids"].astype(np.int64), starts[:-1], found["input_ids"][starts[:-1] - 1]),
        target_mask=mask,
        targets=targets,
        entropy=np.zeros(len(starts) - 1),
        logprob=np.zeros(len(starts) - 1),
    )
    return Proxy(rows, threshold, found["unigram_counts"].astype(np.int64), promoted)


def _targets(found: dict[str, np.ndarray], threshold: float) -> tuple[Arrays, int]:
    head_count, tail_count = (found[name].astype(np.int64) for name in ("head_count", "tail_count"))
    heads, tails = offsets(head_count), offsets(tail_count)
    sums = np.append(0.0, np.cumsum(found["head_probs"].astype(np.float64)))
    total, table = total_weight(threshold), tail_counts(threshold)
    rounding = np.random.default_rng(0).random(len(head_count))
    at = np.repeat(np.arange(len(head_count)), head_count)
    upper = np.floor(total * (sums[1:] - sums[heads[at]]) + rounding[at])
    lower = np.floor(total * (sums[:-1] - sums[heads[at]]) + rounding[at])
    values = (upper - lower).astype(np.int64)
    without = head_count == 0
    taken = tails[:-1][without]  # the first tail id of a position without head
    head_ids = np.insert(found["head_ids"].astype(np.int64), heads[:-1][without], found["tail_ids"][taken])
    share = np.maximum(total / np.maximum(tail_count[without], 1), 1)
    values = np.insert(values, heads[:-1][without], share.astype(np.int64))
    head_count, tail_count = head_count + without, tail_count - without
    starts = offsets(head_count)[:-1]
    left = total - np.add.reduceat(values, starts)
    values[starts] += left - _nearest(table, tail_count, left)
    return {
        "head_count": head_count,
        "head_ids": head_ids,
        "head_values": values,
        "tail_count": tail_count,
        "tail_ids": np.delete(found["tail_ids"].astype(np.int64), taken),
        "tail_values": np.zeros(0, np.int64),
    }, int(without.sum())


def _nearest(table: np.ndarray, wanted: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return, for each position, what is left of the total nearest to `left` at which it has `wanted` tail ids."""
    first = np.searchsorted(table, wanted, side="left")
    last = np.searchsorted(table, wanted, side="right") - 1
    return np.clip(left, first, last)
