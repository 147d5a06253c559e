"""`accel-distill verify CACHE [--json] [--deep] [--repair]`: whether each file of a cache is what was published.

The one decision: shard after shard, with neither torch nor transformers, and what is wrong with one does not end the
look at the others. `--repair` deletes nothing: what is damaged gets another name, and `generate` makes it again.
"""

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accel_distill.command_line import OneSentenceParser
from accel_distill.deal import parse_shard_name, shard_name
from accel_distill.errors import CacheMismatch, DamagedCache, RunError, exit_with
from accel_distill.manifest import (
    Record,
    drift_sentences,
    drifted,
    is_gone,
    is_outgrown,
    listed_shards,
    read_manifest,
    read_plan,
    read_record,
    shard_directory,
    withdraw_manifest,
)
from accel_distill.publish import sync_directory, told_errors
from accel_distill.shard import HEADER_BYTES, ShardHeader
from accel_distill.shard_checks import check_shard

LINE_EVERY = 30.0  # seconds, where standard error is no terminal
FILES = {"README.txt", "cache.json", "hints.json", "manifest.json", "plan.json", "ranks.bin", "run.yaml"}
DIRECTORIES = {".tmp", "logs", "shards", "tokenizer"}
Problem = dict[str, Any]  # file, what, exit_status; and "repaired" once it is
SUMMED = ("samples", "sequences", "tokens", "positions")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        parser = OneSentenceParser(prog="accel-distill verify", description="Check every file of a cache.")
        parser.add_argument("cache", type=Path, metavar="CACHE", help="the cache's directory")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--deep", action="store_true", help="decode every value, too, and check it")
        parser.add_argument(
            "--repair",
            action="store_true",
            help="rename damaged files to NAME.bad and withdraw the manifest: generate makes just these again",
        )
        arguments = parser.parse_args(argv)
        try:
            found = verify_cache(arguments.cache, deep=arguments.deep, repair=arguments.repair)
        except RunError as error:
            if arguments.json:
                print(json.dumps({"path": str(arguments.cache), "ok": False, "problems": [_problem("", error)]}))
            raise
        print(json.dumps(found, indent=1) if arguments.json else as_text(found))
        return exit_status(found)

    return exit_with(run)


def verify_cache(path: Path, *, deep: bool = False, repair: bool = False) -> dict[str, Any]:
    """Return what is right and wrong with a cache, complete or not.

    Raises ConfigError where there is none, DamagedCache or CacheMismatch where its cache.json or ranks.bin cannot be
    used: without them no shard can be judged.
    """
    record = read_record(path)
    problems: list[Problem] = []
    manifest, plan = (_read(read, name, problems) for name, read in _small_files(record))
    there, notes = listed_shards(path), []
    if manifest and is_outgrown(manifest["samples"], manifest["stream_end"], plan):
        planned = (plan or {}).get("max_samples") or "all"
        notes = [
            f"manifest.json is of {manifest['samples']:,} samples, plan.json of {planned}: not complete for its plan"
        ]
        manifest = None  # what it does not know is no damage
    if manifest:
        gone = {shard["name"] for shard in manifest["shards"]} - {shard_name(*shard) for shard in there}
        problems += [_missing(path / "shards" / name) for name in sorted(gone)]
    sums, headers = _check_shards(record, there, manifest, problems=problems, deep=deep)
    return {
        "path": str(path),
        "cache_id": record.cache_id,
        "deep": deep,
        "ok": not problems,
        "complete": manifest is not None and not problems,
        "expected": _expected(record, manifest, plan),
        **sums,
        "numerics": record.numerics,
        "drift": drifted(headers),
        "notes": notes + _notes(path, _superseded(there)),
        "problems": problems,
        "set_aside": _repair(path, problems) if repair else [],
    }


def _check_shards(
    record: Record,
    there: set[tuple[int, int, int]],
    manifest: dict[str, Any] | None,
    *,
    problems: list[Problem],
    deep: bool,
) -> tuple[dict[str, int], list[ShardHeader]]:
    """Check each shard, adding to `problems`; return the sums and the headers of those that are fine and count."""
    entries = {shard["name"]: shard for shard in manifest["shards"]} if manifest else {}
    superseded = _superseded(there)
    sums, headers = Counter(dict.fromkeys((*SUMMED, "heads", "tails", "bytes", "shards"), 0)), []
    for place in _shown(sorted(there)):
        name = shard_name(*place)
        try:
            if manifest and name not in entries and place not in superseded:
                raise DamagedCache(f"shard {record.shard_path(*place)}: it is not in manifest.json; delete it")
            header, totals = check_shard(record, place, expected=entries.get(name), deep=deep)
        except (DamagedCache, CacheMismatch) as error:
            if isinstance(error, DamagedCache) and is_gone(error) and name not in entries:
                continue  # removed since it was listed: a longer one has replaced it
            problems.append(_problem(f"shards/{name}", error))
            continue
        if place not in superseded:
            headers.append(header)
            sums.update({key: getattr(header, key) for key in SUMMED})
            sums.update(heads=totals["heads"], tails=totals["tails"], shards=1)
            sums["bytes"] += HEADER_BYTES + header.payload_bytes
    return dict(sums), headers


def exit_status(found: dict[str, Any]) -> int:
    """Return 0 where a cache is fine (complete or not) or was repaired, 6 for damage, 5 for another cache's shards."""
    left = [problem for problem in found["problems"] if not problem.get("repaired")]
    statuses = {problem["exit_status"] for problem in left}
    return DamagedCache.exit_status if DamagedCache.exit_status in statuses else max(statuses, default=0)


