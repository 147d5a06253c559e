"""A run before its teacher is loaded: its samples, their lengths, its layout, and the room for its cache.

The one decision: `generate` refuses a run only when even the low end of what it will take exceeds the room; what lies
above that is the user's choice, and the disk guard's. A run that fits at its largest is not looked at; a cache that has
shards is judged by their sizes.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accel_distill.byte_curves import SHARD_BYTES, stored_bytes_per_position
from accel_distill.codec import Method
from accel_distill.config import RunConfig, resolved_yaml
from accel_distill.deal import Layout
from accel_distill.disk_space import DiskSpace, Room
from accel_distill.errors import DoesNotFit
from accel_distill.figures import size
from accel_distill.identity import check_length
from accel_distill.length_sample import LengthSample, sample_lengths
from accel_distill.manifest import listed_shards, read_record
from accel_distill.projection import Interval, ShardBytes, mean_of, shard_count, shards_bytes
from accel_distill.stream import TextStream
from accel_distill.teacher import load_teacher_config
from accel_distill.tokens import SequenceRule, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALTERNATIVES: list[tuple[Method, float]] = [
    ("threshold", 0.06),
    ("threshold", 0.03),
    ("threshold", 0.02),
    ("random", 50),
    ("top_k", 64),
]
SMALL_FILES = 3_200  # bytes of cache.json, plan.json, hints.json and README.txt
BESIDE_A_SHARD = 490  # bytes of manifest.json and logs/ for each shard
QUICK_COUNT, QUICK_SECONDS = 256, 0.5  # samples that `generate` tokenises, and seconds of reading for them
SHORTER = 0.25  # of the samples that local files seem to hold, are taken for sure
NEARLY = 0.9  # of the samples: so much of a cache is finished without a look
SMALLER = 0.7  # of the bytes of the samples that are there, are taken for sure for those that come


@dataclass(frozen=True)
class Plan:
    """A run, as far as it is known without its teacher."""

    layout: Layout
    lengths: LengthSample
    tokenizer: "PreTrainedTokenizerBase"
    once: float  # bytes of the files that do not grow
    space: DiskSpace
    processes: int
    local_bytes: int | None  # of the files of a dataset on this machine

    @property
    def tokens(self) -> Interval:
        """Tokens of a sample."""
        return mean_of(self.lengths.tokens, population=self.lengths.population)

    @property
    def positions(self) -> Interval:
        """Positions with a next token, of a sample."""
        return mean_of(self.lengths.positions, population=self.lengths.population)

    @property
    def least_samples(self) -> int:
        """How many samples there are at least, as far as one can say without reading all."""
        files, lengths = self.local_bytes, self.lengths
        if lengths.read >= lengths.population or files is None:
            return lengths.population
        return min(lengths.population, max(lengths.read, int(SHORTER * files / max(lengths.text_bytes, 1.0))))

    def total(self, samples: int, shard: ShardBytes) -> Interval:
        """Return the bytes of all files of the cache of so many samples."""
        positions = mean_of(self.lengths.positions, population=samples)
        shards = shards_bytes(samples, layout=self.layout, positions=positions, shard=shard)
        return shards.plus(self.beside_shards(samples))

    def beside_shards(self, samples: int) -> float:
        """Return the bytes of all files that are no shards."""
        return self.once + BESIDE_A_SHARD * shard_count(self.layout, samples)


def open_plan(config: RunConfig, *, processes: int, counted: int, seconds: float) -> Plan:
    """Open dataset and tokenizer and count lengths, for `seconds` of reading and as many of tokenising."""
    teacher, path = config.teacher, config.cache.path
    model = load_teacher_config(teacher).get_text_config()
    check_length(config, model)
    tokenizer = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    stream = TextStream(config.dataset)
    lengths = sample_lengths(
        stream,
        rule=SequenceRule.of(config.dataset),
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        max_samples=config.dataset.max_samples,
        wanted=counted,
        seconds=seconds,
    )
    lanes = config.cache.lanes or processes
    if config.cache.lanes is None and (path / "cache.json").is_file():
        lanes = read_record(path).layout.lanes
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        saved = sum(file.stat().st_size for file in Path(temporary).rglob("*") if file.is_file())
    return Plan(
        Layout(lanes, config.cache.samples_per_shard),
        lengths,
        tokenizer,
        once=4 * model.vocab_size + saved + len(resolved_yaml(config).encode()) + SMALL_FILES,
        space=DiskSpace(path, min_free=config.cache.min_free_disk, max_bytes=config.cache.max_bytes),
        processes=processes,
        local_bytes=stream.local_bytes,
    )


def from_curves(config: RunConfig) -> tuple[ShardBytes, dict[tuple[Method, float], Interval]]:
    """Return what shards and positions take by the stored curves, for the run's method and for the others."""
    targets = config.targets
    others = {place: stored_bytes_per_position(*place) for place in ALTERNATIVES}
    return ShardBytes(SHARD_BYTES, stored_bytes_per_position(targets.sampled, targets.parameter)), others


def too_large(path: Path, needed: float, room: Room, *, what: str) -> str:
    """Say that a cache does not fit, and what to do."""
    quota = "" if room.max_bytes is None else f", cache.max_bytes {size(room.max_bytes)}"
    instead = "name a larger disk with cache.path"
    if room.max_bytes is not None and room.left is not None and room.left == room.max_bytes - room.used:
        instead = "raise cache.max_bytes"
    return (
        f"cache {path}: {what} {size(needed)} are still to be written, and there is room for "
        f"{size(max(0, room.left or 0))} ({size(room.reserve)} of its disk stay free: cache.min_free_disk{quota}); "
        f"lower dataset.max_samples, raise targets.threshold, or {instead}"
    )


def refuse_what_cannot_fit(config: RunConfig, *, processes: int) -> None:
    """Raise DoesNotFit where the run's cache is too large for its disk or quota, whatever its teacher says.

    Where there is no room at all, or nothing is known of it, that is left to the disk guard.
    """
    cache, dataset = config.cache, config.dataset
    there = samples_there(cache.path)
    if there and (dataset.max_samples is None or there >= NEARLY * dataset.max_samples):
        return
    room = DiskSpace(cache.path, min_free=cache.min_free_disk, max_bytes=cache.max_bytes).room()
    if room.left is None or room.left <= 0:
        return
    if there and dataset.max_samples:
        _refuse_above(room, SMALLER * (dataset.max_samples - there) * room.used / there, cache.path)
        return
    shard, _ = from_curves(config)
    layout = Layout(cache.lanes or processes, cache.samples_per_shard)
    if dataset.max_samples and dataset.long_documents == "truncate":
        most = dataset.max_samples * dataset.max_length * shard.per_position.high
        if most + shard.fixed * shard_count(layout, dataset.max_samples) < room.left:
            return
    plan = open_plan(config, processes=processes, counted=QUICK_COUNT, seconds=QUICK_SECONDS)
    _refuse_above(room, plan.total(plan.least_samples, shard).low, cache.path)


def _refuse_above(room: Room, least: float, path: Path) -> None:
    assert room.left is not None
    if least > room.left:
        raise DoesNotFit(
            f"{too_large(path, least, room, what='at least')}; `accel-distill estimate` measures it, and --force "
            "begins all the same"
        )


def samples_there(path: Path) -> int:
    """Return how many samples the shards of a cache hold."""
    if not (path / "cache.json").is_file() or not (path / "shards").is_dir():
        return 0
    longest: dict[tuple[int, int], int] = {}
    for group, lane, samples in listed_shards(path):
        longest[group, lane] = max(samples, longest.get((group, lane), 0))
    return sum(longest.values())
