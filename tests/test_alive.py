"""Who is alive: a rank counts as dead when nobody holds its file and its count stands still, and not before."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from accel_distill.alive import BEAT, LOOKS_TO_DIE, LOOKS_UNHELD, Ranks, make_files
from accel_distill.errors import ConfigError, RankStopped


def ranks(scratch: Path, world_size: int) -> list[Ranks]:
    """Return all ranks of a run, each as a process of its own would hold it."""
    make_files(scratch, "host.1.run", world_size=world_size)
    return [Ranks(scratch, "host.1.run", rank=rank, world_size=world_size) for rank in range(world_size)]


def look(rank: Ranks, times: int) -> None:
    for _ in range(times):
        rank.look()


def test_a_rank_that_holds_its_file_is_alive_however_long_it_is_silent(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2)
    look(first, 10 * LOOKS_TO_DIE)
    look(second, 10 * LOOKS_TO_DIE)


def test_a_rank_whose_file_nobody_holds_is_dead_after_so_many_looks(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2)
    first.look()
    second.close()
    look(first, LOOKS_TO_DIE - 1)
    with pytest.raises(
        RankStopped, match=r"rank 1 \(process \d+ on .*\) has died; .* run the same command again"
    ) as dead:
        look(first, 2)
    assert (dead.value.exit_status, dead.value.is_told) == (1, False)


def test_a_rank_that_never_took_its_file_is_dead_after_so_many_looks(tmp_path: Path) -> None:
    make_files(tmp_path, "host.1.run", world_size=2)
    first = Ranks(tmp_path, "host.1.run", rank=0, world_size=2)
    with pytest.raises(RankStopped, match=r"rank 1 \(process unknown on an unknown host\) has died"):
        look(first, LOOKS_UNHELD + 2)


def test_a_host_that_does_not_see_the_caches_directory_is_one_sentence(tmp_path: Path) -> None:
    """Each host has a directory of that name of its own; rank 0 made the files in another one."""
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match=r"cache.path: host .* does not see in .*here what rank 0 .* all hosts"):
        Ranks(tmp_path / "here", "host.1.run", rank=1, world_size=2)


def test_where_locks_do_not_reach_a_rank_that_counts_on_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = ranks(tmp_path, 2)
    for _ in range(5 * LOOKS_UNHELD):
        second.beat()
        first.look()
    with pytest.raises(RankStopped, match="rank 1"):
        look(first, LOOKS_UNHELD + 1)


def test_where_locks_do_not_reach_a_count_that_comes_late_is_waited_for_and_a_death_is_told_within_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: what a rank writes may show on another host half a minute later."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # each host gets the lock
    first, second = ranks(tmp_path, 2)
    late = int(40 / BEAT)
    for _ in range(4):
        second.beat()
        look(first, late)
    with pytest.raises(RankStopped, match="rank 1"):
        look(first, int(54 / BEAT) - late)


def test_a_sign_of_life_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = ranks(tmp_path, 1)
    steps: list[str] = []
    for name in ("pwrite", "fsync"):
        monkeypatch.setattr(os, name, lambda *_, name=name: steps.append(name))
    alone.beat()
    assert steps == ["pwrite", "fsync"]


def test_why_a_rank_stops_reaches_all_others_with_its_exit_status(tmp_path: Path) -> None:
    world = ranks(tmp_path, 9)
    world[5].fail("rank 5 stopped: the disk is full", status=4)
    world[5].close()
    told, looks = {5}, 0
    while len(told) < 9:
        looks += 1
        for number in set(range(9)) - told:
            try:
                world[number].look()
            except RankStopped as error:
                assert str(error) == "rank 5 stopped: the disk is full"
                assert (error.exit_status, error.is_told) == (4, True)
                world[number].fail(str(error), status=error.exit_status)
                told.add(number)
    assert looks <= 4  # the base-2 logarithm of 9, rounded up


def test_the_first_reason_stays(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2)
    second.fail("the first", status=4)
    second.fail("the second", status=1)
    with pytest.raises(RankStopped, match="the first"):
        first.look()


def test_a_rank_that_is_done_is_not_missed_and_leaves_no_file(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2)
    second.leave()
    second.close()
    look(first, 3 * LOOKS_TO_DIE)
    first.leave()
    assert list(tmp_path.iterdir()) == []


def test_a_rank_alone_looks_at_nobody_and_leaves_no_file_when_it_fails(tmp_path: Path) -> None:
    (alone,) = ranks(tmp_path, 1)
    look(alone, 3)
    alone.fail("it stopped", status=1)
    alone.close()
    assert list(tmp_path.iterdir()) == []


def test_half_a_line_is_no_reason_and_no_death(tmp_path: Path) -> None:
    first, _ = ranks(tmp_path, 2)
    (tmp_path / "host.1.run-1").write_bytes(b'{"reas')
    look(first, 3)


@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 13])
def test_every_rank_is_looked_at(world_size: int, tmp_path: Path) -> None:
    world = ranks(tmp_path, world_size)
    assert set().union(*(rank._seen for rank in world)) == set(range(world_size))
    assert all(rank not in each._seen for rank, each in enumerate(world))
