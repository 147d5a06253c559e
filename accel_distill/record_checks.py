"""What `cache.json`, `ranks.bin`, `plan.json` and `manifest.json` must hold before anything is computed from it.

The one decision: only what a reader uses is checked here, by type and range; that it is what a run asks for is
compared by name elsewhere. Every function raises ValueError with what was found and what was expected.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accel_distill.deal import Layout, shard_name
from accel_distill.errors import CacheMismatch
from accel_distill.shard import FORMAT

LARGEST = 2**40  # of any count
SUMMED = ("sequences", "tokens", "positions", "empty", "truncated", "untargeted", "nonfinite", "bytes")
MANIFEST_KEYS = {"cache_id", "samples", "stream_end", "shards", "sums"}
SHARD_KEYS = {"name", "header_sha256", "group", "lane", "samples", *SUMMED}
PARAMETERS: dict[str, Callable[[float], bool]] = {
    "threshold": lambda threshold: 1e-7 <= threshold < 1,
    "top_k": lambda k: k.is_integer() and 1 <= k <= 65_535,
    "random": lambda draws: draws.is_integer() and 1 <= draws <= 65_535,
}
Check = tuple[str, Callable[[Any], bool]]


def whole(least: int, most: int) -> Check:
    """Return what is expected of a whole number, and whether a value is it."""
    return f"a whole number from {least:,} to {most:,}", lambda value: type(value) is int and least <= value <= most


IS_SHA256: Check = (
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
)
IS_NUMBER: Check = ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
IS_TEXT: Check = ("text", lambda value: isinstance(value, str))
IS_FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
IDENTITY: dict[str, Check] = {
    "teacher.dtype": IS_TEXT,
    "dataset.name": IS_TEXT,
    "dataset.config_name": ("text or null", lambda value: value is None or isinstance(value, str)),
    "dataset.split": IS_TEXT,
    "dataset.text_column": IS_TEXT,
    "sequence.long_documents": ("truncate or split", lambda value: value in ("truncate", "split")),
    "sequence.add_special_tokens": IS_FLAG,
    "sequence.append_eos": IS_FLAG,
    "targets.seed": whole(0, 2**63 - 1),
    "teacher.vocab_size": whole(1, 2**28),
    "tokenizer.size": whole(1, 2**28),
    "sequence.max_length": whole(1, 2**31),
    "targets.method": (f"one of {', '.join(PARAMETERS)}", lambda value: isinstance(value, str) and value in PARAMETERS),
    "targets.parameter": IS_NUMBER,
    "targets.temperature": IS_NUMBER,
    "layout.lanes": whole(1, 1000),
    "layout.samples_per_shard": whole(1, 10**6),
    "layout.ranks_sha256": IS_SHA256,
}


def check_format(identity: Mapping[str, Any], *, of: Path) -> None:
    """Raise CacheMismatch for the cache of a version with another format."""
    found = identity.get("format")
    if not whole(1, LARGEST)[1](found):
        raise ValueError(f"identity.format is {found!r:.80}, expected {FORMAT}")
    if found != FORMAT:
        raise CacheMismatch(
            f"cache {of}: format is {found} in the cache and {FORMAT} in this version of accel_distill; use the "
            "version that made it, or name another cache.path and generate anew"
        )


def check_identity(identity: Mapping[str, Any]) -> None:
    """Check the keys of an identity from which shards are read."""
    for name, (expected, is_right) in IDENTITY.items():
        section, key = name.split(".")
        values = identity.get(section)
        found = values.get(key) if isinstance(values, dict) else None
        if not is_right(found):
            raise ValueError(f"identity.{name} is {found!r:.80}, expected {expected}")
    method, parameter = identity["targets"]["method"], identity["targets"]["parameter"]
    if not PARAMETERS[method](float(parameter)):
        raise ValueError(f"identity.targets.parameter is {parameter!r}, which {method} cannot have")


def check_ranks(ids_by_rank: np.ndarray, *, vocab_size: int) -> None:
    """Check that every id has one rank."""
    if not np.array_equal(np.sort(ids_by_rank), np.arange(vocab_size)):
        raise ValueError("it does not hold each id of the vocabulary once")


def check_plan(plan: Mapping[str, Any]) -> None:
    """Check that a plan says how many samples there are to be."""
    found = plan.get("max_samples", "")
    if found is not None and not whole(1, LARGEST)[1](found):
        raise ValueError(f"it does not say max_samples, which is {found!r:.80}")


def check_manifest(manifest: Mapping[str, Any], layout: Layout) -> None:
    """Check that a manifest lists each shard of its samples once, in order, and that its sums are theirs."""
    if set(manifest) != MANIFEST_KEYS or not isinstance(manifest["shards"], list):
        raise ValueError("it has not the keys of a manifest")
    if manifest["stream_end"] not in ("cap", "exhausted"):
        raise ValueError(f"its stream_end is {manifest['stream_end']!r:.80}, expected cap or exhausted")
    _expect_counts(manifest, ("samples",), "")
    _expect_counts(manifest["sums"], SUMMED, "sums.")
    shards = manifest["shards"]
    for number, shard in enumerate(shards):
        if not isinstance(shard, dict) or set(shard) != SHARD_KEYS:
            raise ValueError(f"its shards[{number}] has not the keys of a shard")
        _expect_counts(shard, (*SUMMED, "group", "lane", "samples"), f"shards[{number}].")
        if shard["name"] != shard_name(shard["group"], shard["lane"], shard["samples"]):
            raise ValueError(f"its shards[{number}] is named {shard['name']!r:.80}, which is not its place")
        if not IS_SHA256[1](shard["header_sha256"]):
            raise ValueError(f"its shards[{number}].header_sha256 is {shard['header_sha256']!r:.80}")
    places = [(shard["group"], shard["lane"], shard["samples"]) for shard in shards]
    if places != list(itertools.islice(layout.shards(manifest["samples"]), len(shards) + 1)):
        raise ValueError(f"its {len(shards):,} shards are not those of {manifest['samples']:,} samples")
    for key in SUMMED:
        if (found := manifest["sums"][key]) != (total := sum(shard[key] for shard in shards)):
            raise ValueError(f"its sums.{key} is {found:,}, and its shards have {total:,}")


def _expect_counts(values: object, keys: tuple[str, ...], place: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"its {place or 'content'} is {values!r:.80}, expected an object")
    expected, is_right = whole(0, LARGEST)
    for key in keys:
        if not is_right(values.get(key)):
            raise ValueError(f"its {place}{key} is {values.get(key)!r:.80}, expected {expected}")
