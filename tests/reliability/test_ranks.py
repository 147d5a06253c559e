"""A rank dies, is slow, fails, or has company: the others notice in a bounded time, and only what is so."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from reliability.forked import Fails, Run, Slow, running
from reliability.place import Place, kept, make_place

SLOW = 0.2  # seconds a shard: 21 of them take longer than the patience of a rank


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A teacher, data, and the bytes of the cache that is never interrupted."""
    return make_place(tmp_path_factory.mktemp("ranks"))


def wait_for_shards(cache: Path, count: int) -> None:
    """Wait until a run has begun to publish."""
    end = time.monotonic() + 60
    while not (cache / "shards").is_dir() or len(list((cache / "shards").iterdir())) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_rank_that_is_killed_stops_the_others_with_a_sentence_that_names_it(
    victim: int, place: Place, tmp_path: Path
) -> None:
    cache, run_file = tmp_path / "cache", place.run_file(tmp_path)
    with running(Run(run_file, 4, faults=dict.fromkeys(range(4), Slow(3600.0)))) as run:
        while not list((cache / ".tmp").glob("*-3") if cache.is_dir() else []):
            time.sleep(0.02)
        time.sleep(1.0)
        os.kill(run.ranks[victim].pid or 0, signal.SIGKILL)
        begun = time.monotonic()
        statuses = run.wait(60)
        assert time.monotonic() - begun < 30  # 2 s of patience here, 24 s by default
    assert statuses == [-9 if rank == victim else 1 for rank in range(4)]
    said = "".join(run.said(rank) for rank in range(4))
    assert f"rank {victim} (process {run.ranks[victim].pid} on " in said
    assert "has died; what was published is kept: run the same command again" in said
    assert "Traceback" not in said
    assert Run(run_file, 2).wait() == [0, 0]
    assert kept(cache) == place.whole


@pytest.mark.slow
def test_a_rank_that_is_paused_longer_than_that_is_waited_for(place: Place, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with running(Run(place.run_file(tmp_path), 2, faults={1: Slow(SLOW)}, patience=1.0)) as run:
        wait_for_shards(cache, 2)
        os.kill(run.ranks[1].pid or 0, signal.SIGSTOP)
        time.sleep(4.0)
        assert run.ranks[0].is_alive()
        os.kill(run.ranks[1].pid or 0, signal.SIGCONT)
        assert run.wait() == [0, 0], run.said(0)
    assert kept(cache) == place.whole


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_stops_all_with_its_exit_status(place: Place, tmp_path: Path) -> None:
    run_file = place.run_file(tmp_path)
    faults = {0: Slow(SLOW), 1: Fails(errno.ENOSPC, after=2), 2: Slow(SLOW)}
    run = Run(run_file, 3, faults=faults)
    assert run.wait() == [4, 4, 4]
    assert run.said(1).count("error: ") == 1 and "no space is left on the disk" in run.said(1)
    assert "error: rank 1 stopped: " in run.said(0) and "no space is left" in run.said(0)
    assert "error: " not in run.said(2)
    assert place.check_part(tmp_path / "cache") < 21
    assert Run(run_file, 2).wait() == [0, 0]
    assert kept(tmp_path / "cache") == place.whole


@pytest.mark.slow
def test_two_runs_at_once_end_in_the_same_bytes_and_complain_of_nothing(place: Place, tmp_path: Path) -> None:
    run_file = place.run_file(tmp_path)
    first, second = Run(run_file, 2), Run(run_file, 3)
    assert first.wait() + second.wait() == [0] * 5, first.said(0) + second.said(0)
    for run in (first, second):
        assert "error" not in run.said(0) and "Traceback" not in run.said(0)
    assert kept(tmp_path / "cache") == place.whole


@pytest.mark.slow
def test_one_of_two_runs_at_once_is_killed_and_the_other_does_not_care(place: Place, tmp_path: Path) -> None:
    cache, run_file = tmp_path / "cache", place.run_file(tmp_path)
    with running(Run(run_file, 2, faults={0: Slow(0.05), 1: Slow(0.05)})) as first:
        wait_for_shards(cache, 3)
        second = Run(run_file, 2)
        first.kill()
        assert second.wait() == [0, 0], second.said(0)
    assert kept(cache) == place.whole


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["cache", "cache/shards", "cache/.tmp"])
def test_a_directory_that_is_removed_while_a_run_works_is_one_sentence(gone: str, place: Place, tmp_path: Path) -> None:
    with running(Run(place.run_file(tmp_path), 2, faults={0: Slow(SLOW), 1: Slow(SLOW)})) as run:
        wait_for_shards(tmp_path / "cache", 2)
        shutil.rmtree(tmp_path / gone, ignore_errors=True)
        statuses = run.wait()
    said = run.said(0) + run.said(1)
    assert 0 not in statuses
    assert "Traceback" not in said, said
    assert str(tmp_path / "cache") in said and "No such file or directory" in said
