"""A disk that fills up, at many points: exit status 4 and one sentence, nothing half-written, and the run goes on."""

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_cache import make_cache, make_rows
from tiny import write_jsonl

from accel_distill import generate as command
from accel_distill.alive import Ranks, make_files
from accel_distill.config import DatasetConfig
from accel_distill.disk_space import DiskSpace
from accel_distill.errors import DiskGuard, RunError
from accel_distill.manifest import make_directories, remove_superseded, scratch, withdraw_manifest
from accel_distill.publish import publish
from accel_distill.stream import TextStream
from accel_distill.verify import set_aside
from reliability.forked import Changed, Fails, Faults, Run
from reliability.place import Place, kept, make_place

POINTS = 20
TMPFS_BYTES = 4_000_000


class SmallFiles(Faults):
    """No published file may be larger than this; whoever writes on gets SIGXFSZ, as with `ulimit -f`."""

    def __init__(self, most: int) -> None:
        self.most = most

    def apply(self) -> None:
        from accel_distill import publish as publishing

        def write(descriptor: int, data: bytes) -> int:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)  # not while torch makes shared memory: a file, too
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, before[1]))
            try:
                return os.write(descriptor, data)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        publishing.os = Changed(write=write)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A teacher, data, and the bytes of the cache that is never interrupted."""
    return make_place(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 4 MB; skips where this process may not mount one."""
    path = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def sentence(run: Run) -> str:
    """Return the one sentence with which a run of one rank ended."""
    said = run.said(0)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


def finished(place: Place, run_file: Path, *, world_size: int = 1) -> None:
    """Assert that the same command goes on to the same bytes."""
    run = Run(run_file, world_size)
    assert run.wait() == [0] * world_size, run.said(0)
    assert kept(run_file.parent / "cache") == place.whole


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_of_twenty_points_ends_in_status_4_and_goes_on(
    place: Place, small_disk: Path
) -> None:
    """A real full disk: a ballast leaves room for so much of the cache, and is taken away for the second run."""
    needed, stopped = sum(map(len, place.whole.values())), 0
    for point in range(POINTS):
        directory = small_disk / "run"
        run_file = place.run_file(directory, cache={"min_free_disk": 0})
        room = needed * point // POINTS
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "ballast").write_bytes(b"x" * (free - room))
        run = Run(run_file, 1)
        (status,) = run.wait()
        assert status == 4, (point, run.said(0))
        said = sentence(run)
        assert "no space is left on the disk" in said or "free, and needed are" in said
        assert "run the same command again" in said and "a lower dataset.max_samples" in said
        stopped += place.check_part(directory / "cache") > 0
        (small_disk / "ballast").unlink()
        finished(place, run_file)
        shutil.rmtree(directory)
    assert stopped > POINTS // 2, "most runs stopped before their first shard"


@pytest.mark.slow
def test_a_file_that_may_grow_no_further_ends_in_status_4_and_in_no_signal(place: Place, tmp_path: Path) -> None:
    largest = max(len(content) for name, content in place.whole.items() if name.startswith("shards/"))
    smallest = min(len(content) for name, content in place.whole.items() if name.startswith("shards/"))
    run_file = place.run_file(tmp_path)
    finished(place, place.run_file(tmp_path / "ready"))
    for most in (0, 1, 1000, 4096, smallest - 1, largest - 1):
        run = Run(run_file, 1, faults={0: SmallFiles(most)})
        assert run.wait() == [4], run.said(0)
        assert "the file would be larger than is allowed here (ulimit -f)" in sentence(run)
        place.check_part(tmp_path / "cache") if (tmp_path / "cache").exists() else None
    finished(place, run_file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EDQUOT, "the disk quota is used up"), (errno.EROFS, "the file system is read-only")],
)
@pytest.mark.parametrize("after", [0, 5])
def test_a_quota_and_a_disk_that_turns_read_only_are_status_4(
    code: int, words: str, after: int, place: Place, tmp_path: Path
) -> None:
    run_file = place.run_file(tmp_path)
    run = Run(run_file, 1, faults={0: Fails(code, after=after)})
    assert run.wait() == [4]
    assert words in sentence(run)
    assert place.check_part(tmp_path / "cache") == after
    finished(place, run_file, world_size=2)


