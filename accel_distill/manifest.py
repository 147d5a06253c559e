"""A cache's directory: what is in it, what the cache is, and whether it is complete.

    ranks.bin, tokenizer/, cache.json   published in this order before any work, never changed
    plan.json                           max_samples: the only thing that may grow
    shards/                             see deal.py and shard.py
    manifest.json                       there if and only if every shard is

The one decision: there is no mutable index. What is committed is what `shards/` lists, and each command looks.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel_distill.codec import Method
from accel_distill.deal import Layout, parse_shard_name, shard_name
from accel_distill.errors import TO_GO_ON, CacheMismatch, ConfigError, DamagedCache, DiskGuard
from accel_distill.publish import publish, replace, sync_directory, told_errors
from accel_distill.record_checks import SUMMED, check_format, check_identity, check_manifest, check_plan, check_ranks
from accel_distill.regular_file import MEBIBYTE, parse_json_object, read_regular
from accel_distill.rows import row_columns
from accel_distill.shard import HEADER_BYTES, ShardHeader, header_sha256, read_header

# Bytes that the small files may have: cache.json lists the dataset's files, manifest.json takes some 450 a shard.
LARGEST_RECORD = 16 * MEBIBYTE
LARGEST_PLAN = 1 << 16
LARGEST_MANIFEST, A_SHARD_MORE = MEBIBYTE, 1024
README = """A cache of teacher distributions, made by accel_distill.

cache.json says what it was made from, shards/ holds it (HDF5 behind a 4096-byte header), manifest.json appears when
it is complete. Look: accel-distill inspect {path}
Go on with an interrupted run: the same generate command again. To read it: accel_distill.TeacherCache("{path}").
"""


@dataclass(frozen=True)
class Record:
    """What `cache.json` and `ranks.bin` say: everything that is needed to read a shard."""

    path: Path
    identity: dict[str, Any]
    numerics: dict[str, Any]
    environment: dict[str, Any]
    ids_by_rank: np.ndarray  # (vocab_size,) uint32
    drift: str = ""  # JSON of this run's numeric settings that are not `numerics`; its shards keep it in their header

    @property
    def cache_id(self) -> str:
        """The sha256 of the identity."""
        return cache_id(self.identity)

    @property
    def layout(self) -> Layout:
        """How the stream is cut into shards."""
        return Layout(self.identity["layout"]["lanes"], self.identity["layout"]["samples_per_shard"])

    @property
    def method(self) -> Method:
        """The targets' method."""
        return self.identity["targets"]["method"]

    @property
    def parameter(self) -> float:
        """The threshold, k, or the number of draws."""
        return self.identity["targets"]["parameter"]

    @property
    def vocab_size(self) -> int:
        """The width of the teacher's output layer."""
        return self.identity["teacher"]["vocab_size"]

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Name and dtype of every column of a shard."""
        return row_columns(self.method, self.parameter)

    def shard_path(self, group: int, lane: int, samples: int) -> Path:
        """Return where a shard is or would be."""
        return self.path / "shards" / shard_name(group, lane, samples)


def canonical_json(value: object) -> bytes:
    """Return deterministic, readable JSON."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def cache_id(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of an identity."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def scratch(path: Path) -> Path:
    """Return the directory for temporary files of a cache."""
    return path / ".tmp"


