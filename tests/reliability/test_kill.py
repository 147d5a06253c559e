"""Kill -9 at every step of publishing and at random times: nothing false is ever there, and the end is the same."""

import random
import shutil
import time
from pathlib import Path

import pytest

from reliability.forked import Count, KillAt, Run, running
from reliability.place import Place, kept, make_place

WORLD_SIZES = (1, 2, 3, 4, 5)
SHARDS = 21
STEPS_OF_A_FILE = ["open", "write", "fsync", "fstat", "close", "link", "open", "fsync", "close", "unlink"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A teacher, data, and the bytes of the cache that is never interrupted."""
    return make_place(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def steps(place: Place, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every step of publishing of a whole run on one rank, as "link cache.json"."""
    directory = tmp_path_factory.mktemp("steps")
    assert Run(place.run_file(directory), 1, faults={0: Count(directory / "steps")}).wait() == [0]
    return (directory / "steps").read_text().splitlines()


def killed_and_finished(place: Place, directory: Path, n: int, *, world_size: int) -> int:
    """Kill a run before its n-th step, finish it on so many ranks; return how many shards the kill had left."""
    run_file = place.run_file(directory)
    assert Run(run_file, 1, faults={0: KillAt(n)}).wait() == [-9]
    left = place.check_part(directory / "cache")
    finish = Run(run_file, world_size)
    assert finish.wait() == [0] * world_size, finish.said(0)
    assert kept(directory / "cache") == place.whole
    assert list((directory / "cache" / ".tmp").iterdir()) == []
    shutil.rmtree(directory)
    return left


def around(steps: list[str], name: str) -> list[int]:
    """Return the numbers of the steps with which a file is published."""
    link = next(n for n, step in enumerate(steps) if step.startswith("link") and step.endswith(name))
    found = list(range(link - 5, link + 5))
    assert [steps[n].split()[0] for n in found] == STEPS_OF_A_FILE
    return found


@pytest.mark.slow
def test_a_kill_at_each_step_of_publishing_loses_at_most_the_open_shard(
    place: Place, steps: list[str], seed: int, tmp_path: Path
) -> None:
    choice, left = random.Random(seed), []
    for name in ("shard-000003-001-2.h5", "manifest.json"):
        for n in around(steps, name):
            left.append(killed_and_finished(place, tmp_path / str(n), n, world_size=choice.choice(WORLD_SIZES)))
    assert left[:10] == [10] * 6 + [11] * 4  # from its link on the shard is there
    assert left[10:] == [21] * 10


@pytest.mark.slow_sweep
def test_a_kill_at_every_step_of_a_run_changes_nothing(
    place: Place, steps: list[str], seed: int, tmp_path: Path
) -> None:
    choice = random.Random(seed)
    assert len(steps) > 200
    for n in range(len(steps)):
        killed_and_finished(place, tmp_path / str(n), n, world_size=choice.choice(WORLD_SIZES))


def kill_at_random(place: Place, directory: Path, choice: random.Random, *, kills: int) -> None:
    """Kill runs on random numbers of ranks at random times, until `kills` have hit."""
    hits = finished = at_work = shards = 0
    run_file = place.run_file(directory / "0")
    while hits < kills:
        cache, world_size = run_file.parent / "cache", choice.choice(WORLD_SIZES)
        with running(Run(run_file, world_size)) as run:
            wait_for(cache / "shards", shards + choice.randrange(8), run=run)
            time.sleep(choice.uniform(0.0, 0.05))
            alive = run.kill()
        hits += alive > 0
        shards = place.check_part(cache)
        at_work += alive > 0 and 0 < shards < SHARDS
        if not alive:
            assert set(run.wait()) == {0}, run.said(0)
            assert kept(cache) == place.whole
            finished, shards = finished + 1, 0
            run_file = place.run_file(directory / str(finished))
    last = Run(run_file, choice.choice(WORLD_SIZES))
    assert set(last.wait()) == {0}
    assert kept(run_file.parent / "cache") == place.whole
    assert at_work > kills // 4, "most kills came before the first shard or after the last"


def wait_for(shards: Path, count: int, *, run: Run) -> None:
    """Wait until so many shards are there, or the run has ended."""
    while any(rank.is_alive() for rank in run.ranks):
        if shards.is_dir() and len(list(shards.iterdir())) >= count:
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_kills_at_random_times_and_other_world_sizes_end_in_the_same_bytes(
    place: Place, seed: int, tmp_path: Path
) -> None:
    kill_at_random(place, tmp_path, random.Random(seed), kills=10)


@pytest.mark.slow_sweep
def test_fifty_kills_at_random_times_end_in_the_same_bytes(place: Place, seed: int, tmp_path: Path) -> None:
    kill_at_random(place, tmp_path, random.Random(seed), kills=50)
