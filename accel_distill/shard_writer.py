"""Shards on their way to the disk: encoded and published by a thread, while the next one is computed.

The one decision: one shard waits at most, so memory holds two; and what goes wrong is raised where the next one is
handed over, or at the end.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from accel_distill.disk_space import DiskSpace
from accel_distill.errors import CacheMismatch
from accel_distill.manifest import Record, scratch
from accel_distill.pipeline import ShardContent
from accel_distill.publish import publish
from accel_distill.shard import HEADER_BYTES


@contextmanager
def shard_writer(
    record: Record, space: DiskSpace, *, published: Callable[[int], None]
) -> Iterator[Callable[[Callable[[], tuple[ShardContent, bytes]] | None], None]]:
    """Give a function that encodes and publishes a shard in the background, one at a time behind the one in hand.

    Called with None it only looks; either way it raises what went wrong in the background. `published` hears the
    positions of each shard, in the thread that calls.
    """
    pending: list[Future[int]] = []

    def write(make: Callable[[], tuple[ShardContent, bytes]] | None) -> None:
        if pending and (make is not None or pending[0].done()):
            published(pending.pop().result())
        if make is not None:
            pending.append(pool.submit(lambda: _publish(record, space, *make())))

    with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:
        yield write
        if pending:
            published(pending.pop().result())


def _publish(record: Record, space: DiskSpace, content: ShardContent, data: bytes) -> int:
    """Publish a shard, or see that it is there already; return its positions."""
    shard = content.shard
    path = record.shard_path(shard.group, shard.lane, len(shard.texts))
    space.check(coming=len(data))
    if not publish(data, path, scratch=scratch(record.path)):
        with open(path, "rb") as file:
            if file.read(HEADER_BYTES) != data[:HEADER_BYTES]:
                raise CacheMismatch(
                    f"shard {path}: another run published it with other content; are two runs with different settings "
                    "or hardware writing to this cache?"
                )
    _log_shard(record.path, path.name, positions=content.positions, size=len(data))
    return content.positions


def _log_shard(path: Path, name: str, *, positions: int, size: int) -> None:
    """Append a line for people; no code reads it, so a disk that is full now is left to the next shard to tell."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "shard": name, "positions": positions, "bytes": size}
    with suppress(OSError), open(path / "logs" / f"{socket.gethostname()}-{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
