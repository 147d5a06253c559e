"""The command that makes a teacher cache: `accelerate launch -m accel_distill.generate --config run.yaml`.

The one decision: ranks share nothing but the file system once the cache is opened. Each walks the stream, makes the
shards that are dealt to it, and looks at the end whether all are there; so uneven ends cannot hang, and a run that
died goes on with the same command on any number of ranks. A thread of each looks whether the others are alive.
Ranks that share a divided teacher meet before each of its forwards (`turns.py`), and nowhere else.
"""

import functools
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from accel_distill.alive import Ranks, make_files
from accel_distill.command_line import GENERATE_FLAGS, parse_flagged
from accel_distill.config import RunConfig, load_config, resolved_yaml
from accel_distill.deal import shard_name
from accel_distill.disk_space import DiskSpace
from accel_distill.divided import check_parallelism, is_divided
from accel_distill.errors import CacheMismatch, ConfigError, DamagedCache, RunError, exit_with
from accel_distill.hints import HintWriter, start_late
from accel_distill.identity import Opening, open_for_generation, pinned
from accel_distill.lookout import Lookout
from accel_distill.manifest import (
    Record,
    committed_shards,
    is_gone,
    is_outgrown,
    listed_shards,
    read_complete,
    read_manifest,
    read_plan,
    remove_superseded,
    scratch,
    withdraw_manifest,
    write_manifest,
)
from accel_distill.pipeline import ShardMaker
from accel_distill.processes import World, leave_processes, refuse_sharding, start_processes
from accel_distill.progress import Committed as Seen
from accel_distill.progress import Progress
from accel_distill.publish import replace, sync_directory, temporary_name, told_errors
from accel_distill.reading import Reading
from accel_distill.run_plan import refuse_what_cannot_fit
from accel_distill.shard import HEADER_BYTES, ShardHeader, read_header
from accel_distill.shard_writer import shard_writer
from accel_distill.stopping import Stop, end, stop_on_signals
from accel_distill.stream import TextStream, Walk, is_pinned
from accel_distill.teacher import Sampling, load_teacher
from accel_distill.teacher_mode import refuse_without_cache
from accel_distill.tokens import SequenceRule, load_tokenizer
from accel_distill.turns import Turns

log = logging.getLogger("accel_distill.generate")  # under -m this module is __main__

LOOK_EVERY = 5.0  # seconds between two looks at what the other ranks have published
# Seconds without a new shard while waiting for the other ranks; a CPU may take an hour for one of 2 M tokens.
STALLED_AFTER = 4 * 3600.0

Place = tuple[int, int]  # group, lane
Committed = tuple[int, str]  # how many samples a shard has, the hash of their texts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        arguments = parse_flagged(argv, "accel_distill.generate", flags=GENERATE_FLAGS)
        config = load_config(arguments.config, arguments.overrides)
        with stop_on_signals() as stop:
            try:
                generate(config, allow_numerics_drift=arguments.allow_numerics_drift, stop=stop, force=arguments.force)
            finally:
                leave_processes()
        return 0

    return exit_with(run)


