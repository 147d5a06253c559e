"""A file of a cache is whole or not there: every step of publishing is made to fail in turn."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel_distill.errors import DiskGuard, RunError
from accel_distill.publish import publish, remove_stale, replace

DATA = bytes(range(256)) * 40


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """The final path of a file, and the scratch directory."""
    (tmp_path / "shards").mkdir()
    (tmp_path / ".tmp").mkdir()
    return tmp_path / "shards" / "shard", tmp_path / ".tmp"


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def left_behind(path: Path, scratch: Path) -> list[Path]:
    return [*path.parent.iterdir(), *scratch.iterdir()]


def test_publish_writes_the_bytes_and_leaves_nothing_else(place: tuple[Path, Path]) -> None:
    path, scratch = place
    assert publish(DATA, path, scratch=scratch) is True
    assert left_behind(*place) == [path]
    assert path.read_bytes() == DATA


def test_publish_leaves_a_file_that_is_there_and_says_so(place: tuple[Path, Path]) -> None:
    path, scratch = place
    path.write_bytes(b"first")
    assert publish(DATA, path, scratch=scratch) is False
    assert path.read_bytes() == b"first"
    assert left_behind(*place) == [path]


def test_the_name_appears_only_when_all_is_written_and_synced(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch = place
    steps: list[str] = []
    real = {name: getattr(os, name) for name in ("write", "fsync", "link")}

    def watched(name: str) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            assert name != "link" or Path(arguments[0]).read_bytes() == DATA
            assert path.exists() == ("link" in steps)
            steps.append(name)
            if name == "write":  # as a busy disk may: a part only
                return real[name](arguments[0], bytes(arguments[1])[:3000])
            return real[name](*arguments)

        return step

    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    assert publish(DATA, path, scratch=scratch)
    assert steps == ["write"] * 4 + ["fsync", "link", "fsync"]  # 10,240 bytes; the file, its name, its directory


@pytest.mark.parametrize("step", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_a_full_or_read_only_disk_is_a_disk_guard_and_leaves_nothing(
    step: str, code: int, words: str, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch = place
    monkeypatch.setattr(os, step, failing(code))
    with pytest.raises(DiskGuard, match=words) as caught:
        publish(DATA, path, scratch=scratch)
    monkeypatch.undo()
    assert str(path) in str(caught.value) and "10,240 bytes" in str(caught.value)
    assert left_behind(*place) == []


@pytest.mark.parametrize("step", ["open", "write", "fsync", "link"])
def test_any_other_error_of_the_disk_is_told_and_leaves_nothing(
    step: str, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch = place
    monkeypatch.setattr(os, step, failing(errno.EIO))
    with pytest.raises(RunError, match=r"shards/shard: cannot be written \(Input/output error\)"):
        publish(DATA, path, scratch=scratch)
    monkeypatch.undo()
    assert left_behind(*place) == []


def test_an_fsync_that_failed_is_not_tried_again(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError):
        publish(DATA, place[0], scratch=place[1])
    assert len(calls) == 1


def test_an_interrupt_while_writing_leaves_nothing(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(DATA, place[0], scratch=place[1])
    assert left_behind(*place) == []


def test_a_file_that_is_shorter_than_what_was_written_is_refused(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data))  # a disk that lies
    with pytest.raises(RunError, match="0 bytes were written where 10240 were given"):
        publish(DATA, place[0], scratch=place[1])
    assert left_behind(*place) == []


def test_a_read_only_disk_is_told_where_the_temporary_file_cannot_be_removed_either(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EROFS))
    monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
    with pytest.raises(DiskGuard, match="read-only"):
        publish(DATA, place[0], scratch=place[1])


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_without_hard_links_the_file_is_renamed(
    code: int, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch = place
    monkeypatch.setattr(os, "link", failing(code))
    assert publish(DATA, path, scratch=scratch) is True
    assert path.read_bytes() == DATA
    assert publish(b"second", path, scratch=scratch) is False
    assert path.read_bytes() == DATA
    assert left_behind(*place) == [path]


def test_replace_puts_new_bytes_in_the_place_of_old_ones(place: tuple[Path, Path]) -> None:
    path, scratch = place
    replace(b"first", path, scratch=scratch)
    replace(DATA, path, scratch=scratch)
    assert path.read_bytes() == DATA
    assert left_behind(*place) == [path]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_replacement_that_fails_keeps_the_old_bytes(
    step: str, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scratch = place
    replace(b"first", path, scratch=scratch)
    monkeypatch.setattr(os, step, failing(errno.ENOSPC))
    with pytest.raises(DiskGuard):
        replace(DATA, path, scratch=scratch)
    monkeypatch.undo()
    assert path.read_bytes() == b"first"
    assert left_behind(*place) == [path]


def test_remove_stale_removes_what_dead_processes_of_this_host_left_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    host, dead = socket.gethostname(), done.pid
    stale = tmp_path / f"{host}.{dead}.0123456789abcdef"
    kept = [
        tmp_path / f"{host}.{os.getpid()}.0123456789abcdef",  # alive: this process
        tmp_path / f"{host}.1.0123456789abcdef",  # alive, of another user
        tmp_path / f"other-{host}.{dead}.0123456789abcdef",
        tmp_path / f"{host}.x{dead}.0123456789abcdef",
        tmp_path / "notes.txt",
    ]
    for path in [stale, *kept]:
        path.write_bytes(b"x")
    assert remove_stale(tmp_path) == 1
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_remove_stale_passes_over_what_it_may_not_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a cache that is read-only."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"{socket.gethostname()}.{dead.pid}.left"
    left.write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EACCES))
        assert remove_stale(tmp_path) == 0
    assert remove_stale(tmp_path) == 1
