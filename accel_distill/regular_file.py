"""Opening a file that may be anything, and reading a JSON object that may hold anything.

The one decision: what is opened is a regular file and no link, read up to a limit. Opening a FIFO would hang, a link
could lead anywhere, and a file that is nested deep or has grown huge would cost the memory of a large one.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20


def open_regular(path: Path) -> int:
    """Return a descriptor for reading; raise OSError, whose `strerror` says what is wrong, for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is not a regular file", str(path)) from error  # a socket
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def read_regular(path: Path, *, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes; raise OSError as `open_regular` does."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, expected at most {limit:,}", str(path))
        return file.read(limit)


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for anything else and for deep nesting."""
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS: fetch the file itself with `git lfs pull`")
    if data.lstrip()[:1] == b"<":
        raise ValueError("it is a web page or XML, not JSON: download the file itself")
    try:
        content = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is not JSON that belongs here (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, expected an object")
    return content
