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

ROW_TOKENS = 341  # half of FineWeb's mean: what rows and shards cost is not understated


class Proxy(NamedTuple):
    """What the file holds."""

    rows: Rows
    threshold: float
    unigram_counts: np.ndarray  # (vocab_size,) of other text, for the frequency ranks
    moved_weight: float  # mean share of the weight that was moved so that the numbers of tail ids agree


def read_proxy(path: Path) -> Proxy:
    """Read the file; its positions, dealt into rows of 341 tokens, the last one shorter."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    threshold = float(found["threshold"])
    targets, moved = _targets(found, threshold)
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
    return Proxy(rows, threshold, found["unigram_counts"].astype(np.int64), moved)


def _targets(found: dict[str, np.ndarray], threshold: float) -> tuple[Arrays, float]:
    """Return the targets as the codec takes them, and the mean share of the weight that was moved."""
    head_count, tail_count = (found[name].astype(np.int64) for name in ("head_count", "tail_count"))
    head_ids, tail_ids = (found[name].astype(np.int64) for name in ("head_ids", "tail_ids"))
    probabilities = found["head_probs"].astype(np.float64)
    without = head_count == 0  # every position has a head here: its first tail id, at an equal share
    heads, tails = offsets(head_count)[:-1][without], offsets(tail_count)[:-1][without]
    head_ids = np.insert(head_ids, heads, tail_ids[tails])
    probabilities = np.insert(probabilities, heads, 1 / tail_count[without])
    tail_ids = np.delete(tail_ids, tails)
    head_count, tail_count = head_count + without, tail_count - without
    values = _rounded(probabilities, head_count, total=total_weight(threshold))
    starts = offsets(head_count)[:-1]
    left = total_weight(threshold) - np.add.reduceat(values, starts)
    moved = left - _nearest(tail_counts(threshold), tail_count, left)
    values[starts] += moved
    targets = {
        "head_count": head_count,
        "head_ids": head_ids,
        "head_values": values,
        "tail_count": tail_count,
        "tail_ids": tail_ids,
        "tail_values": np.zeros(0, np.int64),
    }
    return targets, float(np.abs(moved).mean()) / total_weight(threshold)


def _rounded(probabilities: np.ndarray, counts: np.ndarray, *, total: int) -> np.ndarray:
    """Round each position's probabilities to integers, systematically, as the sampler does."""
    starts = offsets(counts)
    sums = np.append(0.0, np.cumsum(probabilities))
    before = np.repeat(sums[starts[:-1]], counts)
    rounding = np.repeat(np.random.default_rng(0).random(len(counts)), counts)
    upper, lower = (np.floor(total * np.maximum(part - before, 0) + rounding) for part in (sums[1:], sums[:-1]))
    return (upper - lower).astype(np.int64)


def _nearest(table: np.ndarray, wanted: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return, for each position, what is left of the total nearest to `left` at which it has `wanted` tail ids."""
    first = np.searchsorted(table, wanted, side="left")
    last = np.searchsorted(table, wanted, side="right") - 1
    return np.clip(left, first, last)