def generate(
    config: RunConfig, *, allow_numerics_drift: bool = False, stop: Stop | None = None, force: bool = False
) -> dict[str, Any]:
    """Make, or finish, the cache that `config` describes; return its manifest.

    With `allow_numerics_drift` a cache is gone on with that was begun on another device, or with other batch sizes or
    attention. `stop` lets what is seen beside the work (a rank that died, a disk that fills up) end the work at once.
    `force` begins a run that cannot fit the disk. Raises the RunErrors of errors.py. Every rank of the run calls it.
    """
    begun = time.monotonic()
    refuse_without_cache(config.teacher.mode, "generate")
    refuse_sharding(os.environ, parallelism=config.teacher.parallelism)
    world = start_processes()
    world.set_up_logging()
    record, committed, run = world.from_main(
        lambda: _open(config, world, allow_numerics_drift=allow_numerics_drift, force=force)
    )
    identity = record.identity
    config = pinned(config, teacher=identity["teacher"], source=identity["dataset"]["source"])
    ranks = Ranks(scratch(record.path), run, rank=world.rank, world_size=world.world_size)
    space = DiskSpace(record.path, min_free=config.cache.min_free_disk, max_bytes=config.cache.max_bytes)
    with Lookout(ranks, space, rank=world.rank, stop=stop) as lookout:
        manifest = read_complete(record) or _make(config, record, world, committed=committed, lookout=lookout)
    if world.is_main:
        if stale := remove_superseded(record, manifest["samples"]):
            log.info("removed %s that longer ones replace", _count(len(stale), "short shard"))
        log.info("%s", _summary(record, manifest, seconds=time.monotonic() - begun))
        if not manifest["sums"]["positions"]:
            log.warning("no position carries a target: nothing can be trained from this cache; are the texts empty?")
    world.leave()
    return manifest


def _make(
    config: RunConfig,
    record: Record,
    world: World,
    *,
    committed: Mapping[Place, Committed],
    lookout: Lookout,
) -> dict[str, Any]:
    """Make what is missing of the cache; return its manifest."""
    stream = TextStream(config.dataset)
    total = min((n for n in (config.dataset.max_samples, stream.length) if n is not None), default=None)
    done = sum(samples for samples, _ in committed.values())
    with Progress(total=total, done=done, world_size=world.world_size, shown=world.is_main) as progress:
        watch = _Watch(record, progress, lookout.space)
        watch.look(every=0.0)
        reading = _read(stream, record, committed, progress=progress)
        walk = _make_shards(config, record, world, reading, committed=committed, watch=watch, lookout=lookout)
        return _finish(record, walk, watch=watch, lookout=lookout)


def _read(stream: TextStream, record: Record, committed: Mapping[Place, Committed], *, progress: Progress) -> Reading:
    """Open the stream, after the groups that are whole where that may be and a hint says how."""

    def tell(sentence: str) -> None:
        log.warning("%s", sentence)
        progress.retried()

    read = functools.partial(stream.read, tell=tell)
    if not is_pinned(record.identity["dataset"]["source"]):
        return read()  # only the texts themselves tell whether they are those of before
    return start_late(record.path, committed, layout=record.layout, read=read)


def _open(
    config: RunConfig, world: World, *, allow_numerics_drift: bool, force: bool
) -> tuple[Record, dict[Place, Committed], str]:
    """Open the cache on rank 0, list what is committed (the only look that decides who makes what), name the run."""
    check_parallelism(config.teacher.parallelism, world_size=world.world_size)
    if not force:
        refuse_what_cannot_fit(config, processes=world.world_size)
    log.info("%s on %s: opening %s", _count(world.world_size, "process"), world.device.type, config.cache.path)
    opening: Opening = open_for_generation(
        config, world_size=world.world_size, device=world.device, allow_numerics_drift=allow_numerics_drift
    )
    record = opening.record
    for note in opening.notes:
        log.warning("%s", note)
    _withdraw_if_incomplete(record)
    replace(resolved_yaml(config).encode(), record.path / "run.yaml", scratch=scratch(record.path))
    headers = committed_shards(record)
    if headers:
        _sync_shards(record)  # who published may have died before that
        samples = sum(header.samples for header in headers.values())
        log.info("already there: %s with %s samples", _count(len(headers), "shard"), f"{samples:,}")
    run = temporary_name(uuid.uuid4().hex)
    make_files(scratch(record.path), run, world_size=world.world_size)
    return record, {place: (header.samples, header.texts_sha256) for place, header in headers.items()}, run


def _withdraw_if_incomplete(record: Record) -> None:
    """Remove the manifest of a cache from which somebody deleted shards, or of less than its plan: it is made whole."""
    _withdraw_if_outgrown(record)
    manifest = read_manifest(record)
    if manifest and (gone := set(record.layout.shards(manifest["samples"])) - listed_shards(record.path)):
        log.warning("%s of the complete cache no longer there: made anew", _count(len(gone), "shard"))
        withdraw_manifest(record.path)


