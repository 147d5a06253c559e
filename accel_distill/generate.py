"""The command that makes a teacher cache: `accelerate launch -m accel_distill.generate --config run.yaml`.

The one decision: ranks share nothing but the file system once the cache is opened. Each walks the stream, makes the
shards that are dealt to it, and looks at the end whether all are there; so uneven ends cannot hang, and a run that
died goes on with the same command on any number of ranks.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel_distill.command_line import parse_arguments
from accel_distill.config import RunConfig, load_config, resolved_yaml
from accel_distill.deal import shard_name
from accel_distill.errors import CacheMismatch, ConfigError, RunError, exit_with
from accel_distill.identity import Opening, open_for_generation
from accel_distill.manifest import (
    Record,
    committed_shards,
    listed_shards,
    read_manifest,
    remove_superseded,
    scratch,
    write_manifest,
)
from accel_distill.pipeline import ShardContent, ShardMaker
from accel_distill.processes import World, start_processes
from accel_distill.progress import Progress
from accel_distill.publish import publish, replace
from accel_distill.shard import HEADER_BYTES, read_header
from accel_distill.stream import TextStream, Walk
from accel_distill.teacher import Sampling, load_teacher
from accel_distill.tokens import SequenceRule, load_tokenizer

log = logging.getLogger("accel_distill.generate")  # under -m this module is __main__

LOOK_EVERY = 5.0  # seconds between two looks at what the other ranks have published
STALLED_AFTER = 1800.0  # seconds without a new shard while waiting for the other ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        path, overrides = parse_arguments(argv, "accel_distill.generate")
        generate(load_config(path, overrides))
        return 0

    return exit_with(run)


def generate(config: RunConfig) -> dict[str, Any]:
    """Make, or finish, the cache that `config` describes; return its manifest.

    Raises the RunErrors of errors.py. Every rank of the run calls it.
    """
    begun = time.monotonic()
    world = start_processes()
    _set_up_logging(world)
    _refuse_sharding(os.environ)
    record, committed = world.from_main(lambda: _open(config, world))
    manifest = read_manifest(record)
    if manifest is None:
        watch = _Committed(record)
        walk = _make_shards(config, record, committed, world, watch)
        manifest = _finish(record, walk, watch)
        if world.is_main and (stale := remove_superseded(record, walk.total)):
            log.info("removed %d short shards that longer ones replace", len(stale))
    if world.is_main:
        log.info("%s", _summary(record, manifest, seconds=time.monotonic() - begun))
    return manifest


def _open(config: RunConfig, world: World) -> tuple[Record, dict[tuple[int, int], tuple[int, str]]]:
    """Open the cache on rank 0, and list what is committed: the only look that decides who makes what."""
    log.info("%s on %s: opening %s", _count(world.world_size, "process"), world.device.type, config.cache.path)
    opening: Opening = open_for_generation(config, world_size=world.world_size, device=world.device)
    record = opening.record
    for note in opening.notes:
        log.warning("%s", note)
    replace(resolved_yaml(config).encode(), record.path / "run.yaml", scratch=scratch(record.path))
    headers = committed_shards(record)
    if headers:
        samples = sum(header.samples for header in headers.values())
        log.info("already there: %s with %s samples", _count(len(headers), "shard"), f"{samples:,}")
    return record, {place: (header.samples, header.texts_sha256) for place, header in headers.items()}


def _make_shards(
    config: RunConfig,
    record: Record,
    committed: dict[tuple[int, int], tuple[int, str]],
    world: World,
    watch: "_Committed",
) -> Walk:
    """Walk the stream to its end and publish this rank's shards; return the walk."""
    stream = TextStream(config.dataset)
    walk = Walk(
        iter(stream),
        layout=record.layout,
        max_samples=config.dataset.max_samples,
        committed=committed,
        rank=world.rank,
        world_size=world.world_size,
    )
    total = min((n for n in (config.dataset.max_samples, stream.length) if n is not None), default=None)
    done = sum(samples for samples, _ in committed.values())
    maker: ShardMaker | None = None
    with (
        Progress(total=total, done=done, world_size=world.world_size, shown=world.is_main) as progress,
        _writer(record) as write,
    ):

        def report(positions: int) -> None:
            write(None)
            progress.positions(positions)
            if world.is_main:
                watch.show(progress)

        for shard in walk:
            maker = maker or _load_maker(config, record, world)
            content = maker.compute(shard, report=report)
            write(lambda content=content, encode=maker.encode: (content, encode(content)))  # type: ignore[misc]
        if world.is_main:
            write(None)
    return walk


def _load_maker(config: RunConfig, record: Record, world: World) -> ShardMaker:
    teacher, dataset, targets = config.teacher, config.dataset, config.targets
    tokenizer = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    model = load_teacher(teacher, device=world.device, valid_ids=record.identity["tokenizer"]["size"])
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
        sampling=Sampling(targets.method, float(targets.parameter), targets.temperature, targets.seed),
        tokens_per_batch=teacher.tokens_per_batch,
    )


