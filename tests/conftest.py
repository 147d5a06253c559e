"""What all tests share: no network, the checkout's own package in subprocesses, the data of `../shared/data`."""

import os
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before any test imports a Hugging Face library, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads for models this small only wait for each other, and may round otherwise
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the directory with the real teacher and text; skip where it is not (see its place in the reason)."""
    path = Path(os.environ.get("ACCEL_DISTILL_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; $ACCEL_DISTILL_SHARED_DATA may name another place")
    return path


@pytest.fixture
def seed() -> int:
    """Return the seed of a random test, another one each time, and print it; $ACCEL_DISTILL_SEED repeats one."""
    chosen = int(os.environ.get("ACCEL_DISTILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"ACCEL_DISTILL_SEED={chosen}")
    return chosen


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `gpu` test where there is no CUDA device, and a sweep unless `-m slow_sweep` asks for it."""
    if item.get_closest_marker("slow_sweep") and "slow_sweep" not in item.config.getoption("-m"):
        pytest.skip("a sweep of minutes: pytest -m slow_sweep")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