def _withdraw_if_outgrown(record: Record) -> None:
    manifest = read_manifest(record)
    if manifest and is_outgrown(manifest["samples"], manifest["stream_end"], read_plan(record.path)):
        log.warning("manifest.json says %s samples, fewer than planned: withdrawn", f"{manifest['samples']:,}")
        withdraw_manifest(record.path)


def _make_shards(
    config: RunConfig,
    record: Record,
    world: World,
    reading: Reading,
    *,
    committed: Mapping[Place, Committed],
    watch: "_Watch",
    lookout: Lookout,
) -> Walk:
    """Walk the stream to its end and publish this rank's shards; return the walk."""
    group_samples = record.layout.group_samples
    texts = HintWriter(reading, record.path, group_samples=group_samples) if world.is_main else reading
    walk = Walk(
        iter(texts),
        layout=record.layout,
        max_samples=config.dataset.max_samples,
        committed=committed,
        rank=world.rank,
        world_size=world.world_size,
        first_group=reading.index // group_samples,
    )
    shared = is_divided(config.teacher.parallelism, world_size=world.world_size)
    turns, maker = Turns(shared=shared, device=world.device), None
    explained = lookout.explained() if shared else nullcontext()
    writer = shard_writer(record, lookout.space, published=lambda positions: watch.positions(-positions))
    with explained, writer as write:

        def report(positions: int) -> None:
            lookout.check()
            write(None)
            watch.positions(positions)

        for shard in walk:
            lookout.check()
            lookout.space.check()
            if maker is None and turns.take(has_batch=True):
                maker = _load_maker(config, record, world, turns)
            assert maker is not None
            content = maker.compute(shard, report=report)
            write(lambda content=content, encode=maker.encode: (content, encode(content)))  # type: ignore[misc]
        while turns.take(has_batch=False):  # others need this rank's part of the teacher
            lookout.check()
            write(None)
            watch.look(every=LOOK_EVERY)
            if maker is None:
                maker = _load_maker(config, record, world, turns)
            else:
                maker.take_part()
    return walk


def _load_maker(config: RunConfig, record: Record, world: World, turns: Turns) -> ShardMaker:
    teacher, dataset, targets = config.teacher, config.dataset, config.targets
    tokenizer = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    valid_ids = record.identity["tokenizer"]["size"]
    model = load_teacher(teacher, device=world.device, valid_ids=valid_ids, world_size=world.world_size)
    if model.vocab_size != record.vocab_size:
        raise ConfigError(
            f"teacher.model: {teacher.model} has an output layer of {model.vocab_size} ids, but its config says "
            f"vocab_size {record.vocab_size}"
        )
    if world.device.type == "cuda":
        model.rehearse(tokens=teacher.tokens_per_batch, length=dataset.max_length)
    return ShardMaker(
        record,
        teacher=model,
        tokenizer=tokenizer,
        rule=SequenceRule.of(dataset),
        sampling=Sampling(targets.sampled, float(targets.parameter), targets.temperature, targets.seed),
        tokens_per_batch=teacher.tokens_per_batch,
        on_nonfinite=teacher.on_nonfinite,
        before_forward=functools.partial(turns.take, has_batch=True),
    )