@pytest.mark.slow
def test_without_hard_links_the_cache_has_the_same_bytes(place: Place, tmp_path: Path) -> None:
    run = Run(place.run_file(tmp_path), 1, faults={0: NoLinks()})
    assert run.wait() == [0], run.said(0)
    assert kept(tmp_path / "cache") == place.whole


class NoLinks(Faults):
    """A file system without hard links."""

    def apply(self) -> None:
        from accel_distill import publish as publishing

        def link(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        publishing.os = Changed(link=link)  # type: ignore[assignment]


class Unprivileged(Faults):
    """Run without root's right to write where nobody may."""

    def apply(self) -> None:
        none = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
        version = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None).capset(version, none) == 0


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_a_directory_that_may_not_be_written_to_is_one_sentence(begun: bool, place: Place, tmp_path: Path) -> None:
    run_file = place.run_file(tmp_path / "run")
    if begun:
        finished(place, run_file)
        (tmp_path / "run" / "cache" / "manifest.json").unlink()
        shutil.rmtree(tmp_path / "run" / "cache" / "logs")
    (tmp_path / "run" / "cache").mkdir(exist_ok=True)
    for path in (tmp_path / "run" / "cache").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "run" / "cache").chmod(0o555)
    run = Run(run_file, 1, faults={0: Unprivileged()})
    (status,) = run.wait()
    assert status in (1, 2), run.said(0)
    said = sentence(run)
    assert str(tmp_path / "run" / "cache") in said and "Permission denied" in said


# ---- the guard, which looks before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({"min_free_disk": "99.9999%"}, "free, and needed are"),
        ({"max_bytes": 20_000}, "and cache.max_bytes allows 20 KB"),
        ({"max_bytes": "150KB"}, "and cache.max_bytes allows 150 KB"),
    ],
)
def test_too_little_room_stops_before_the_disk_does(
    cache: dict[str, object], words: str, place: Place, tmp_path: Path
) -> None:
    run = Run(place.run_file(tmp_path, cache=cache), 2)
    assert run.wait() == [4, 4]
    said = run.said(0) + run.said(1)
    assert words in said and "run the same command again" in said
    assert f"cache {tmp_path / 'cache'}: " in said
    shards = place.check_part(tmp_path / "cache")
    assert shards == 0 if cache.get("max_bytes") != "150KB" else 0 < shards < 21
    finished(place, place.run_file(tmp_path), world_size=2)


def test_before_a_shard_twice_its_size_must_be_free_beside_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = set_free(monkeypatch, 1_000_000)
    space = DiskSpace(tmp_path, min_free="500KB", max_bytes=None)
    space.check(coming=250_000)
    with pytest.raises(DiskGuard, match=r"has 1 MB free, and needed are 500 KB that stay free \(cache.min_free_disk\)"):
        space.check(coming=250_001)
    free["bytes"] = 499_999
    with pytest.raises(DiskGuard, match="has 500 KB free"):
        space.check()


def test_the_default_reserve_is_a_share_of_a_small_disk_and_20_gb_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = set_free(monkeypatch, 49_999_999, total=10**9)
    space = DiskSpace(tmp_path, min_free=None, max_bytes=None)
    with pytest.raises(DiskGuard, match="needed are 50 MB"):
        space.check()
    disk |= {"bytes": 20 * 10**9, "total": 10**15}
    space.check()
    with pytest.raises(DiskGuard, match="needed are 50 TB"):
        DiskSpace(tmp_path, min_free="5%", max_bytes=None).check()  # said so, it is meant so
    disk |= {"bytes": 0, "total": 0}
    space.check()  # a file system that does not tell


