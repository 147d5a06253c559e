"""Some samples of a run through its real teacher, sampler and encoder: bytes and seconds of a position.

The one decision: what is measured is what `generate` does, by its own `ShardMaker`. The samples are encoded as one
shard; dealt into two, or into shards of the run's size where that is smaller, which tells what a shard takes by itself;
and into eight, which tells how much the bytes of samples differ. The other methods are tried on every fourth sample,
with a forward of their own, and compared with the run's on the same.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from accel_distill.codec import Method, rank_tokens
from accel_distill.config import RunConfig
from accel_distill.errors import NotFinite
from accel_distill.length_sample import LengthSample, spread_by_length
from accel_distill.manifest import Record
from accel_distill.pipeline import ShardContent, ShardMaker, batches
from accel_distill.projection import Interval, ShardBytes, fixed_bytes, shard_bytes_of
from accel_distill.rows import RowReader
from accel_distill.stream import OpenShard
from accel_distill.targets import concatenate
from accel_distill.teacher import Sampling, Teacher, load_teacher
from accel_distill.text_hash import Text
from accel_distill.tokens import SequenceRule, tokenizer_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = 8  # shards into which the samples are dealt, to see how much they differ
TIMED_FOR = 2.0  # seconds, in at most so many runs:
TIMED_RUNS = 3
SLOWER, FASTER = 1.5, 0.7  # than the slowest and fastest of these runs: machines are shared, and get warm
EVERY = 4  # samples: one in so many is for the other methods


@dataclass(frozen=True)
class Probe:
    """What was measured."""

    samples: int
    positions: int
    shard: ShardBytes
    others: dict[tuple[Method, float], float]  # bytes a position, as a share of the run's own
    seconds_per_padded_token: Interval  # of the teacher
    encode_seconds: float  # a position
    load_seconds: float  # until the teacher is there
    target_bytes: float  # a position's targets in memory
    host_bytes: int  # of this process, at most
    device_bytes: int | None  # of the accelerator, at most; None: there is none
    device: str


def run_probe(
    config: RunConfig,
    lengths: LengthSample,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    wanted: int,
    others: Sequence[tuple[Method, float]],
    device: torch.device,
) -> Probe:
    """Run `wanted` of the counted samples, spread over their lengths.

    Raises ConfigError for a teacher that cannot be loaded, NotFinite for one whose logits are NaN or infinite.
    """
    begun = time.monotonic()
    teacher = load_teacher(config.teacher, device=device, valid_ids=tokenizer_size(tokenizer))
    if device.type == "cuda":
        teacher.rehearse(tokens=config.teacher.tokens_per_batch, length=config.dataset.max_length)
    load_seconds = time.monotonic() - begun
    texts = [lengths.texts[k] for k in spread_by_length(lengths.positions, wanted)]  # from short to long
    targets = config.targets
    own = _encoder(config, targets.sampled, float(targets.parameter), teacher, tokenizer, lengths.id_counts)
    try:
        own.maker.compute(OpenShard(0, 0, texts[-1:]))  # a warm-up
        content, seconds = _timed(own.maker, texts)
    except NotFinite as error:
        raise NotFinite(f"in a shard of {len(texts)} samples of the estimate, numbered from 0: {error}") from error
    padded = _padded_tokens([len(row.ids) for row in content.rows], tokens_per_batch=config.teacher.tokens_per_batch)
    per_shard, of = config.cache.samples_per_shard, lengths.population
    shard, encode_seconds = _shard_bytes(own, content, samples_per_shard=per_shard, of=of)
    some = part_of(content, range(EVERY // 2 % len(texts), len(texts), EVERY))
    base = max(own.encode(some).columns, 1)
    ratios: dict[tuple[Method, float], float] = {(targets.sampled, targets.parameter): 1.0}
    for method, parameter in others:
        if (method, parameter) in ratios:
            continue
        other = _encoder(config, method, parameter, teacher, tokenizer, lengths.id_counts)
        ratios[method, parameter] = other.encode(other.maker.compute(some.shard)).columns / base
    memory = sum(values.nbytes for values in content.targets.arrays().values())
    return Probe(
        samples=len(texts),
        positions=content.positions,
        shard=shard,
        others={place: ratios[place] for place in others},
        seconds_per_padded_token=seconds.times(1 / max(padded, 1)),
        encode_seconds=encode_seconds,
        load_seconds=load_seconds,
        target_bytes=memory / max(content.positions, 1),
        host_bytes=peak_host_bytes(),
        device_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )


def padding(lengths: LengthSample, *, samples_per_shard: int, tokens_per_batch: int) -> float:
    """Return the padded tokens for each position of the run's shards: their batches waste less than a small probe's."""
    some = lengths.row_lengths[:samples_per_shard]
    rows = [length for sample in some for length in sample]
    positions = sum(max(length - 1, 0) for length in rows)
    return _padded_tokens(rows, tokens_per_batch=tokens_per_batch) / max(positions, 1)


def part_of(content: ShardContent, samples: Sequence[int]) -> ShardContent:
    """Return a shard of some samples of another (by their numbers in it), with the same targets."""
    wanted = set(samples)
    kept = [k for k, row in enumerate(content.rows) if row.sample_index in wanted]
    counts = [max(len(row.ids) - 1, 0) - len(content.left_out.get(k, ())) for k, row in enumerate(content.rows)]
    ends = np.cumsum([0, *counts])
    none = content.targets.position_slice(0, 0)
    return replace(
        content,
        shard=OpenShard(0, 0, [content.shard.texts[n] for n in samples]),
        rows=[content.rows[k] for k in kept],
        targets=concatenate([none, *(content.targets.position_slice(int(ends[k]), int(ends[k + 1])) for k in kept)]),
        entropy=content.entropy[kept],
        logprob=content.logprob[kept],
        left_out={new: content.left_out[k] for new, k in enumerate(kept) if k in content.left_out},
    )


def peak_host_bytes() -> int:
    """Return the most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Encoded:
    """A shard's file."""

    size: int  # bytes
    columns: int  # of these, that its columns take; the rest comes in blocks of some thousand
    positions: int


