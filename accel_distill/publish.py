"""How a file of the cache gets its name: written whole under a temporary name, fsynced, then linked.

The one decision: a file under its final name is complete, always; its name appearing is the commit. The price is two
fsyncs a file. HDF5 itself never touches the disk: killed while appending, none of its files could be opened again.

Every step goes through the module `os` and nothing else, and the tests put a kill, or a file system that forgets, in
its place. The steps: open, write, fsync, fstat, close; link (without hard links: rename); open, fsync and close the
directory; unlink the temporary name.
"""

import contextlib
import errno
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from accel_distill.errors import TO_GO_ON, DiskGuard, RunError

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
DISK_ERRORS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would be larger than is allowed here (ulimit -f)",
}


def publish(data: bytes, path: Path, *, scratch: Path) -> bool:
    """Give `data` its final name, durably; return False, leaving it, where a file of that name is there already.

    That name is durable too then: who made it may have died before its directory was synced. `scratch` is a directory
    of the same file system. Raises DiskGuard for a full or read-only disk, RunError for any other failure of it.
    """
    with _written(data, path, scratch) as temporary:
        is_new = _linked(temporary, path)
        sync_directory(path.parent)
    return is_new


def replace(data: bytes, path: Path, *, scratch: Path) -> None:
    """Put `data` in the place of the file `path`, durably and atomically."""
    with _written(data, path, scratch) as temporary:
        os.replace(temporary, path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(scratch: Path) -> int:
    """Remove what dead processes of this host left in `scratch`; return how many files.

    What may not be removed, as in a cache that is read-only, is passed over: it does no harm.
    """
    removed = 0
    for path in sorted(scratch.iterdir()):
        host, _, rest = path.name.rpartition(".")[0].rpartition(".")
        if host == socket.gethostname() and rest.isdigit() and not _alive(int(rest)):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def temporary_name(unique: str) -> str:
    """Return a name for a file in a scratch directory: `remove_stale` knows from it whose it was."""
    return f"{socket.gethostname()}.{os.getpid()}.{unique}"


@contextlib.contextmanager
def told_errors(path: Path, what: str) -> Iterator[None]:
    """Raise DiskGuard for a full or read-only disk, RunError for whatever else the file system says of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise DiskGuard(f"{path}: {DISK_ERRORS[error.errno]} ({what}); make room, {TO_GO_ON}") from error
        hint = "; was the directory removed?" if error.errno == errno.ENOENT else ""
        raise RunError(f"{path}: cannot be written ({error.strerror}{hint}); nothing half-written was kept") from error


@contextlib.contextmanager
def _written(data: bytes, path: Path, scratch: Path) -> Iterator[Path]:
    """Write `data` durably under a temporary name, which is gone at the end, whatever happens."""
    temporary = scratch / temporary_name(uuid.uuid4().hex)
    try:
        with told_errors(path, f"{len(data):,} bytes were to be written"):
            _write(data, temporary)
            yield temporary
    finally:
        with contextlib.suppress(OSError):  # not there, or the disk takes nothing more: `remove_stale` comes by
            os.unlink(temporary)


def _linked(temporary: Path, path: Path) -> bool:
    """Give the file its name; return False where that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.exists(path):
            return False
        os.rename(temporary, path)
    return True


def _write(data: bytes, path: Path) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        if (size := os.fstat(descriptor).st_size) != len(data):
            raise OSError(errno.EIO, f"{size} bytes were written where {len(data)} were given", str(path))
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
