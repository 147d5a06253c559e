"""`accel-distill inspect CACHE [--json]`: what a cache is and what it holds.

The one decision: counts and bytes are of the whole cache, from headers and the lengths of columns; what takes decoding
is measured on a few shards (histograms.py). It needs neither torch nor transformers, and costs a hash of every shard
(about 1 GB/s). A shard that is damaged is an error instead of figures that leave it out; `verify` lists all of them.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_distill.command_line import OneSentenceParser
from accel_distill.errors import DamagedCache, exit_with
from accel_distill.histograms import PLAIN_RAMP, RAMP, as_lines, measure_positions, spread
from accel_distill.manifest import (
    Record,
    committed_shards,
    drift_sentences,
    drifted,
    read_complete,
    read_plan,
    read_record,
)
from accel_distill.rows import RowReader
from accel_distill.screen import labelled, terminal_width
from accel_distill.shard import HEADER_BYTES

COUNTS = ("samples", "sequences", "tokens", "positions", "empty", "truncated", "untargeted", "nonfinite")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        parser = OneSentenceParser(prog="accel-distill inspect", description="Say what a cache is and what it holds.")
        parser.add_argument("cache", type=Path, metavar="CACHE", help="the cache's directory")
        parser.add_argument("--json", action="store_true", help="print JSON")
        arguments = parser.parse_args(argv)
        found = inspect_cache(arguments.cache)
        ramp = RAMP if (sys.stdout.encoding or "").lower().startswith("utf") else PLAIN_RAMP
        print(
            json.dumps(found, indent=1)
            if arguments.json
            else as_text(found, ramp=ramp, width=terminal_width(sys.stdout))
        )
        return 0

    return exit_with(run)


def inspect_cache(path: Path, *, most_shards: int | None = None) -> dict[str, Any]:
    """Return what a cache is and holds; complete or not. Raises ConfigError, DamagedCache or CacheMismatch.

    With `most_shards`, ids and bytes by column are those of so many shards, spread over the cache: no other is read
    beyond its header.
    """
    record = read_record(path)
    manifest, plan = read_complete(record), read_plan(path)
    headers = committed_shards(record)
    if manifest:  # a longer run may have left short shards of the same place behind; the manifest counts
        wanted = {(shard["group"], shard["lane"]): shard["name"] for shard in manifest["shards"]}
        if gone := [name for place, name in wanted.items() if place not in headers]:
            raise DamagedCache(
                f"cache {path}: the manifest says complete, but of its {len(wanted)} shards {len(gone)} "
                f"cannot be found, the first is {gone[0]}; run the same generate command again, which makes what is "
                "missing"
            )
        headers = {place: headers[place] for place in wanted}
    totals = {name: sum(getattr(header, name) for header in headers.values()) for name in COUNTS}
    size = sum(HEADER_BYTES + header.payload_bytes for header in headers.values())
    places = [(header.group, header.lane, header.samples) for header in headers.values()]
    measured, positions = spread(places, most=most_shards or len(places)), totals["positions"]
    counts, stored = _measure_columns(record, measured)
    share = sum(headers[place[:2]].positions for place in measured) / max(positions, 1) or 1.0
    heads, tails = counts["heads"] / share, counts["tails"] / share
    return {
        "path": str(path),
        "complete": manifest is not None,
        "max_samples": plan["max_samples"] if plan else None,
        "stream_end": manifest["stream_end"] if manifest else None,
        **totals,
        "shards": len(headers),
        "bytes": size,
        "bytes_per_position": size / positions if positions else None,
        "ids_per_position": (heads + tails) / positions if positions else None,
        "head_ids_per_position": heads / positions if positions else None,
        "tail_ids_per_position": tails / positions if positions else None,
        "bytes_by_column": {name: round(size / share) for name, size in stored.items()},
        "distributions": measure_positions(record, places),
        "method": record.method,
        "parameter": record.parameter,
        "temperature": record.identity["targets"]["temperature"],
        "vocab_size": record.vocab_size,
        "lanes": record.layout.lanes,
        "samples_per_shard": record.layout.samples_per_shard,
        "cache_id": record.cache_id,
        "identity": record.identity,
        "numerics": record.numerics,
        "drift": drifted(headers.values()),
        "environment": record.environment,
    }


def as_text(found: dict[str, Any], *, ramp: str = RAMP, width: int | None = None) -> str:
    """Return what `inspect_cache` found as lines for people; bars are drawn with the characters of `ramp`.

    On a terminal lines are broken before its `width`.
    """
    state = "complete" if found["complete"] else "NOT complete: run the same generate command again"
    cap = "no sample cap" if found["max_samples"] is None else f"max_samples {found['max_samples']:,}"
    teacher, dataset = found["identity"]["teacher"], found["identity"]["dataset"]
    per_position = "no position yet"
    if found["positions"]:
        per_position = (
            f"{found['bytes_per_position']:.2f} bytes and {found['ids_per_position']:.2f} ids a position "
            f"({found['head_ids_per_position']:.2f} head, {found['tail_ids_per_position']:.2f} tail)"
        )
    rows = {
        "cache": f"{found['path']} ({state})",
        "teacher": f"{teacher.get('name', 'local files')}, {teacher['dtype']}, vocabulary {found['vocab_size']:,}",
        "dataset": f"{dataset['name']} {dataset['config_name'] or ''} ({dataset['split']}), {cap}".replace("  ", " "),
        "targets": f"{found['method']} {found['parameter']:g}, temperature {found['temperature']:g}",
        "samples": f"{found['samples']:,} ({found['empty']:,} empty, {found['truncated']:,} cut at max_length)",
        "tokens": f"{found['tokens']:,}, of which {found['positions']:,} positions carry a target",
        "size": f"{found['bytes']:,} bytes in {_count(found['shards'], 'shard')}; {per_position}",
        "layout": f"{_count(found['lanes'], 'lane')}, {_count(found['samples_per_shard'], 'sample')} a shard",
        "identity": found["cache_id"],
    }
    lines = labelled(rows, at=9, width=width)
    for sentence in drift_sentences(found["drift"]):
        lines += labelled({"drift": sentence}, at=9, width=width)
    if found["positions"]:
        kinds = ", ".join(f"{kind} {size:.2f}" for kind, size in bytes_by_kind(found).items())
        lines += [
            "",
            f"bytes a position: {kinds}",
            *as_lines(found["distributions"], shards=found["shards"], ramp=ramp),
        ]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def _measure_columns(record: Record, places: Sequence[tuple[int, int, int]]) -> tuple[Counter[str], Counter[str]]:
    """Return how many heads, tails and so on the shards hold, and the bytes of each column, without decoding them."""
    counts, stored = Counter(heads=0, tails=0), Counter(dict.fromkeys(record.dtypes, 0))
    for place in places:
        path = record.shard_path(*place)
        reader = RowReader(path, method=record.method, parameter=record.parameter, ids_by_rank=record.ids_by_rank)
        try:
            counts.update(reader.totals())
            stored.update(reader.stored_bytes())
        finally:
            reader.close()
    return counts, stored


def bytes_by_kind(found: dict[str, Any]) -> dict[str, float]:
    """Return what the bytes of a position are spent on."""
    kinds = {
        "ids": ("head_ids", "tail_ids"),
        "weights": ("head_count", "values", "tail_count"),
        "input_ids": ("input",),
    }
    sizes = dict.fromkeys([*kinds, "all else"], 0.0)
    for name, size in found["bytes_by_column"].items():
        kind = next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), None)
        if kind:
            sizes[kind] += size / found["positions"]
    sizes["all else"] = found["bytes_per_position"] - sum(sizes.values())
    return sizes
