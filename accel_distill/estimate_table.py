"""What `accel-distill estimate` found, as a table for people.

The one decision: every figure stands beside the interval that it has, and what was assumed stands below.
"""

from itertools import chain
from typing import Any

from accel_distill.figures import duration, number_of, size
from accel_distill.screen import labelled


def as_text(found: dict[str, Any], *, width: int | None = None) -> str:
    """Return what `estimate` found as a table for people; on a terminal lines are broken before its `width`."""
    low, mid, high = (size(found["total_bytes"][end]) for end in ("low", "mid", "high"))
    length, processes = found["tokens_per_sample"], number_of(found["processes"], "process")
    rows = {
        "targets": f"{found['method']} {found['parameter']:g} of {found['teacher']}",
        "samples": f"{found['samples']:,}, of {length['mid']:,.1f} tokens each ({length['low']:,.1f} to "
        f"{length['high']:,.1f}; {found['counted_samples']:,} counted)",
        "tokens": f"{found['tokens']:,}, of which {found['positions']:,} positions with a target",
    }
    if found["bytes_per_position"] is not None:
        each = found["variable_bytes_per_position"]
        rows["position"] = (
            f"{found['bytes_per_position']:.2f} bytes: {each['mid']:.2f} ({each['low']:.2f} to {each['high']:.2f}) in "
            f"columns, and {found['bytes_per_shard']:,.0f} for each of {number_of(found['shards'], 'shard')}"
        )
        rows["measured"] = _source(found)
    rows["disk"] = f"{mid} ({low} to {high}) in all files of the cache"
    rows["room"] = _room(found)
    if found["seconds"]:
        low, mid, high = (duration(found["seconds"][end]) for end in ("low", "mid", "high"))
        rows["time"] = f"{mid} ({low} to {high}) with {processes}, {found['positions_per_second']:,.0f} positions/s"
    if found["host_bytes_per_process"]:
        device = "" if found["device_bytes"] is None else f", {size(found['device_bytes'])} on {found['device']}"
        rows["memory"] = f"{size(found['host_bytes_per_process'])} a process at most{device}"
    if found["training_bytes_per_second"]:
        read = found["training_bytes_per_second"]["100000_positions_per_second"]
        rows["training"] = f"reads {size(read)}/s for a student that takes 100,000 positions/s"
    rows["verdict"] = _answer(found)
    lines = labelled(rows, at=10, width=width)
    lines += ["", f"the same with    {'bytes/position':>14}  {'disk':>9}  {'low to high':>20}"]
    lines += [_alternative(other) for other in found["alternatives"]]
    assumed = [labelled({"assumed:": sentence}, at=9, width=width) for sentence in found["assumptions"]]
    return "\n".join([*lines, "", *chain.from_iterable(assumed)])


def _alternative(other: dict[str, Any]) -> str:
    low, mid, high = (size(other["total_bytes"][end]) for end in ("low", "mid", "high"))
    each = "-" if other["bytes_per_position"] is None else f"{other['bytes_per_position']:.2f}"
    name = f"{other['method']} {other['parameter']:g}"
    return f"  {name:15}{each:>14}  {mid:>9}  {f'{low} to {high}':>20}  {other['verdict']}"


def _answer(found: dict[str, Any]) -> str:
    if found["largest_max_samples"] is None:
        return found["verdict"]
    return f"{found['verdict']}; dataset.max_samples={found['largest_max_samples']} does"


def _room(found: dict[str, Any]) -> str:
    if found["room_bytes"] is None:
        return "not known: the file system does not tell, and there is no cache.max_bytes"
    parts = []
    if found["free_bytes"] is not None:
        after = f"{size(max(0, found['free_bytes_after']))} after"
        parts.append(f"{size(found['free_bytes'])} free now, {after}, {size(found['reserve_bytes'])} stay free")
    if found["max_bytes"] is not None:
        parts.append(f"cache.max_bytes {size(found['max_bytes'])}")
    there = f"; {size(found['cache_bytes_now'])} of the cache is there" if found["cache_bytes_now"] else ""
    return f"{size(max(0, found['room_bytes']))} ({', '.join(parts)}{there})"


def _source(found: dict[str, Any]) -> str:
    if not found["probed_samples"]:
        return "no: bytes are from stored curves"
    return f"{found['probed_samples']} samples, {found['probed_positions']:,} positions, through the teacher"
