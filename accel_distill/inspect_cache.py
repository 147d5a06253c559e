"""`accel-distill inspect CACHE [--json]`: what a cache is and what it holds, from its small files and shard headers.

The one decision: no column is decoded, only headers and the lengths of columns are used, with neither torch nor
transformers. It costs a hash of every shard (about 1 GB/s): what is damaged is said and not counted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_distill.command_line import OneSentenceParser
from accel_distill.errors import DamagedCache, exit_with
from accel_distill.manifest import Record, committed_shards, read_manifest, read_plan, read_record
from accel_distill.shard import HEADER_BYTES, ShardFile

COUNTS = ("samples", "sequences", "tokens", "positions", "empty", "truncated", "untargeted", "nonfinite")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        parser = OneSentenceParser(prog="accel-distill inspect", description="Say what a cache is and what it holds.")
        parser.add_argument("cache", type=Path, metavar="CACHE", help="the cache's directory")
        parser.add_argument("--json", action="store_true", help="print JSON")
        arguments = parser.parse_args(argv)
        found = inspect_cache(arguments.cache)
        print(json.dumps(found, indent=1) if arguments.json else as_text(found))
        return 0

    return exit_with(run)


def inspect_cache(path: Path) -> dict[str, Any]:
    """Return what a cache is and holds; complete or not. Raises ConfigError, DamagedCache or CacheMismatch."""
    record = read_record(path)
    manifest, plan = read_manifest(record), read_plan(path)
    headers = committed_shards(record)
    if manifest:  # a longer run may have left short shards of the same place behind; the manifest counts
        wanted = [(shard["group"], shard["lane"]) for shard in manifest["shards"]]
        if gone := [place for place in wanted if place not in headers]:
            raise DamagedCache(
                f"cache {path}: the manifest says complete, but {len(gone)} of {len(wanted)} shards are gone (the "
                f"first: group {gone[0][0]}, lane {gone[0][1]}); run the same generate command "
                "again, which makes them anew"
            )
        headers = {place: headers[place] for place in wanted}
    totals = {name: sum(getattr(header, name) for header in headers.values()) for name in COUNTS}
    size = sum(HEADER_BYTES + header.payload_bytes for header in headers.values())
    places = [(header.group, header.lane, header.samples) for header in headers.values()]
    heads, tails = _count_ids(record, places)
    positions = totals["positions"]
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
        "method": record.method,
        "parameter": record.parameter,
        "temperature": record.identity["targets"]["temperature"],
        "vocab_size": record.vocab_size,
        "lanes": record.layout.lanes,
        "samples_per_shard": record.layout.samples_per_shard,
        "cache_id": record.cache_id,
        "identity": record.identity,
        "numerics": record.numerics,
        "environment": record.environment,
    }


def as_text(found: dict[str, Any]) -> str:
    """Return what `inspect_cache` found as lines for people."""
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
        "size": f"{found['bytes']:,} bytes in {found['shards']:,} shards; {per_position}",
        "layout": f"{found['lanes']} lanes, {found['samples_per_shard']:,} samples a shard",
        "identity": found["cache_id"],
    }
    return "\n".join(f"{name:9}{value}" for name, value in rows.items())


def _count_ids(record: Record, places: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Return how many head and tail ids the shards hold, from the lengths of their columns."""
    heads = tails = 0
    for place in places:
        shard = ShardFile(record.shard_path(*place), dtypes=record.dtypes)
        try:
            heads += shard.length("head_ids")
            tails += shard.length("tail_ids") if "tail_ids" in record.dtypes else 0
        finally:
            shard.close()
    return heads, tails