class _Watch:
    """Shows, on rank 0, this rank's positions and what all ranks have published, seen through the file system."""

    def __init__(self, record: Record, progress: Progress, space: DiskSpace) -> None:
        self._record, self._progress, self._space = record, progress, space
        self._looked = time.monotonic()
        self._before = listed_shards(record.path)
        self._headers: dict[tuple[int, int, int], ShardHeader] = {}

    def positions(self, count: int) -> None:
        """Count positions that this rank has finished; negative: that it has published them."""
        self.look(every=LOOK_EVERY if count > 0 else 0.0)
        self._progress.positions(count)

    def look(self, *, every: float) -> None:
        """Read the headers of new shards, unless the last look was less than `every` seconds ago."""
        if not self._progress.shown or time.monotonic() - self._looked < every:
            return
        for shard in listed_shards(self._record.path) - set(self._headers):
            try:
                self._headers[shard] = read_header(self._record.shard_path(*shard))
            except DamagedCache as error:
                if not is_gone(error):
                    raise
        longest = {shard[:2]: header for shard, header in sorted(self._headers.items())}.values()
        room = self._space.room()
        self._progress.committed(
            Seen(
                samples=sum(header.samples for header in longest),
                positions=sum(header.positions for header in longest),
                made=sum(header.positions for shard, header in self._headers.items() if shard not in self._before),
                shard_bytes=sum(HEADER_BYTES + header.payload_bytes for header in longest),
                disk_bytes=room.used,
                room_bytes=room.left,
            )
        )
        self._looked = time.monotonic()


def _finish(record: Record, walk: Walk, *, watch: _Watch, lookout: Lookout) -> dict[str, Any]:
    """Wait until every shard is there, by whichever rank; write the manifest and return it.

    Raises CacheMismatch where another run has let the cache grow: then that run's manifest is the right one.
    """
    wanted, last_new = set(record.layout.shards(walk.total)), time.monotonic()
    missing = wanted - listed_shards(record.path)
    while missing:
        if time.monotonic() - last_new > STALLED_AFTER:
            names = ", ".join(shard_name(*shard) for shard in sorted(missing)[:3])
            raise RunError(
                f"cache {record.path}: {len(missing)} of {len(wanted)} shards are missing ({names}, ...) and none came "
                f"for {STALLED_AFTER:.0f} s; a rank must have died: run the same command again"
            )
        _refuse_outgrown(record, walk)  # whose run may have removed what is waited for
        time.sleep(0.2)
        watch.look(every=LOOK_EVERY)
        if (still := wanted - listed_shards(record.path)) != missing:
            missing, last_new = still, time.monotonic()
        if missing:
            lookout.check()
    watch.look(every=0.0)
    _sync_shards(record)  # the manifest must not be there before what it names
    _refuse_outgrown(record, walk)
    _withdraw_if_outgrown(record)  # a smaller run may just have written its own
    return write_manifest(record, total=walk.total, stream_end=walk.stream_end or "")


def _sync_shards(record: Record) -> None:
    with told_errors(record.path / "shards", "the names of its shards were to be made durable"):
        sync_directory(record.path / "shards")


def _refuse_outgrown(record: Record, walk: Walk) -> None:
    """Raise CacheMismatch where the plan has grown beyond what this run makes."""
    plan = read_plan(record.path)
    if is_outgrown(walk.total, walk.stream_end, plan):
        assert plan is not None
        raise CacheMismatch(
            f"cache {record.path}: another run lets it grow to max_samples {plan['max_samples'] or 'no limit'} while "
            f"this one made {walk.total:,}, which are kept; set dataset.max_samples to that, and run generate again"
        )


def _summary(record: Record, manifest: dict[str, Any], *, seconds: float) -> str:
    sums = manifest["sums"]
    per_position = sums["bytes"] / sums["positions"] if sums["positions"] else 0.0
    end = "the end of the dataset" if manifest["stream_end"] == "exhausted" else "the sample cap"
    cut = f"{sums['empty']:,} empty, {sums['truncated']:,} cut at max_length"
    left_out = f", {sums['nonfinite']:,} left out for a logit that was not finite" if sums["nonfinite"] else ""
    return (
        f"complete: {record.path}\n"
        f"  {manifest['samples']:,} samples (to {end}): {cut}\n"
        f"  {sums['tokens']:,} tokens, {sums['positions']:,} positions with a target{left_out}\n"
        f"  {_count(len(manifest['shards']), 'shard')}, {sums['bytes']:,} bytes ({per_position:.2f} a position), "
        f"{seconds:.0f} s"
    )


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


if __name__ == "__main__":
    end(main())
