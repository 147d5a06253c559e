"""What a cache is made from, as `cache.json` says it, and the opening of a cache for a run.

The one decision: everything that changes a stored number is in `identity` or in `numerics`, and a difference is refused
by name; library versions and the device's name are `environment`, and a difference is said. World size, paths, the
sample cap and all of training are in none of them.
"""

import hashlib
import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accel_distill import __version__
from accel_distill.codec import Method, rank_tokens, weight_scale
from accel_distill.config import RunConfig, TeacherConfig
from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.manifest import (
    Record,
    create,
    differences,
    listed_shards,
    make_directories,
    read_manifest,
    read_plan,
    read_record,
    scratch,
    withdraw_manifest,
    write_plan,
)
from accel_distill.publish import remove_stale, replace, told_errors
from accel_distill.shard import CHUNK, FORMAT, GZIP_LEVEL
from accel_distill.stream import TextStream, file_sha256
from accel_distill.teacher import load_teacher_config
from accel_distill.tokens import SequenceRule, load_tokenizer, tokenizer_identity
from accel_distill.uniforms import VERSION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

RANKED_TOKENS = 1_000_000  # of the stream, counted for the frequency ranks of the ids
RANKED_AT_ONCE = 64  # texts
MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.py")
OTHER_VERSION = "this version of accel_distill writes it so: use the version that began the cache"
# What to do about a difference whose key, as the run file writes it, begins so; anything else can be set back.
ADVICE = {
    "teacher.files": "the teacher's files changed: bring those back that the cache was made from",
    "teacher.commit": "set teacher.revision to the cache's commit",
    "teacher.name": "set teacher.model back",
    "teacher.vocab_size": "the teacher's config.json changed: bring it back",
    "tokenizer.": "the teacher's tokenizer changed: bring back its files, or set teacher.revision",
    "dataset.data_files": "bring back the files that the cache was made from, in their order",
    "dataset.source.": "set dataset.revision and dataset.data_files as they were",
    "layout.": OTHER_VERSION,
    "format": OTHER_VERSION,
    "targets.scale": OTHER_VERSION,
    "targets.uniforms": OTHER_VERSION,
}
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "h5py", "numpy")


@dataclass(frozen=True)
class Opening:
    """A cache, opened or made, for one run."""

    record: Record
    notes: list[str]  # what the user should hear


def open_for_generation(
    config: RunConfig, *, world_size: int, device: torch.device, allow_numerics_drift: bool = False
) -> Opening:
    """Open the run's cache, or make its directory; for one process, before any other looks.

    With `allow_numerics_drift` other numeric settings than the cache's are no mismatch: the record's `drift` says them.

    Raises ConfigError for a dataset, teacher or tokenizer that does not fit, CacheMismatch for a cache of other
    settings.
    """
    path = Path(config.cache.path)
    stream = TextStream(config.dataset)
    model = load_teacher_config(config.teacher)
    tokenizer = load_tokenizer(
        config.teacher.model, revision=config.teacher.revision, trust_remote_code=config.teacher.trust_remote_code
    )
    check_length(config, model.get_text_config())
    identity = _identity(config, stream, model, tokenizer)
    numerics = {
        "tokens_per_batch": config.teacher.tokens_per_batch,
        "head_chunk": config.teacher.head_chunk,
        "attn_implementation": config.teacher.attn_implementation,
        "device": device.type,
    }
    make_directories(path)
    if (path / "cache.json").is_file():
        try:
            record, notes = _reopen(config, identity, numerics, allow_numerics_drift=allow_numerics_drift)
        except CacheMismatch:
            if listed_shards(path):
                raise
            with told_errors(path, "the record of the earlier settings was to be removed"):
                for name in ("plan.json", "cache.json"):
                    (path / name).unlink(missing_ok=True)
            record = _make(config, identity, numerics, stream, tokenizer, world_size)
            notes = ["no shard was made with the earlier settings yet: the cache begins anew"]
    else:
        record, notes = _make(config, identity, numerics, stream, tokenizer, world_size), []
    remove_stale(scratch(path))
    return Opening(record, notes + _update_plan(config, record))