@dataclass(frozen=True)
class Encoder:
    """What makes shards as the run does, and says how large they are."""

    maker: ShardMaker
    record: Record

    def encode(self, content: ShardContent) -> Encoded:
        """Return what a shard's file would be."""
        data, record = self.maker.encode(content), self.record
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shard.h5"
            path.write_bytes(data)
            reader = RowReader(path, method=record.method, parameter=record.parameter, ids_by_rank=record.ids_by_rank)
            columns = sum(reader.stored_bytes().values())
            reader.close()
        return Encoded(len(data), columns, content.positions)


def _encoder(
    config: RunConfig,
    method: Method,
    parameter: float,
    teacher: Teacher,
    tokenizer: "PreTrainedTokenizerBase",
    id_counts: np.ndarray,
) -> Encoder:
    """Return what makes shards as this run does, with some method; their samples are numbered from 0."""
    identity = {
        "teacher": {"vocab_size": teacher.vocab_size},
        "targets": {"method": method, "parameter": parameter},
        "layout": {"lanes": 1, "samples_per_shard": config.cache.samples_per_shard},
    }
    record = Record(config.cache.path, identity, {}, {}, rank_tokens(id_counts))
    maker = ShardMaker(
        record,
        teacher=teacher,
        tokenizer=tokenizer,
        rule=SequenceRule.of(config.dataset),
        sampling=Sampling(method, parameter, config.targets.temperature, config.targets.seed),
        tokens_per_batch=config.teacher.tokens_per_batch,
        on_nonfinite=config.teacher.on_nonfinite,
    )
    return Encoder(maker, record)


def _timed(maker: ShardMaker, texts: list[Text]) -> tuple[ShardContent, Interval]:
    """Compute a shard, again while that is quick; return it and the seconds that one takes."""
    seconds: list[float] = []
    while True:
        begun = time.monotonic()
        content = maker.compute(OpenShard(0, 0, texts))
        seconds.append(time.monotonic() - begun)
        if sum(seconds) > TIMED_FOR or len(seconds) == TIMED_RUNS:
            mid = statistics.median(seconds)
            return content, Interval(FASTER * min(seconds), mid, SLOWER * max(seconds))


def _shard_bytes(
    encoder: Encoder, content: ShardContent, *, samples_per_shard: int, of: int
) -> tuple[ShardBytes, float]:
    """Encode a shard whole and in parts; return what shards take, and the seconds of a position.

    `of` is how many samples there are of which these are some.
    """
    begun, samples = time.monotonic(), len(content.shard.texts)
    whole = encoder.encode(content)
    seconds = time.monotonic() - begun

    def dealt(count: int) -> list[Encoded]:
        count = min(count, samples)
        return [encoder.encode(part_of(content, range(start, samples, count))) for start in range(count)]

    like_the_runs, eight = dealt(max(2, -(-samples // samples_per_shard))), dealt(PARTS)
    beside = statistics.mean(part.size - part.columns for part in (whole, *like_the_runs, *eight))
    fixed = fixed_bytes([(part.columns, part.positions) for part in like_the_runs], whole.columns)
    parts = [(part.columns, part.positions) for part in eight]
    columns = shard_bytes_of(parts, whole.columns, fixed=fixed, samples=samples, population=of)
    return ShardBytes(beside + columns.fixed, columns.per_position), seconds / max(content.positions, 1)


def _padded_tokens(lengths: Sequence[int], *, tokens_per_batch: int) -> int:
    found = batches(lengths, tokens_per_batch=tokens_per_batch)
    return sum(len(batch) * max(lengths[k] for k in batch) for batch in found)