@contextmanager
def _writer(record: Record) -> Iterator[Callable[[Callable[[], tuple[ShardContent, bytes]] | None], None]]:
    """Give a function that encodes and publishes a shard in the background, one at a time behind the one in hand.

    Called with None it only looks; either way it raises what went wrong in the background.
    """
    pending: list[Future[None]] = []

    def write(make: Callable[[], tuple[ShardContent, bytes]] | None) -> None:
        if pending and (make is not None or pending[0].done()):
            pending.pop().result()
        if make is not None:
            pending.append(pool.submit(lambda: _publish(record, *make())))

    with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:
        yield write
        if pending:
            pending.pop().result()


def _publish(record: Record, content: ShardContent, data: bytes) -> None:
    shard = content.shard
    path = record.shard_path(shard.group, shard.lane, len(shard.texts))
    if not publish(data, path, scratch=scratch(record.path)):
        with open(path, "rb") as file:
            if file.read(HEADER_BYTES) != data[:HEADER_BYTES]:
                raise CacheMismatch(
                    f"shard {path}: another run published it with other content; are two runs with different settings "
                    "or hardware writing to this cache?"
                )
    _log_shard(record.path, path.name, positions=content.positions, size=len(data))


def _log_shard(path: Path, name: str, *, positions: int, size: int) -> None:
    """Append a line for people; no code reads it."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "shard": name, "positions": positions, "bytes": size}
    with open(path / "logs" / f"{socket.gethostname()}-{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


class _Committed:
    """What all ranks have published so far, seen through the file system."""

    def __init__(self, record: Record) -> None:
        self._record, self._looked = record, 0.0
        self._known: dict[tuple[int, int, int], tuple[int, int]] = {}  # shard to (positions, bytes)

    def look(self) -> set[tuple[int, int, int]]:
        """Read the headers of new shards; return all."""
        self._looked = time.monotonic()
        for shard in listed_shards(self._record.path) - set(self._known):
            header = read_header(self._record.shard_path(*shard))
            self._known[shard] = (header.positions, HEADER_BYTES + header.payload_bytes)
        return set(self._known)

    def show(self, progress: Progress) -> None:
        """Tell `progress`, at most every few seconds."""
        if time.monotonic() - self._looked >= LOOK_EVERY:
            samples = sum(samples for _, _, samples in self.look())
            positions, size = (sum(column) for column in zip((0, 0), *self._known.values(), strict=True))
            progress.committed(samples, bytes_per_position=size / positions if positions else None)


def _finish(record: Record, walk: Walk, watch: _Committed) -> dict[str, Any]:
    """Wait until every shard is there, by whichever rank; write the manifest and return it."""
    wanted = set(record.layout.shards(walk.total))
    there, last_new = watch.look(), time.monotonic()
    while missing := wanted - there:
        if time.monotonic() - last_new > STALLED_AFTER:
            names = ", ".join(shard_name(*shard) for shard in sorted(missing)[:3])
            raise RunError(
                f"cache {record.path}: {len(missing)} of {len(wanted)} shards are missing ({names}, ...) and none "
                f"came for {STALLED_AFTER:.0f} s; a rank must have died: run the same command again"
            )
        time.sleep(0.2)
        if now_there := watch.look() - there:
            there, last_new = there | now_there, time.monotonic()
    write_manifest(record, total=walk.total, stream_end=walk.stream_end or "")
    manifest = read_manifest(record)
    assert manifest is not None
    return manifest


def _summary(record: Record, manifest: dict[str, Any], *, seconds: float) -> str:
    sums = manifest["sums"]
    per_position = sums["bytes"] / sums["positions"] if sums["positions"] else 0.0
    end = "the end of the dataset" if manifest["stream_end"] == "exhausted" else "the sample cap"
    return (
        f"complete: {manifest['samples']:,} samples (to {end}), {sums['tokens']:,} tokens, {sums['positions']:,} "
        f"positions, {_count(len(manifest['shards']), 'shard')}, {sums['bytes']:,} bytes ({per_position:.2f} a "
        f"position); {sums['empty']:,} samples empty, {sums['truncated']:,} cut at max_length; {seconds:.0f} s; "
        f"{record.path}"
    )


def _set_up_logging(world: World) -> None:
    """Let rank 0 speak, the others only warn; and silence the libraries' own bars, which would cross ours."""
    import datasets
    import transformers

    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("accel_distill").setLevel(level)
    transformers.utils.logging.disable_progress_bar()
    if not world.is_main:
        datasets.disable_progress_bars()


def _refuse_sharding(environment: "os._Environ[str]") -> None:
    for name in ("DEEPSPEED", "FSDP"):
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"generate runs a whole teacher in each process, and ACCELERATE_USE_{name} asks for a sharded one; "
                "launch it with launch/generate.sh N, or with configs/accelerate/ddp.yaml"
            )


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


if __name__ == "__main__":
    sys.exit(main())