def _identity(
    config: RunConfig, stream: TextStream, model: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Return the identity but for the layout, which depends on whether the cache is there."""
    targets = config.targets
    return {
        "format": FORMAT,
        "teacher": teacher_identity(config.teacher, model),
        "tokenizer": tokenizer_identity(tokenizer),
        "dataset": dataset_identity(config, stream),
        "sequence": asdict(SequenceRule.of(config.dataset)),
        "targets": {
            "method": targets.method,
            "parameter": float(targets.parameter),
            "scale": weight_scale(targets.sampled, targets.parameter),
            "temperature": float(targets.temperature),
            "seed": targets.seed,
            "uniforms": VERSION,
        },
    }


def _reopen(
    config: RunConfig, identity: dict[str, Any], numerics: dict[str, Any], *, allow_numerics_drift: bool
) -> tuple[Record, list[str]]:
    """Compare an existing cache with this run; its lanes are the run's, where the run does not say."""
    path = Path(config.cache.path)
    record = read_record(path)
    layout = record.identity["layout"]
    lanes = config.cache.lanes or layout["lanes"]
    identity["layout"] = _layout_identity(config, lanes=lanes, ranks_sha256=layout["ranks_sha256"])
    changed = [
        _as_written(sentence, method=config.targets.sampled) for sentence in differences(record.identity, identity)
    ]
    drifted = [
        _as_written(sentence, method=config.targets.sampled) for sentence in differences(record.numerics, numerics)
    ]
    if changed or (drifted and not (allow_numerics_drift and listed_shards(path))):
        raise CacheMismatch(_refusal(path, changed, drifted))
    notes = []
    if drifted:
        record = replace_fields(record, drift=drift(record.numerics, numerics))
        notes = [f"the shards of this run differ in rounding from the others, and say so: {'; '.join(drifted)}"]
    if elsewhere := differences(record.environment, _environment()):
        notes.append(f"the cache was begun in another environment: {'; '.join(elsewhere)}")
    return record, notes


def drift(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the numeric settings that are others now, as the JSON that a shard keeps."""
    changed = {name: value for name, value in now.items() if before.get(name) != value}
    return json.dumps(changed, sort_keys=True, separators=(",", ":"))


def _refusal(path: Path, changed: list[str], drifted: list[str]) -> str:
    """Say what differs, and what to do about each of it; not what only follows from another difference."""
    if not all(sentence.startswith("targets.scale") for sentence in changed):
        changed = [sentence for sentence in changed if not sentence.startswith("targets.scale")]
    asked = [f"{sentence} ({_advice(sentence)})" for sentence in changed]
    asked += [f"{sentence} (set it back)" for sentence in drifted]
    also = ""
    if drifted and not changed:
        also = "; or say --allow-numerics-drift: the shards to come then differ in rounding, and each of them says so"
    return f"cache {path} was made with other settings: {'; '.join(asked)}. Or name another cache.path{also}"


def _advice(difference: str) -> str:
    """Return what to do about one difference of the identity."""
    for start, advice in ADVICE.items():
        if difference.startswith(start):
            return advice
    return "set it back"


def _as_written(difference: str, *, method: Method) -> str:
    """Name a setting of the identity as the run file does."""
    parameter = {"threshold": "threshold", "top_k": "top_k", "random": "draws"}[method]
    for ours, written in (
        ("sequence.", "dataset."),
        ("layout.lanes ", "cache.lanes "),
        ("layout.samples_per_shard ", "cache.samples_per_shard "),
        ("targets.parameter ", f"targets.{parameter} "),
        ("dataset.source.files", "dataset.data_files"),
        ("tokens_per_batch ", "teacher.tokens_per_batch "),
        ("head_chunk ", "teacher.head_chunk "),
        ("attn_implementation ", "teacher.attn_implementation "),
    ):
        if difference.startswith(ours):
            return written + difference.removeprefix(ours)
    return difference


def _make(
    config: RunConfig,
    identity: dict[str, Any],
    numerics: dict[str, Any],
    stream: TextStream,
    tokenizer: "PreTrainedTokenizerBase",
    world_size: int,
) -> Record:
    vocab_size = identity["teacher"]["vocab_size"]
    ids_by_rank = rank_tokens(_count_tokens(stream, SequenceRule.of(config.dataset), tokenizer, vocab_size))
    ranks_sha256 = hashlib.sha256(ids_by_rank.tobytes()).hexdigest()
    lanes = config.cache.lanes or world_size
    identity["layout"] = _layout_identity(config, lanes=lanes, ranks_sha256=ranks_sha256)
    _save_tokenizer(tokenizer, Path(config.cache.path))
    record = create(Record(Path(config.cache.path), identity, numerics, _environment(), ids_by_rank))
    if found := differences(record.identity, identity):
        raise CacheMismatch(f"another run made cache {record.path} meanwhile: {'; '.join(found)}")
    return record


def _count_tokens(
    stream: TextStream, rule: SequenceRule, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> np.ndarray:
    """Count ids over the stream's first tokens, past the sample cap: so that a cache may grow and stay the same."""
    counts, counted, texts = np.zeros(vocab_size, np.int64), 0, iter(stream)
    while counted < RANKED_TOKENS and (part := list(itertools.islice(texts, RANKED_AT_ONCE))):
        rows, _ = rule.sequences(part, range(len(part)), tokenizer=tokenizer)
        ids = np.concatenate([row.ids for row in rows])
        known = ids[ids < vocab_size][: RANKED_TOKENS - counted]
        counts += np.bincount(known, minlength=vocab_size)
        counted += len(known)
    return counts


def _update_plan(config: RunConfig, record: Record) -> list[str]:
    """Take up the run's max_samples: the same as before, or more."""
    wanted, plan, manifest = config.dataset.max_samples, read_plan(record.path), read_manifest(record)
    if plan is None:
        write_plan(record.path, max_samples=wanted)
        return []
    before = plan["max_samples"]
    if wanted == before:
        return []
    shrinks = before is None or (wanted is not None and wanted < before)
    if shrinks and listed_shards(record.path):
        raise CacheMismatch(
            f"dataset.max_samples is {wanted}, but cache {record.path} was begun with {before or 'no limit'}, and a "
            "cache only grows; set it back, or name another cache.path"
        )
    if manifest and manifest["stream_end"] == "exhausted":
        raise CacheMismatch(
            f"dataset.max_samples is {wanted}, but the dataset ended after {manifest['samples']} samples, all of which "
            f"cache {record.path} has; set it back to {before}"
        )
    if manifest:
        withdraw_manifest(record.path)
    write_plan(record.path, max_samples=wanted)
    return [f"the cache {'shrinks' if shrinks else 'grows'} from max_samples {before} to {wanted or 'no limit'}"]


def pinned(config: RunConfig, *, teacher: Mapping[str, Any], source: Mapping[str, Any]) -> RunConfig:
    """Name the hub commits that rank 0 found, so that a push while the ranks start cannot mix two of them.

    `teacher` and `source` are the identity's: of the teacher, and of the dataset.
    """
    sections: dict[str, Any] = {}
    if commit := teacher.get("commit"):
        sections["teacher"] = config.teacher.model_copy(update={"revision": commit})
    commit = source.get("commit")
    if commit and "," not in commit and config.dataset.data_files is None:
        sections["dataset"] = config.dataset.model_copy(update={"revision": commit})
    return config.model_copy(update=sections)


def check_length(config: RunConfig, text: "PretrainedConfig") -> None:
    """Raise ConfigError where the teacher was made for shorter samples."""
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and 0 < positions < config.dataset.max_length:
        raise ConfigError(
            f"dataset.max_length is {config.dataset.max_length}, but the teacher {config.teacher.model} has "
            f"max_position_embeddings {positions}; set dataset.max_length={positions} or less"
        )


def teacher_identity(teacher: TeacherConfig, model: "PretrainedConfig") -> dict[str, Any]:
    """Return what identifies a teacher: for local files their hashes, which takes reading them."""
    path = Path(teacher.model)
    dtype = str(getattr(model, "dtype", None) or "float32") if teacher.dtype == "auto" else teacher.dtype
    described = {
        "dtype": dtype.removeprefix("torch."),
        "quantization": teacher.quantization,
        "vocab_size": model.get_text_config().vocab_size,
    }
    if path.is_dir():
        files = sorted(file for pattern in MODEL_FILES for file in path.glob(pattern))
        return {**described, "files": [[file.name, file_sha256(file)] for file in files]}
    commit = getattr(model, "_commit_hash", None) or teacher.revision
    return {**described, "name": teacher.model, "commit": commit}


def dataset_identity(config: RunConfig, stream: TextStream) -> dict[str, Any]:
    """Return what identifies the texts, which for local files takes reading them."""
    dataset = config.dataset
    return {
        "name": Path(dataset.name).name if Path(dataset.name).is_dir() else dataset.name,
        "config_name": dataset.config_name,
        "split": dataset.split,
        "text_column": dataset.text_column,
        "shuffle_files": dataset.shuffle_files,
        "source": stream.source,
    }


def _layout_identity(config: RunConfig, *, lanes: int, ranks_sha256: str) -> dict[str, Any]:
    return {
        "lanes": lanes,
        "samples_per_shard": config.cache.samples_per_shard,
        "chunk": CHUNK,
        "gzip_level": GZIP_LEVEL,
        "ranks_sha256": ranks_sha256,
    }


def _environment() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"versions": {**versions, "accel_distill": __version__}, "device_name": name}


def _save_tokenizer(tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
    """Save the tokenizer beside the shards: training reads it from there."""
    saving = told_errors(path / "tokenizer", "the tokenizer was to be saved")
    with saving, tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).rglob("*")):
            target = path / "tokenizer" / file.relative_to(temporary)
            if file.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            replace(file.read_bytes(), target, scratch=scratch(path))
