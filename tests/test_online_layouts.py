"""An online teacher gives the same losses and weights on one process and two, wherever it and the student are divided.

Two processes are really launched, with gloo; weights are compared as they were saved.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from layout_run import GLOBAL_BATCH, LENGTHS, STEPS, Layout, make_students, student_path
from online_layout_run import CASES, ONE, TWO, run_name, train
from torch import Tensor
from trainer_run import tiny_llama
from transformers import AutoModelForCausalLM

RUNS = [(group, *run) for group, runs in TWO.items() for run in runs]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all runs, with those of one process."""
    directory = tmp_path_factory.mktemp("online-layouts")
    make_students(directory)
    tiny_llama(spread=0.3).save_pretrained(directory / "teacher")
    for case in CASES:
        train(directory, ONE, case, "replicate")
    return directory


@pytest.fixture(scope="module")
def launched(runs: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The launches so far, by group."""
    return {}


def launch(runs: Path, group: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "online_layout_run.py"), str(runs), group]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def record(path: Path) -> dict[str, Any]:
    return json.loads((path / "record.json").read_text())


def weights(path: Path) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in AutoModelForCausalLM.from_pretrained(path).named_parameters()}


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in some)


@pytest.mark.parametrize(("group", "layout", "case", "parallelism"), RUNS, ids=[run_name(*run) for _, *run in RUNS])
def test_an_online_teacher_gives_the_losses_weights_and_metrics_of_one_process(
    group: str,
    layout: Layout,
    case: str,
    parallelism: str,
    runs: Path,
    launched: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    if group not in launched:
        launched[group] = launch(runs, group)
    assert launched[group].returncode == 0, launched[group].stderr[-5000:]
    path, reference = runs / run_name(layout, case, parallelism), runs / run_name(ONE, case, "replicate")
    found, expected = record(path), record(reference)
    losses = [
        [
            [log[key] for key in ("loss", "kd", "ce", "kl", "teacher_ce", "grad_norm")]
            for log in run["log"]
            if "loss" in log
        ]
        for run in (found, expected)
    ]
    assert len(losses[0]) == STEPS
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    start, mine, one = (weights(place) for place in (student_path(runs, "adamw"), path, reference))
    largest = max(float(weight.abs().max()) for weight in one.values())
    assert largest_difference(start, one) > 0.02 * largest  # the run did train
    assert largest_difference(mine, one) <= 5e-6 * largest
    assert found["metrics"]["eval_positions"] > 0
    for key in ("eval_loss", "eval_kd", "eval_ce", "eval_kl", "eval_teacher_ce", "eval_top1_agreement", "eval_ece"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-6), key
    assert_it_is_what_it_says(found, layout, parallelism)


def assert_it_is_what_it_says(run: dict[str, Any], layout: Layout, parallelism: str) -> None:
    """Libraries fall back silently: see backend and teacher for what they are, and who had which samples."""
    backend, teacher = run["backend"], run["teacher"]
    kinds = {"ddp": "MULTI_CPU", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    assert (backend["distributed_type"], run["world_size"]) == (kinds[layout.backend], 2)
    assert backend["sharded"] == (backend["parameters"] if layout.backend == "fsdp2" else 0)
    assert backend["divided"] == (backend["parameters"] if layout.backend == "zero3" else 0)
    assert teacher["sharded"] == (teacher["parameters"] if parallelism == "fsdp" else 0)
    assert teacher["divided"] == (teacher["parameters"] if parallelism == "zero3" else 0)
    for step in range(STEPS):
        micro = slice(step * layout.accumulation, (step + 1) * layout.accumulation)
        samples = [index for rank in run["batches"] for batch in rank[micro] for index in batch]
        assert sorted(samples) == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
    if layout.accumulation == 1:  # in the second step the second process has no target at all
        assert [LENGTHS[index] for index in run["batches"][1][1]] == [0, 0, 0, 0]
