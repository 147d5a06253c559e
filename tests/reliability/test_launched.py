"""Real process groups: a rank dies, whoever started them, and with the waits as they are in production."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from reliability.place import Place, kept, make_place

SLOW = """
import sys, time
from accel_distill import generate, pipeline
compute = pipeline.ShardMaker.compute
def slowly(*arguments, **named):
    time.sleep({seconds})
    return compute(*arguments, **named)
pipeline.ShardMaker.compute = slowly
sys.exit(generate.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A teacher, data, and the bytes of the cache that is never interrupted."""
    return make_place(tmp_path_factory.mktemp("launched"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_by_hand(run_file: Path, world_size: int, *, seconds: float) -> list[subprocess.Popen[str]]:
    """Start the ranks as srun does: each alone, with its place in the environment; no launcher looks after them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world_size):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", SLOW.format(seconds=seconds), "--config", str(run_file)]
        said = (run_file.parent / f"rank{rank}.err").open("w")
        ranks.append(
            subprocess.Popen(
                command,
                env={**environment, "ACCELERATE_USE_CPU": "true"},
                stderr=said,
                text=True,
                start_new_session=True,
            )
        )
    return ranks


def wait_for(pattern: str, path: Path, *, ranks: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 240
    while not list(path.glob(pattern) if path.is_dir() else []):
        assert time.monotonic() < end and all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow_sweep)])
def test_ranks_started_by_hand_end_within_a_minute_of_the_death_of_one(
    victim: int, place: Place, tmp_path: Path
) -> None:
    """Rank 0 holds the store of the process group; it makes no difference."""
    run_file, survivor = place.run_file(tmp_path), 1 - victim
    ranks = start_by_hand(run_file, 2, seconds=3600.0)
    try:
        wait_for(".tmp/*-1", tmp_path / "cache", ranks=ranks)
        time.sleep(5.0)
        os.kill(ranks[victim].pid, signal.SIGKILL)
        begun = time.monotonic()
        status = ranks[survivor].wait(120)
        assert time.monotonic() - begun < 60
        assert (ranks[victim].wait(10), status) == (-9, 1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = (tmp_path / f"rank{survivor}.err").read_text()
    assert f"error: rank {victim} (process {ranks[victim].pid} on " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_launched_run_is_killed_and_goes_on_with_another_number_of_processes(place: Place, tmp_path: Path) -> None:
    """`launch/generate.sh`: its ranks run in sessions of their own, so they are killed, and looked for."""
    cache, run_file = tmp_path / "cache", place.run_file(tmp_path)
    launched = subprocess.Popen(
        [ROOT / "launch" / "generate.sh", "2", "--config", run_file],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(".tmp/*-1", cache, ranks=[launched])
    pids = ranks_of(run_file)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert launched.wait(120) == 128 + signal.SIGKILL
    assert ranks_of(run_file) == []
    place.check_part(cache)
    again = subprocess.run(
        [ROOT / "launch" / "generate.sh", "3", "--config", run_file],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert again.returncode == 0, again.stderr
    assert kept(cache) == place.whole


def ranks_of(run_file: Path) -> list[int]:
    """Return the processes that run the command on a run file, but not their launcher."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        is_launcher = any(word.endswith(("quiet_launch.py", ".sh")) for word in words)
        if str(run_file) in words and "accel_distill.generate" in words and not is_launcher:
            found.append(int(directory.name))
    return sorted(found)
