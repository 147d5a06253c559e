"""What the positions of a cache look like: ids, mass of the head, entropy and lengths, as means and histograms.

The one decision: a few shards, spread over the cache, are decoded and stand for all; it takes seconds, also for a cache
of a terabyte. Neither torch nor transformers is needed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from accel_distill.codec import LOGPROB_STEPS, Arrays, Method, offsets, weight_scale
from accel_distill.manifest import Record
from accel_distill.rows import RowReader, Rows

MOST_SHARDS = 8  # decoded
BLOCK_ROWS = 256
BINS = 12
TITLES = {  # of what is measured, in the order in which it is shown
    "head_ids": "head ids a position",
    "tail_ids": "tail ids a position",
    "head_mass": "mass of the head",
    "entropy": "entropy, nats (by sample)",
    "tokens": "tokens a sample",
}
RAMP = " ▁▂▃▄▅▆▇█"
PLAIN_RAMP = " .:-=+*%#"  # for terminals that cannot show the other one


def measure_positions(record: Record, places: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return mean and histogram of each of `TITLES`, over a few of the shards at `places`; empty without positions.

    A histogram is `edges` (bins + 1) and `counts` (bins).
    """
    chosen = spread(places, most=MOST_SHARDS)
    parts: list[dict[str, np.ndarray]] = []
    for place in chosen:
        reader = RowReader(
            record.shard_path(*place),
            method=record.method,
            parameter=record.parameter,
            ids_by_rank=record.ids_by_rank,
        )
        try:
            for first in range(0, len(reader), BLOCK_ROWS):
                rows = reader.read(first, min(first + BLOCK_ROWS, len(reader)))
                parts.append(_measured(rows, method=record.method, parameter=record.parameter))
        finally:
            reader.close()
    joined = {name: np.concatenate([part[name] for part in parts]) for name in TITLES} if parts else {}
    found = {name: _histogram(values, whole=name != "head_mass") for name, values in joined.items() if len(values)}
    return {"of_shards": len(chosen), **found} if len(found) == len(TITLES) else {}


def spread(places: Sequence[tuple[int, int, int]], *, most: int) -> list[tuple[int, int, int]]:
    """Return at most so many of the places, from the first to the last."""
    return [places[number] for number in np.unique(np.linspace(0, len(places) - 1, most).astype(int)) if places]


def as_lines(found: dict[str, Any], *, shards: int, ramp: str = RAMP) -> list[str]:
    """Return the histograms as lines for people: title, mean, bars, and the range that the bars cover."""
    if not found:
        return []
    of = "" if found["of_shards"] == shards else f", from {found['of_shards']} of {shards:,} shards"
    lines = [f"{'':27}{'mean':>9}  distribution{of}"]
    for name, title in TITLES.items():
        edges, counts = found[name]["edges"], np.array(found[name]["counts"])
        bars = "".join(ramp[height] for height in np.ceil(counts / counts.max() * (len(ramp) - 1)).astype(int))
        lines.append(f"{title:27}{found[name]['mean']:9.2f}  {bars}  {edges[0]:g} to {edges[-1]:g}")
    return lines


def _measured(rows: Rows, *, method: Method, parameter: float) -> dict[str, np.ndarray]:
    """Return the values of each of `TITLES` of some rows."""
    targets, positions = rows.targets, np.diff(rows.positions)
    has_target = positions > 0
    return {
        "head_ids": targets["head_count"],
        "tail_ids": targets["tail_count"],
        "head_mass": _head_mass(targets, method=method, parameter=parameter),
        "entropy": rows.entropy[has_target] / positions[has_target],
        "tokens": np.diff(rows.tokens),
    }


def _head_mass(targets: Arrays, *, method: Method, parameter: float) -> np.ndarray:
    """Return the probability that the head ids of each position have together, (P,)."""
    values = targets["head_values"]
    weights = np.exp(values / -LOGPROB_STEPS) if method == "top_k" else values / weight_scale(method, parameter)
    starts = offsets(targets["head_count"])[:-1]
    return np.add.reduceat(weights, starts) if len(starts) else np.zeros(0)


def _histogram(values: np.ndarray, *, whole: bool) -> dict[str, Any]:
    """Count the values in bins of equal width from 0; the last edge is the largest value, or 1 for a share."""
    top = float(np.ceil(values.max())) if whole else 1.0
    counts, edges = np.histogram(values, bins=BINS, range=(0.0, max(top, 1.0)))
    return {"mean": float(values.mean()), "edges": edges.tolist(), "counts": counts.tolist()}
