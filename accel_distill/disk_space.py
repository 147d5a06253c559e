"""Whether the disk has room for what comes: a reserve that stays free, and a quota for the cache.

The one decision: this is advice. It stops a run while everything still works; a write that fails all the same is told
in the same words, and neither leaves anything half-written. The price is one `statvfs` a look and, with a quota, a
listing of the cache in which only new shards are measured.
"""

import os
import re
from pathlib import Path

from accel_distill.errors import TO_GO_ON, DiskGuard
from accel_distill.publish import told_errors

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGTP]i?B|B)")
SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
UNITS = {"B": 1} | {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", start=1)}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)}
DEFAULT_SHARE = 0.05  # of the disk stays free ...
DEFAULT_MOST = 20 * 10**9  # ... but no more than this: 5 % of a cluster's file system is more than any cache


def parse_size(value: object) -> int | None:
    """Return bytes: of 20000000000, 20GB or 18.6GiB; None: it is not a size."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value >= 0 else None
    match = SIZE.fullmatch(value) if isinstance(value, str) else None
    return round(float(match[1]) * UNITS[match[2]]) if match else None


def parse_share(value: object) -> float | None:
    """Return 0.05 of 5%; None: it is not a share below 100 %."""
    match = SHARE.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) / 100 if match and float(match[1]) < 100 else None


def show_bytes(count: int) -> str:
    """Return a size for people: 1,234 bytes, 5.67 MB, 1.20 TB."""
    units = [f"{prefix}B" for prefix in "KMGTP"]
    fitting = [unit for unit in units if count >= UNITS[unit]]
    return f"{count / UNITS[fitting[-1]]:.3g} {fitting[-1]}" if count >= 10_000 else f"{count:,} bytes"


class DiskSpace:
    """The room for one cache."""

    def __init__(self, path: Path, *, min_free: int | str | None, max_bytes: int | str | None) -> None:
        """Take `cache.min_free_disk` and `cache.max_bytes` as the run file has them; None: the default, no quota."""
        self._path, self._min_free = path, min_free
        self._max_bytes = None if max_bytes is None else parse_size(max_bytes)
        self._measured: dict[str, int] = {}  # shards never change

    def check(self, *, coming: int = 0) -> None:
        """Raise DiskGuard where a file of `coming` bytes would leave too little room, RunError for no directory."""
        with told_errors(self._path, "looking for room"):
            self._check_free(coming)
            used = 0 if self._max_bytes is None else self.used()
        if self._max_bytes is not None and used + coming > self._max_bytes:
            raise DiskGuard(
                f"cache {self._path}: it has {show_bytes(used)}"
                + (f", and the next shard {show_bytes(coming)} more" if coming else "")
                + f", and cache.max_bytes allows {show_bytes(self._max_bytes)}; raise it, {TO_GO_ON}"
            )

    def used(self) -> int:
        """Return the bytes of all files of the cache."""
        return sum(self._sizes(self._path))

    def _check_free(self, coming: int) -> None:
        disk = os.statvfs(self._path)
        if not disk.f_blocks:
            return  # a file system that does not tell
        free, reserve = disk.f_bavail * disk.f_frsize, self._reserve(disk.f_blocks * disk.f_frsize)
        if free < 2 * coming + reserve:
            parts = f"{show_bytes(reserve)} that stay free (cache.min_free_disk)"
            parts += f" and twice the {show_bytes(coming)} of the next shard" if coming else ""
            raise DiskGuard(
                f"cache {self._path}: its disk has {show_bytes(free)} free, and needed are {parts}; make room or lower "
                f"cache.min_free_disk, {TO_GO_ON}"
            )

    def _reserve(self, total: int) -> int:
        if self._min_free is None:
            return min(round(DEFAULT_SHARE * total), DEFAULT_MOST)
        share = parse_share(self._min_free)
        return parse_size(self._min_free) or 0 if share is None else round(share * total)

    def _sizes(self, directory: Path) -> list[int]:
        sizes = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    sizes += self._sizes(Path(entry.path))
                elif entry.name in self._measured:
                    sizes.append(self._measured[entry.name])
                else:
                    sizes.append(self._size(entry))
        return sizes

    def _size(self, entry: "os.DirEntry[str]") -> int:
        try:
            size = entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # a temporary file that has its name now
            return 0
        if entry.name.startswith("shard-"):
            self._measured[entry.name] = size
        return size
