"""Caches of made-up targets, written without a teacher: for any vocabulary, method and layout."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel_distill.codec import Method, rank_tokens, tail_counts, weight_scale
from accel_distill.manifest import Record, create, make_directories, write_manifest, write_plan
from accel_distill.pipeline import ShardContent, ShardMaker
from accel_distill.shard import FORMAT
from accel_distill.stream import OpenShard
from accel_distill.targets import SparseTargets, concatenate, no_targets
from accel_distill.tokens import TokenSequence

NONE = np.zeros(0, np.int64)
PARAMETERS: dict[Method, float] = {"threshold": 0.05, "top_k": 3, "random": 20}


@dataclass(frozen=True)
class Row:
    """What one item of the cache must give back."""

    sample_index: int
    ids: np.ndarray
    targets: SparseTargets
    entropy: float
    logprob: float
    left_out: tuple[int, ...] = ()  # positions without a target, as where a logit was not finite


def make_record(path: Path, **changes: Any) -> Record:
    """Begin a cache; `changes` are those of the settings below."""
    settings: dict[str, Any] = {
        "vocab": 50,
        "tokenizer_size": None,  # as many as the vocabulary
        "method": "threshold",
        "lanes": 1,
        "samples_per_shard": 4,
        "max_length": 128,
        "long_documents": "truncate",
    } | changes
    vocab, method = settings["vocab"], settings["method"]
    counts = np.random.default_rng(7).integers(0, 100, vocab)
    ids_by_rank = rank_tokens(counts)
    layout = {key: settings[key] for key in ("lanes", "samples_per_shard")}
    parameter = PARAMETERS[method]
    identity = {
        "format": FORMAT,
        "teacher": {"vocab_size": vocab, "dtype": "float32"},
        "tokenizer": {"size": settings["tokenizer_size"] or vocab},
        "dataset": {"name": "made", "config_name": None, "split": "train", "text_column": "text"},
        "sequence": {
            "max_length": settings["max_length"],
            "long_documents": settings["long_documents"],
            "add_special_tokens": True,
            "append_eos": True,
        },
        "targets": {"method": method, "parameter": parameter, "temperature": 1.5, "seed": 0},
        "layout": {**layout, "ranks_sha256": hashlib.sha256(ids_by_rank.tobytes()).hexdigest()},
    }
    make_directories(path)
    return create(Record(path, identity, {"device": "cpu"}, {"versions": {}}, ids_by_rank))


def made_targets(positions: int, *, method: Method, vocab: int, seed: int) -> SparseTargets:
    """Return targets that are in order but mean nothing."""
    rng, parameter = np.random.default_rng(seed), PARAMETERS[method]
    scale = weight_scale(method, parameter)
    count = np.full(positions, 3 if method == "top_k" else 1)
    values = rng.integers(1, scale + 1, count.sum())
    if method == "top_k":
        values = np.sort(values.reshape(positions, 3)).flatten()
    tails = np.zeros(positions, np.int64)
    if method == "threshold":
        tails = tail_counts(parameter)[scale - values]
    if method == "top_k":  # probabilities from 0.3 down: three of them sum to less than 1
        values = np.sort(rng.integers(2500, 60_000, (positions, 3))).flatten()
    if method == "random":
        values, tails = np.full(positions, scale - 2), np.full(positions, 2)
    distinct = [rng.permutation(vocab)[: head + tail] for head, tail in zip(count, tails, strict=True)]
    arrays = {
        "head_count": count,
        "head_ids": np.concatenate([ids[:n] for ids, n in zip(distinct, count, strict=True)] + [NONE]),
        "head_values": values,
        "tail_count": tails,
        "tail_ids": np.concatenate([ids[n:] for ids, n in zip(distinct, count, strict=True)] + [NONE]),
        "tail_values": np.ones(tails.sum() if method == "random" else 0, np.int64),
    }
    wide = {name: np.asarray(array, np.int64) for name, array in arrays.items()}
    return SparseTargets.from_arrays(wide, method=method, parameter=parameter)


def make_rows(lengths: Sequence[Sequence[int]], *, method: Method = "threshold", vocab: int = 50) -> list[Row]:
    """Return rows of random ids; `lengths` are the tokens of each piece of each sample (most have one piece)."""
    rng, rows = np.random.default_rng(3), []
    for index, pieces in enumerate(lengths):
        for length in pieces:
            seed = len(rows)
            targets = made_targets(max(length - 1, 0), method=method, vocab=vocab, seed=seed)
            ids = rng.integers(0, vocab, length)
            rows.append(Row(index, ids, targets, len(targets) * 0.25, len(targets) * -0.5))
    return rows


def write_shards(record: Record, rows: Sequence[Row]) -> None:
    """Write the shards of all rows."""
    maker = ShardMaker(record, teacher=None, tokenizer=None, rule=None, sampling=None, tokens_per_batch=0)  # type: ignore[arg-type]
    total = rows[-1].sample_index + 1
    for group, lane, samples in record.layout.shards(total):
        first = record.layout.first_sample(group, lane)
        indices = range(first, first + samples * record.layout.lanes, record.layout.lanes)
        mine = [row for row in rows if row.sample_index in indices]
        texts: list[str | None] = [f"text {index}" for index in indices]
        content = ShardContent(
            OpenShard(group, lane, texts),
            [TokenSequence(row.sample_index, 0, row.ids) for row in mine],
            0,
            concatenate([no_targets(record.method, record.parameter), *(row.targets for row in mine)]),
            np.array([row.entropy for row in mine]),
            np.array([row.logprob for row in mine]),
            {number: np.array(row.left_out) for number, row in enumerate(mine) if row.left_out},
        )
        record.shard_path(group, lane, samples).write_bytes(maker.encode(content))


def make_cache(path: Path, rows: Sequence[Row], **changes: Any) -> Record:
    """Write a complete cache of these rows."""
    record = make_record(path, **changes)
    write_plan(path, max_samples=None)
    write_shards(record, rows)
    write_manifest(record, total=rows[-1].sample_index + 1, stream_end="exhausted")
    return record


def same_targets(found: SparseTargets, expected: SparseTargets, *, vocab: int) -> bool:
    """Whether two targets hold the same; the order of tail ids has no meaning."""
    heads = ("head_count", "head_ids", "head_values", "tail_count")
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in heads) and torch.equal(
        found.to_dense(vocab), expected.to_dense(vocab)
    )
