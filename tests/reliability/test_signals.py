"""SIGTERM and Ctrl-C as each rank sees them: nothing partial, seconds, exit status 128 + n, and the run goes on."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from reliability.forked import Run, Slow, SlowDisk, Stuck, running
from reliability.place import Place, kept, make_place

SECONDS = 15.0  # on a machine five times slower


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A teacher, data, and the bytes of the cache that is never interrupted."""
    return make_place(tmp_path_factory.mktemp("signals"))


def wait_for_work(cache: Path, world_size: int) -> None:
    """Wait until every rank is past the opening of the cache."""
    end = time.monotonic() + 60
    while len(at_work(cache)) < world_size:
        assert time.monotonic() < end
        time.sleep(0.02)


def at_work(cache: Path) -> list[Path]:
    """Return the files of the ranks that count."""
    files = (cache / ".tmp").glob("*-[0-9]") if cache.is_dir() else []
    return [file for file in files if b'"pid"' in file.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_every_rank_in_seconds_with_its_status_and_one_sentence(
    number: signal.Signals, status: int, words: str, place: Place, seed: int, tmp_path: Path
) -> None:
    choice, run_file, cache = random.Random(seed), place.run_file(tmp_path), tmp_path / "cache"
    for _ in range(3):
        world_size = choice.choice([1, 2, 3])
        with running(Run(run_file, world_size, faults=dict.fromkeys(range(world_size), Slow(0.1)))) as run:
            wait_for_work(cache, world_size)
            time.sleep(choice.uniform(0.0, 0.5))
            for rank in run.ranks:
                os.kill(rank.pid or 0, number)
            begun = time.monotonic()
            assert run.wait(SECONDS) == [status] * world_size, run.said(0)
            assert time.monotonic() - begun < SECONDS
        place.check_part(cache)
        said = [line for line in run.said(0).splitlines() if words in line or "was stopped by" in line]
        own = f"{words}; what was published or saved is kept; docs/resuming.md says how to go on"
        others = {f"error: rank {rank} was stopped by {number.name}" for rank in range(1, world_size)}  # seen first
        assert len(said) == 1 and said[0] in {own, *others}, run.said(0)
        assert "Traceback" not in "".join(map(run.said, range(world_size)))
        assert not [path for path in (cache / ".tmp").iterdir() if "-" not in path.name], "a temporary file is left"
        for path in (cache / ".tmp").iterdir():
            path.unlink()  # why each rank stopped
    assert Run(run_file, 2).wait() == [0, 0]
    assert kept(cache) == place.whole


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_disk(place: Place, tmp_path: Path) -> None:
    with running(Run(place.run_file(tmp_path), 1, faults={0: SlowDisk()})) as run:
        wait_for_work(tmp_path / "cache", 1)
        time.sleep(1.0)
        os.kill(run.ranks[0].pid or 0, signal.SIGINT)
        time.sleep(1.0)
        assert run.ranks[0].is_alive(), "the first waits for the shard that is being written"
        os.kill(run.ranks[0].pid or 0, signal.SIGINT)
        assert run.wait(SECONDS) == [130]
    assert run.said(0).count("interrupted") == 1


@pytest.mark.slow
def test_a_rank_that_waits_where_no_python_runs_ends_all_the_same(place: Place, tmp_path: Path) -> None:
    with running(Run(place.run_file(tmp_path), 1, faults={0: Stuck()})) as run:
        wait_for_work(tmp_path / "cache", 1)
        time.sleep(1.0)
        os.kill(run.ranks[0].pid or 0, signal.SIGTERM)
        assert run.wait(SECONDS) == [143]
    assert run.said(0).count("stopped by SIGTERM") == 1


@pytest.mark.slow
def test_a_rank_that_waits_where_no_python_runs_ends_when_another_dies(place: Place, tmp_path: Path) -> None:
    with running(Run(place.run_file(tmp_path), 2, faults={0: Stuck(), 1: Slow(3600.0)})) as run:
        wait_for_work(tmp_path / "cache", 2)
        time.sleep(1.0)
        os.kill(run.ranks[1].pid or 0, signal.SIGKILL)
        assert run.wait(2 * SECONDS) == [1, -9]
    assert run.said(0).count("error: rank 1 (process ") == 1
