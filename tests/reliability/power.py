"""A file system that forgets: what `publish.py` asks of `os`, in memory, with the states that a power cut may leave.

Nothing is durable but what fsync made so: the bytes of a file by fsync of the file, the names in a directory by fsync
of the directory. At a power cut each name made or removed since then may be there or not, each by itself, and of the
bytes written since then any prefix, the rest of the file's length being zeros or absent.
"""

import errno
import os as real_os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class PowerCut(BaseException):
    """The machine is off; nothing runs after it."""


class Killed(BaseException):
    """The process is gone; the machine goes on."""


@dataclass
class File:
    """A file: its bytes now, and those that a power cut leaves for certain."""

    data: bytes = b""
    durable: bytes = b""


@dataclass
class Directory:
    """Names to files: now, and for certain."""

    names: dict[str, File] = field(default_factory=dict)
    durable: dict[str, File] = field(default_factory=dict)


class ForgetfulOs:
    """Stands for the module `os` in publish.py. `before` is called before each step, and may cut the power."""

    def __init__(self, *directories: str, before: Callable[[str], None] = lambda step: None) -> None:
        self.directories = {name: Directory() for name in directories}
        self.before = before
        self.has_links = True
        self.syncs_files = self.syncs_directories = True
        self._open: dict[int, File | Directory] = {}
        self._next = 100

    def __getattr__(self, name: str) -> Any:
        """Constants and getpid are the real ones; a call that is not modelled here fails the test."""
        assert name.startswith("O_") or name == "getpid", f"publish.py uses os.{name}, which is not modelled"
        return getattr(real_os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self.before("open")
        target: File | Directory
        if flags & real_os.O_DIRECTORY:
            target = self.directories[str(path)]
        else:
            assert flags & real_os.O_CREAT and flags & real_os.O_EXCL
            names, name = self._place(path)
            self._refuse_taken(names, name)
            target = names[name] = File()
        self._next += 1
        self._open[self._next] = target
        return self._next

    def write(self, descriptor: int, data: Any) -> int:
        self.before("write")
        file, part = self._open[descriptor], bytes(data)[: max(1, len(data) // 2)]  # never all at once
        assert isinstance(file, File)
        file.data += part
        return len(part)

    def fsync(self, descriptor: int) -> None:
        self.before("fsync")
        target = self._open[descriptor]
        if isinstance(target, File):
            target.durable = target.data if self.syncs_files else target.durable
        elif self.syncs_directories:
            target.durable = dict(target.names)

    def fstat(self, descriptor: int) -> Any:
        self.before("fstat")
        file = self._open[descriptor]
        assert isinstance(file, File)
        return real_os.stat_result((0, 0, 0, 0, 0, 0, len(file.data), 0, 0, 0))

    def close(self, descriptor: int) -> None:
        self.before("close")
        del self._open[descriptor]

    def link(self, source: Any, target: Any) -> None:
        self.before("link")
        if not self.has_links:
            raise OSError(errno.EPERM, "Operation not permitted")
        names, name = self._place(target)
        self._refuse_taken(names, name)
        from_names, from_name = self._place(source)
        names[name] = from_names[from_name]

    def rename(self, source: Any, target: Any) -> None:
        self.before("rename")
        from_names, from_name = self._place(source)
        names, name = self._place(target)
        names[name] = from_names.pop(from_name)

    replace = rename

    def unlink(self, path: Any) -> None:
        self.before("unlink")
        names, name = self._place(path)
        if name not in names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        del names[name]

    @property
    def path(self) -> "ForgetfulOs":
        """As `os.path`: knows `exists` only."""
        return self

    def exists(self, path: Any) -> bool:
        names, name = self._place(path)
        return name in names

    def cut(self, choice: random.Random) -> None:
        """Come back after a power cut, in one of the states that it may leave."""
        self._open.clear()
        for directory in self.directories.values():
            names = {}
            for name in sorted({*directory.names, *directory.durable}):
                now, then = directory.names.get(name), directory.durable.get(name)
                file = choice.choice([now, then])
                if file is not None:
                    names[name] = file
            directory.names, directory.durable = names, dict(names)
        for file in {id(file): file for each in self.directories.values() for file in each.names.values()}.values():
            if file.data != file.durable:
                kept = file.data[: choice.randrange(len(file.durable), len(file.data) + 1)]
                file.data = choice.choice([kept, kept.ljust(len(file.data), b"\0")])
            file.durable = file.data

    def _place(self, path: Any) -> tuple[dict[str, File], str]:
        directory, _, name = str(path).rpartition("/")
        return self.directories[directory].names, name

    def _refuse_taken(self, names: dict[str, File], name: str) -> None:
        if name in names:
            raise FileExistsError(errno.EEXIST, "File exists")