def as_text(found: dict[str, Any]) -> str:
    """Return what `verify_cache` found as lines for people."""
    problems, expected = found["problems"], found["expected"]
    lines = [problem["what"] for problem in problems]
    lines += [f"note: {note}" for note in [*found["notes"], *drift_sentences(found["drift"])]]
    lines += [f"moved aside: {name}" for name in found["set_aside"]]
    of = f" of {'' if found['complete'] else 'at most '}{expected['shards']:,}" if expected else ""
    how = "every value decoded and checked" if found["deep"] else "headers, hashes and counts checked (all: --deep)"
    lines.append(f"{found['path']}: {_state(found)}")
    lines.append(f"{found['shards']:,}{of} shards are as published, with {found['samples']:,} samples; {how}")
    lines.append(
        f"{len(problems):,} {'problem' if len(problems) == 1 else 'problems'}" if problems else "no problem found"
    )
    return "\n".join(lines)


def _state(found: dict[str, Any]) -> str:
    """Say in what state a cache is, and what to do."""
    if found["complete"]:
        return "complete"
    if found["ok"]:
        return "NOT complete: run the same generate command, which makes what is missing"
    if exit_status(found) == 0:
        return "repaired: run the same generate command, which makes just what is missing now"
    return "DAMAGED: see above; --repair moves aside what generate can make again"


def set_aside(path: Path) -> str:
    """Give a file the name NAME.bad, or NAME.bad2 and so on, durably, and never that of a file that is there.

    Raises DiskGuard for a full or read-only disk, RunError where it may not be renamed.
    """
    with told_errors(path, "it was to be renamed"):
        for number in itertools.count(1):
            target = path.with_name(f"{path.name}.bad{number if number > 1 else ''}")
            if os.path.lexists(target):
                continue
            try:
                os.link(path, target, follow_symlinks=False)
            except FileExistsError:
                continue
            except OSError:  # a directory, or a file system without hard links
                os.rename(path, target)
            else:
                path.unlink()
            sync_directory(path.parent)
            return target.name
    raise AssertionError("counted to the end of all numbers")


def _repair(path: Path, problems: list[Problem]) -> list[str]:
    """Withdraw the manifest, then move aside what is damaged; mark the problems that are done with."""
    if problems and (path / "manifest.json").is_file():
        withdraw_manifest(path)
    moved = []
    for problem in problems:
        file = path / problem["file"]
        if problem["file"] and os.path.lexists(file):
            moved.append(f"{problem['file']} -> {set_aside(file)}")
        problem["repaired"] = True
    return moved


def _small_files(record: Record) -> Iterator[tuple[str, Any]]:
    yield "manifest.json", lambda: read_manifest(record)
    yield "plan.json", lambda: read_plan(record.path)


def _read(read: Any, name: str, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        return read()
    except DamagedCache as error:
        problems.append(_problem(name, error))
        return None


def _problem(file: str, error: RunError) -> Problem:
    return {"file": file, "what": str(error), "exit_status": error.exit_status}


def _missing(path: Path) -> Problem:
    what = f"shard {path}: it is in manifest.json and not there; run generate again, which makes just it anew"
    return {"file": f"shards/{path.name}", "what": what, "exit_status": DamagedCache.exit_status}


def _superseded(there: set[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    """Return the shards of which there is a longer one of the same place: a cache that grew removes them at the end."""
    longest = {shard[:2]: shard[2] for shard in sorted(there)}
    return {shard for shard in there if longest[shard[:2]] > shard[2]}


def _expected(record: Record, manifest: dict[str, Any] | None, plan: dict[str, Any] | None) -> dict[str, int] | None:
    """Return how many samples and shards a complete cache has, or has at most; None where nothing says it."""
    samples = manifest["samples"] if manifest else (plan or {}).get("max_samples")
    if samples is None:
        return None
    full, rest = divmod(samples, record.layout.group_samples)
    return {"samples": samples, "shards": full * record.layout.lanes + min(rest, record.layout.lanes)}


def _notes(path: Path, superseded: set[tuple[int, int, int]]) -> list[str]:
    notes = [f"shards/{shard_name(*shard)} is superseded by a longer one" for shard in sorted(superseded)]
    for name in shard_directory(path):
        if parse_shard_name(name) is None:
            what = "was moved aside by --repair" if ".bad" in name else "is no shard"
            notes.append(f"shards/{name} {what}: it is not read")
    known = {**dict.fromkeys(FILES, os.path.isfile), **dict.fromkeys(DIRECTORIES, os.path.isdir)}
    for name in sorted(os.listdir(path)):
        if name not in known or not known[name](path / name):
            notes.append(f"{name} does not belong to a cache: it is not read")
    if not any((path / "tokenizer").glob("*")):
        notes.append("tokenizer/ is missing or empty: train needs it; copy it from the teacher")
    return notes


def _shown(places: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield the places, and say on standard error how far it is."""
    places = list(places)
    terminal, said = sys.stderr.isatty(), time.monotonic()
    for number, place in enumerate(tqdm(places, unit=" shards", disable=not terminal, leave=False)):
        if not terminal and time.monotonic() - said >= LINE_EVERY:
            said = time.monotonic()
            print(f"{number:,} of {len(places):,} shards checked", file=sys.stderr, flush=True)
        yield place
