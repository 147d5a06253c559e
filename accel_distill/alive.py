"""Whether the other ranks of a run are alive, seen through the file system that they share anyway.

    .tmp/HOST.PID.RUN-RANK    one a rank, made by rank 0; locked by its rank, which counts on in it every few seconds

The one decision: a rank is dead only when nobody holds the lock on its file *and* its count stands still; the first
alone would kill the living where locks do not reach other hosts, the second alone where a rank is slow or was paused.
No collective and no port is needed, so it makes no difference which rank dies, nor who started them. A rank looks at
the ranks 1, 2, 4, ... after it, and a stop travels on with the next look. The price is a thread, and log2 W small
reads every two seconds.
"""

import contextlib
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_distill.errors import ConfigError, RankStopped, RunError
from accel_distill.publish import told_errors

LOOKS_TO_DIE = 12  # without a sign of life; a look is every BEAT seconds
LOOKS_UNHELD = 25  # of a rank whose lock was never seen held: all depends on its count, which may come late
BEAT = 2.0
SIZE = 4096  # bytes, written whole and in place: it needs no room on a full disk
LONGEST_REASON = 1500  # characters


def make_files(scratch: Path, run: str, *, world_size: int) -> None:
    """Make the files of a run's ranks; for rank 0, before the others look. Raises as `publish` for the disk."""
    with told_errors(scratch, "a file for each rank was to be made"):
        for rank in range(world_size):
            with open(scratch / f"{run}-{rank}", "xb") as file:
                file.write(_content({"beats": 0}))


@dataclass
class _Seen:
    """What the last look at a rank found."""

    content: bytes = b""
    looks: int = 0  # that found the same
    was_held: bool = False  # so that locks do reach from there to here


class Ranks:
    """The ranks of a run, as one of them (`rank`) sees the others and is seen by them."""

    def __init__(self, scratch: Path, run: str, *, rank: int, world_size: int) -> None:
        """Take this rank's file. `run` names the run, as `make_files` was told.

        Raises ConfigError where this host does not see the file that rank 0 has made.
        """
        self._scratch, self._run, self._rank = scratch, run, rank
        after = {(rank + (1 << n)) % world_size for n in range(world_size.bit_length())}
        self._seen = {other: _Seen() for other in sorted(after - {rank})}
        self._beats, self._has_failed = 0, False
        self._file = self._open()
        with contextlib.suppress(OSError):  # without locks the count alone is looked at
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self.beat()

    def beat(self) -> None:
        """Give a sign of life."""
        self._beats += 1
        self._write({"beats": self._beats, "host": socket.gethostname(), "pid": os.getpid()})

    def look(self) -> None:
        """Look at the others; raise RankStopped where one has died or has said that it stops."""
        for other, seen in self._seen.items():
            with contextlib.suppress(OSError):  # a rank that is done has removed its file; a disk may be slow to answer
                content, is_held = self._read(other)
                said = _parsed(content)
                if "reason" in said:
                    raise RankStopped(said["reason"], exit_status=said["status"], is_told=True)
                seen.looks = seen.looks + 1 if content == seen.content and not is_held else 0
                seen.content, seen.was_held = content, seen.was_held or is_held
                if seen.looks >= (LOOKS_TO_DIE if seen.was_held else LOOKS_UNHELD):
                    raise RankStopped(
                        f"rank {other} (process {said.get('pid', 'unknown')} on {said.get('host', 'an unknown host')}) "
                        "has died; what was published is kept: run the same command again"
                    )

    def leave(self) -> None:
        """Say nothing more, and be no longer looked at: this rank is done."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(self._rank))

    def fail(self, reason: str, *, status: int) -> None:
        """Say why this rank stops, the first time: the others then stop with the same exit status."""
        if not self._has_failed:
            self._write({"reason": reason[:LONGEST_REASON], "status": status})
            self._has_failed = True

    def close(self) -> None:
        """Let go of the file; remove it where nobody looks at it."""
        if not self._seen:
            self.leave()
        os.close(self._file)

    def _path(self, rank: int) -> Path:
        return self._scratch / f"{self._run}-{rank}"

    def _open(self) -> int:
        """Open this rank's file."""
        try:
            with told_errors(self._scratch, "a rank was to count in its file"):
                return os.open(self._path(self._rank), os.O_RDWR | os.O_CLOEXEC)
        except RunError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise ConfigError(
                f"cache.path: host {socket.gethostname()} does not see in {self._scratch} what rank 0 has made there; "
                "name a directory that all hosts of the run share"
            ) from error

    def _write(self, said: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # what is amiss with the disk is told by who writes shards to it
            os.pwrite(self._file, _content(said), 0)
            os.fsync(self._file)  # over NFS the other hosts may see it only half a minute later otherwise

    def _read(self, rank: int) -> tuple[bytes, bool]:
        """Return what a rank's file says, and whether somebody holds it."""
        descriptor = os.open(self._path(rank), os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(descriptor, SIZE, 0)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return content, True
            except OSError:  # a file system without locks
                return content, False
            return content, False
        finally:
            os.close(descriptor)


def _content(said: dict[str, Any]) -> bytes:
    return json.dumps(said).encode().ljust(SIZE)


def _parsed(content: bytes) -> dict[str, Any]:
    """Return what a file says; nothing while it is being written."""
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}
