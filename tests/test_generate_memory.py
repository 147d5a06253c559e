"""Memory while streaming does not grow with the number of samples: peak memory of processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_teacher, story, write_jsonl

HERE = Path(__file__).parent
ALLOWED = 50  # MB more with 20,000 samples than with 2,000
FEW, MANY = 2_000, 20_000


def peaks(what: str, place: Path) -> dict[int, int]:
    """Return the peak memory in MB by the number of samples, from two processes at once."""
    command = [sys.executable, str(HERE / "generate_memory.py"), what]
    running = {
        samples: subprocess.Popen([*command, str(samples), str(place)], stdout=subprocess.PIPE, text=True)
        for samples in (FEW, MANY)
    }
    found = {samples: process.communicate(timeout=300)[0] for samples, process in running.items()}
    assert [process.returncode for process in running.values()] == [0, 0]
    return {samples: int(output.split()[-1]) for samples, output in found.items()}


def test_walking_a_stream_keeps_no_texts(tmp_path: Path) -> None:
    long_texts = [(f"{n} words " * 600)[:5000] for n in range(200)]
    data = write_jsonl(tmp_path / "data.jsonl", long_texts * (MANY // 200))
    assert data.stat().st_size > 2 * ALLOWED * 10**6  # kept, they would be seen
    found = peaks("walk", tmp_path)
    assert 0 < found[FEW] and found[MANY] - found[FEW] < ALLOWED, found


@pytest.mark.slow
def test_generating_a_cache_takes_no_more_memory_for_more_samples(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    write_jsonl(tmp_path / "data.jsonl", [f"{n} {story(n % 97 + 1)[:60]}" for n in range(MANY)])
    found = peaks("generate", tmp_path)
    assert 0 < found[FEW] and found[MANY] - found[FEW] < ALLOWED, found