def make_directories(path: Path) -> None:
    """Make a cache's directories, durably; raise DiskGuard for a full disk, ConfigError where it is not possible."""
    try:
        for directory in (path, path / "shards", scratch(path), path / "logs"):
            directory.mkdir(parents=True, exist_ok=True)
        sync_directory(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskGuard(f"cache.path: {path} cannot be made ({error.strerror}); make room, {TO_GO_ON}") from error
        raise ConfigError(
            f"cache.path: {path} cannot be made ({error.strerror}); name a directory to write to"
        ) from error


def create(record: Record) -> Record:
    """Write `ranks.bin`, publish `cache.json`; return what is there where another run was first.

    Before `cache.json` nothing counts: what a run left that died here, perhaps with other settings, is overwritten.
    """
    path = record.path
    if (path / "cache.json").is_file():
        return read_record(path)
    replace(record.ids_by_rank.astype("<u4").tobytes(), path / "ranks.bin", scratch=scratch(path))
    replace(README.format(path=path.name).encode(), path / "README.txt", scratch=scratch(path))
    content = {"identity": record.identity, "numerics": record.numerics, "environment": record.environment}
    data = canonical_json(content)
    if len(data) > LARGEST_RECORD:
        raise ConfigError(
            f"dataset: the list of its files takes {len(data):,} bytes, more than the {LARGEST_RECORD:,} of a "
            "cache.json; name fewer, larger files in dataset.data_files"
        )
    if publish(data, path / "cache.json", scratch=scratch(path)):
        return record
    return read_record(path)


def read_record(path: Path) -> Record:
    """Read `cache.json` and `ranks.bin`; raise ConfigError where there is no cache, DamagedCache where it is broken."""
    if not os.path.lexists(path / "cache.json"):
        what = "is not a directory" if not path.is_dir() else "holds no cache.json, so it is not a cache"
        raise ConfigError(
            f"cache {path}: it {what}; make one with: accelerate launch -m accel_distill.generate --config FILE"
        )
    with _damage(path / "cache.json", "copy it from where the cache was made, or generate anew under another path"):
        content = parse_json_object(read_regular(path / "cache.json", limit=LARGEST_RECORD))
        for key in ("identity", "numerics", "environment"):
            if not isinstance(content.get(key), dict):
                raise ValueError(f"its {key!r} is missing or no object; the cache was not made by this version")
        check_format(content["identity"], of=path)
        check_identity(content["identity"])
    identity = content["identity"]
    vocab_size, expected = identity["teacher"]["vocab_size"], identity["layout"]["ranks_sha256"]
    with _damage(path / "ranks.bin", "without it no id can be read: copy it from where the cache was made"):
        raw = read_regular(path / "ranks.bin", limit=4 * vocab_size)
        if (found := hashlib.sha256(raw).hexdigest()) != expected:
            raise ValueError(f"sha256 {found}, cache.json says {expected}")
        if len(raw) != 4 * vocab_size:
            raise ValueError(f"it has {len(raw):,} bytes, expected 4 for each of {vocab_size:,} ids")
        ids_by_rank = np.frombuffer(raw, "<u4")
        check_ranks(ids_by_rank, vocab_size=vocab_size)
    return Record(path, identity, content["numerics"], content["environment"], ids_by_rank)


def committed_shards(record: Record) -> dict[tuple[int, int], ShardHeader]:
    """List and check the shards that are there: (group, lane) to the header of its longest shard.

    One that another run removes between the two, since a longer one replaces it, is not there.
    Raises DamagedCache for a broken header, CacheMismatch for a shard of another cache.
    """
    found: dict[tuple[int, int], ShardHeader] = {}
    for place in sorted(listed_shards(record.path)):
        try:
            header = checked_header(record, record.shard_path(*place), place)
        except DamagedCache as error:
            if is_gone(error):
                continue
            raise
        best = found.get(place[:2])
        if best is None or best.samples < header.samples:
            found[place[:2]] = header
    return found


def is_gone(error: DamagedCache) -> bool:
    """Whether a file could not be read because it is not there: listed, and then removed by another run."""
    return isinstance(error.__cause__, FileNotFoundError)


def settled_shards(record: Record) -> list[dict[str, Any]]:
    """Return what a manifest would say of the shards of an incomplete cache, but for those that a longer one replaces.

    A short shard is the last of its lane if the plan says so; otherwise a larger plan is being carried out.
    """
    cap = (read_plan(record.path) or {}).get("max_samples")
    entries = []
    for (group, lane), header in committed_shards(record).items():
        last = record.layout.samples_in(group, lane, cap) if cap is not None else None
        if header.samples in (record.layout.samples_per_shard, last):
            entries.append(manifest_entry(shard_name(group, lane, header.samples), header))
    return entries


def drifted(headers: Iterable[ShardHeader]) -> list[dict[str, Any]]:
    """Return how many shards were made with which numeric settings that are not the cache's."""
    counts = Counter(header.numerics for header in headers if header.numerics)
    return [{"shards": number, "numerics": json.loads(said)} for said, number in sorted(counts.items())]


def drift_sentences(drift: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for people for each entry of `drifted`."""
    return [
        f"{entry['shards']:,} shards were made with other numeric settings: "
        + ", ".join(f"{name} {value}" for name, value in sorted(entry["numerics"].items()))
        for entry in drift
    ]


def listed_shards(path: Path) -> set[tuple[int, int, int]]:
    """Return (group, lane, samples) of every shard's name in a cache, without opening one."""
    return {place for name in shard_directory(path) if (place := parse_shard_name(name)) is not None}


def shard_directory(path: Path) -> list[str]:
    """Return the names of all that is in a cache's `shards`, sorted; raise DamagedCache where that is no directory."""
    try:
        return sorted(os.listdir(path / "shards"))
    except OSError as error:
        raise DamagedCache(
            f"{path / 'shards'}: it cannot be listed ({error.strerror}); bring it back, or make it and generate anew"
        ) from error


def write_manifest(record: Record, *, total: int, stream_end: str) -> dict[str, Any]:
    """Publish the manifest of a complete cache of `total` samples, and return it: the same bytes, whoever writes it."""
    shards = []
    for group, lane, samples in record.layout.shards(total):
        path = record.shard_path(group, lane, samples)
        header = checked_header(record, path, (group, lane, samples))
        shards.append(manifest_entry(path.name, header))
    sums = {key: sum(shard[key] for shard in shards) for key in SUMMED}
    content = {"cache_id": record.cache_id, "samples": total, "stream_end": stream_end, "shards": shards, "sums": sums}
    target = record.path / "manifest.json"
    data = canonical_json(content)
    if not publish(data, target, scratch=scratch(record.path)) and target.read_bytes() != data:
        raise CacheMismatch(f"{target} is there and says something else; is another run writing to this cache?")
    return content


def manifest_entry(name: str, header: ShardHeader) -> dict[str, Any]:
    """Return what the manifest says of one shard; the hash of its header stands for the whole file."""
    counts = {key: getattr(header, key) for key in SUMMED if key != "bytes"}
    counts["bytes"] = HEADER_BYTES + header.payload_bytes
    place = {"group": header.group, "lane": header.lane, "samples": header.samples}
    return {"name": name, "header_sha256": header_sha256(header), **place, **counts}


def read_manifest(record: Record) -> dict[str, Any] | None:
    """Return the manifest, or None while the cache is not complete."""
    path = record.path / "manifest.json"
    if not os.path.lexists(path):
        return None
    with _damage(path, "delete it and run generate again, which writes it anew"):
        limit = LARGEST_MANIFEST + A_SHARD_MORE * len(listed_shards(record.path))
        manifest = parse_json_object(read_regular(path, limit=limit))
        if (found := manifest.get("cache_id")) != record.cache_id:
            raise ValueError(f"it belongs to the cache {found!r:.80}, not to {record.cache_id}")
        check_manifest(manifest, record.layout)
    return manifest


def read_plan(path: Path) -> dict[str, Any] | None:
    """Return what `plan.json` says, None before the first run."""
    if not os.path.lexists(path / "plan.json"):
        return None
    with _damage(path / "plan.json", "delete it and run generate again, which writes it anew"):
        plan = parse_json_object(read_regular(path / "plan.json", limit=LARGEST_PLAN))
        check_plan(plan)
    return plan


def write_plan(path: Path, *, max_samples: int | None) -> None:
    """Say how many samples the cache is to have."""
    replace(canonical_json({"max_samples": max_samples}), path / "plan.json", scratch=scratch(path))


def is_outgrown(samples: int, stream_end: str | None, plan: Mapping[str, Any] | None) -> bool:
    """Whether a cache of so many samples, which ended at a cap, is less than its plan: one that grew meanwhile."""
    if plan is None or stream_end != "cap":
        return False
    return plan["max_samples"] is None or samples < plan["max_samples"]


def read_complete(record: Record) -> dict[str, Any] | None:
    """Return the manifest of a cache that has all of its plan, None while it has not."""
    manifest = read_manifest(record)
    if manifest and is_outgrown(manifest["samples"], manifest["stream_end"], read_plan(record.path)):
        return None
    return manifest


def withdraw_manifest(path: Path) -> None:
    """Remove the manifest, durably, before a complete cache grows. Raises as `publish` for the disk."""
    with told_errors(path / "manifest.json", "it was to be removed"):
        (path / "manifest.json").unlink(missing_ok=True)
        sync_directory(path)


def remove_superseded(record: Record, total: int) -> list[str]:
    """Delete the short shards that a longer one of a complete cache of `total` samples replaces; return their names.

    Nothing else goes: what is longer, or further on, belongs to a run that lets the cache grow meanwhile.
    """
    there = listed_shards(record.path)
    wanted = {shard[:2]: shard[2] for shard in record.layout.shards(total) if shard in there}
    stale = sorted(shard for shard in there if shard[2] < wanted.get(shard[:2], 0))
    with told_errors(record.path / "shards", "shards that longer ones replace were to be removed"):
        for shard in stale:
            record.shard_path(*shard).unlink(missing_ok=True)
    return [shard_name(*shard) for shard in stale]


def differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "", *, where: str = "the cache"
) -> list[str]:
    """Return a sentence for each dotted key at which `found` (this run) differs from `expected` (`where`).

    Of a list (a dataset may have thousands of files) only the first difference is told.
    """
    sentences = []
    for key in sorted(set(expected) | set(found)):
        ours, theirs, name = found.get(key), expected.get(key), f"{prefix}{key}"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            sentences += differences(theirs, ours, prefix=f"{name}.", where=where)
        elif ours != theirs:
            if isinstance(ours, list) and isinstance(theirs, list):
                pairs = itertools.zip_longest(theirs, ours)
                place, (theirs, ours) = next(pair for pair in enumerate(pairs) if pair[1][0] != pair[1][1])
                name = f"{name}[{place}]"
            sentences.append(f"{name} is {theirs!r} in {where} and {ours!r} in this run")
    return sentences


def checked_header(record: Record, path: Path, place: tuple[int, int, int]) -> ShardHeader:
    """Return the header of the shard of a place; raise CacheMismatch for another cache's, DamagedCache otherwise."""
    header = read_header(path)
    if header.cache_id != record.cache_id:
        raise CacheMismatch(
            f"shard {path}: it belongs to the cache {header.cache_id[:12]}, this one is {record.cache_id[:12]}; "
            "move it away and run generate again"
        )
    if (header.group, header.lane, header.samples) != place:
        raise DamagedCache(
            f"shard {path}: it says group {header.group}, lane {header.lane}, {header.samples} samples, which is not "
            "its name; delete it and run generate again"
        )
    return header


@contextlib.contextmanager
def _damage(path: Path, advice: str) -> Iterator[None]:
    """Turn what is wrong with a small file into DamagedCache."""
    try:
        yield
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DamagedCache(f"{path} {reason}; {advice}") from error
    except ValueError as error:
        raise DamagedCache(f"{path}: {error}; {advice}") from error