def set_free(monkeypatch: pytest.MonkeyPatch, free: int, *, total: int = 10**9) -> dict[str, int]:
    """Let the disk have so much room; return what to change it by."""
    disk = {"bytes": free, "total": total}

    def statvfs(path: Path) -> os.statvfs_result:
        blocks = (1, 1, disk["total"], disk["total"], disk["bytes"], 0, 0, 0, 0, 255)
        return os.statvfs_result(blocks)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return disk


def test_the_quota_counts_every_file_and_a_shard_only_once(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name, size in {"cache.json": 10, "shards/shard-000000-000-4.h5": 100}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    space = DiskSpace(tmp_path, min_free=0, max_bytes=150)
    assert space.used() == 110
    space.check(coming=40)
    with pytest.raises(
        DiskGuard, match="it has 110 bytes, and the next shard 41 bytes more, and cache.max_bytes allows"
    ):
        space.check(coming=41)
    (tmp_path / "shards" / "shard-000000-001-4.h5").write_bytes(b"x" * 50)
    assert space.used() == 160
    (tmp_path / "cache.json").unlink()
    with pytest.raises(DiskGuard, match="it has 150 bytes") if space.used() > 150 else pytest.raises(DiskGuard):
        space.check(coming=1)


def test_a_cache_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory; was the directory removed?"):
        DiskSpace(tmp_path / "gone", min_free=0, max_bytes=None).check()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_for_a_directory_or_for_the_datasets_own_files_is_full_too(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "/home/ann/.cache/huggingface/datasets")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(DiskGuard, match="cache.path: .* cannot be made"):
            make_directories(tmp_path / "cache")
    monkeypatch.setattr("datasets.load_dataset", full)
    data = write_jsonl(tmp_path / "data.jsonl", ["a"])
    config = DatasetConfig(name="json", data_files=[str(data)], max_samples=1, eval_samples=0)
    with pytest.raises(DiskGuard, match=r"\(train\): .* \(/home/ann/.cache/huggingface/datasets\); make room"):
        TextStream(config)


@pytest.mark.parametrize(
    ("code", "error"), [(errno.EROFS, DiskGuard), (errno.ENOSPC, DiskGuard), (errno.EACCES, RunError)]
)
@pytest.mark.parametrize("step", ["ranks", "rank", "manifest", "superseded", "aside", "shards"])
def test_what_a_disk_refuses_beside_the_writing_of_files_is_one_sentence_too(
    step: str, code: int, error: type[RunError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_cache(tmp_path, make_rows([[9], [4], [2], [7]]), samples_per_shard=2)
    record.shard_path(0, 0, 1).write_bytes(b"short")
    steps: dict[str, Callable[[], object]] = {
        "ranks": lambda: make_files(scratch(tmp_path), "host.1.run", world_size=1),
        "rank": lambda: Ranks(scratch(tmp_path), "host.1.run", rank=0, world_size=1),
        "manifest": lambda: withdraw_manifest(tmp_path),
        "superseded": lambda: remove_superseded(record, 4),
        "aside": lambda: set_aside(record.shard_path(0, 0, 2)),
        "shards": lambda: command._sync_shards(record),
    }

    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        for name in ("open", "unlink", "link", "rename"):
            patch.setattr(os, name, refused)
        patch.setattr("builtins.open", refused)
        with pytest.raises(error, match=rf"{tmp_path}.*: ") as told:
            steps[step]()
    assert type(told.value) is error and len(str(told.value).splitlines()) == 1


def test_a_device_that_is_always_full_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes no byte: the error is the kernel's own."""
    real = os.open

    def opened(path: Path, flags: int, *mode: int) -> int:
        return real("/dev/full", os.O_WRONLY) if flags & os.O_CREAT else real(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(DiskGuard, match="no space is left on the disk"):
        publish(b"x", tmp_path / "shard", scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_python_ignores_the_signal_of_a_file_that_is_too_large() -> None:
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
