"""A cache's directory: what is in it, what the cache is, and whether it is complete.

    ranks.bin, tokenizer/, cache.json   published in this order before any work, never changed
    plan.json                           max_samples: the only thing that may grow
    shards/                             see deal.py and shard.py
    manifest.json                       there if and only if every shard is

The one decision: there is no mutable index. What is committed is what `shards/` lists, and each command looks.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel_distill.codec import Method
from accel_distill.deal import Layout, parse_shard_name, shard_name
from accel_distill.errors import CacheMismatch, ConfigError, DamagedCache
from accel_distill.publish import publish, replace, sync_directory
from accel_distill.rows import row_columns
from accel_distill.shard import HEADER_BYTES, ShardHeader, header_sha256, read_header

SUMMED = ("sequences", "tokens", "positions", "empty", "truncated", "untargeted", "nonfinite", "bytes")
MANIFEST_KEYS = {"cache_id", "samples", "stream_end", "shards", "sums"}
SHARD_KEYS = {"name", "header_sha256", "group", "lane", "samples", *SUMMED}
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
    """Make a cache's directories, durably; raise ConfigError where that is not possible."""
    try:
        for directory in (path, path / "shards", scratch(path), path / "logs"):
            directory.mkdir(parents=True, exist_ok=True)
        sync_directory(path)
    except OSError as error:
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
    if publish(canonical_json(content), path / "cache.json", scratch=scratch(path)):
        return record
    return read_record(path)


def read_record(path: Path) -> Record:
    """Read `cache.json` and `ranks.bin`; raise ConfigError where there is no cache, DamagedCache where it is broken."""
    if not (path / "cache.json").is_file():
        what = "is not a directory" if not path.is_dir() else "holds no cache.json, so it is not a cache"
        raise ConfigError(f"cache {path}: it {what}; make one with: accelerate launch -m accel_distill.generate")
    content = _read_json(path / "cache.json")
    try:
        identity, numerics, environment = (content[key] for key in ("identity", "numerics", "environment"))
        expected = identity["layout"]["ranks_sha256"]
    except (KeyError, TypeError) as error:
        raise DamagedCache(
            f"{path / 'cache.json'}: {error} is missing; the cache was not made by this version"
        ) from error
    try:
        raw = (path / "ranks.bin").read_bytes()
    except FileNotFoundError as error:
        raise DamagedCache(f"{path / 'ranks.bin'} is missing; without it no id can be read: generate anew") from error
    if (found := hashlib.sha256(raw).hexdigest()) != expected:
        raise DamagedCache(f"{path / 'ranks.bin'}: sha256 {found}, cache.json says {expected}; generate anew")
    return Record(path, identity, numerics, environment, np.frombuffer(raw, "<u4"))


def committed_shards(record: Record) -> dict[tuple[int, int], ShardHeader]:
    """List and check the shards that are there: (group, lane) to the header of its longest shard.

    Raises DamagedCache for a broken header, CacheMismatch for a shard of another cache.
    """
    found: dict[tuple[int, int], ShardHeader] = {}
    for name in sorted(os.listdir(record.path / "shards")):
        place = parse_shard_name(name)
        if place is None:
            continue
        header = _checked_header(record, record.path / "shards" / name, place)
        best = found.get(place[:2])
        if best is None or best.samples < header.samples:
            found[place[:2]] = header
    return found


def listed_shards(path: Path) -> set[tuple[int, int, int]]:
    """Return (group, lane, samples) of every shard's name in a cache, without opening one."""
    names = (parse_shard_name(name) for name in os.listdir(path / "shards"))
    return {name for name in names if name is not None}


def write_manifest(record: Record, *, total: int, stream_end: str) -> None:
    """Publish the manifest of a complete cache of `total` samples: the same bytes, whoever writes it."""
    shards = []
    for group, lane, samples in record.layout.shards(total):
        path = record.shard_path(group, lane, samples)
        header = _checked_header(record, path, (group, lane, samples))
        shards.append(manifest_entry(path.name, header))
    sums = {key: sum(shard[key] for shard in shards) for key in SUMMED}
    content = {"cache_id": record.cache_id, "samples": total, "stream_end": stream_end, "shards": shards, "sums": sums}
    target = record.path / "manifest.json"
    data = canonical_json(content)
    if not publish(data, target, scratch=scratch(record.path)) and target.read_bytes() != data:
        raise CacheMismatch(f"{target} is there and says something else; is another run writing to this cache?")


def manifest_entry(name: str, header: ShardHeader) -> dict[str, Any]:
    """Return what the manifest says of one shard; the hash of its header stands for the whole file."""
    counts = {key: getattr(header, key) for key in SUMMED if key != "bytes"}
    counts["bytes"] = HEADER_BYTES + header.payload_bytes
    place = {"group": header.group, "lane": header.lane, "samples": header.samples}
    return {"name": name, "header_sha256": header_sha256(header), **place, **counts}


def read_manifest(record: Record) -> dict[str, Any] | None:
    """Return the manifest, or None while the cache is not complete."""
    path = record.path / "manifest.json"
    if not path.is_file():
        return None
    manifest = _read_json(path)
    if manifest.get("cache_id") != record.cache_id:
        raise DamagedCache(f"{path}: it belongs to the cache {manifest.get('cache_id')}, not to {record.cache_id}")
    if set(manifest) != MANIFEST_KEYS or any(set(shard) != SHARD_KEYS for shard in manifest["shards"]):
        raise DamagedCache(f"{path}: it has not the keys of a manifest; delete it and run generate again")
    return manifest


def read_plan(path: Path) -> dict[str, Any] | None:
    """Return what `plan.json` says, None before the first run."""
    if not (path / "plan.json").is_file():
        return None
    plan = _read_json(path / "plan.json")
    if not isinstance(plan.get("max_samples", ""), int | None):
        raise DamagedCache(f"{path / 'plan.json'}: it does not say max_samples; delete it and run generate again")
    return plan


def write_plan(path: Path, *, max_samples: int | None) -> None:
    """Say how many samples the cache is to have."""
    replace(canonical_json({"max_samples": max_samples}), path / "plan.json", scratch=scratch(path))


def withdraw_manifest(path: Path) -> None:
    """Remove the manifest, durably, before a complete cache grows."""
    (path / "manifest.json").unlink(missing_ok=True)
    sync_directory(path)


def remove_superseded(record: Record, total: int) -> list[str]:
    """Delete the short shards of an earlier, smaller plan from a complete cache; return their names."""
    wanted = set(record.layout.shards(total))
    stale = sorted(listed_shards(record.path) - wanted)
    for shard in stale:
        record.shard_path(*shard).unlink(missing_ok=True)
    return [shard_name(*shard) for shard in stale]


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a sentence for each dotted key at which `found` (this run) differs from `expected` (the cache).

    Of a list (a dataset may have thousands of files) only the first difference is told.
    """
    sentences = []
    for key in sorted(set(expected) | set(found)):
        ours, theirs, name = found.get(key), expected.get(key), f"{prefix}{key}"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            sentences += differences(theirs, ours, prefix=f"{name}.")
        elif ours != theirs:
            if isinstance(ours, list) and isinstance(theirs, list):
                pairs = itertools.zip_longest(theirs, ours)
                place, (theirs, ours) = next(pair for pair in enumerate(pairs) if pair[1][0] != pair[1][1])
                name = f"{name}[{place}]"
            sentences.append(f"{name} is {theirs!r} in the cache and {ours!r} in this run")
    return sentences


def _checked_header(record: Record, path: Path, place: tuple[int, int, int]) -> ShardHeader:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedCache(f"{path}: it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedCache(f"{path}: it holds {type(content).__name__}, expected an object")
    return content
