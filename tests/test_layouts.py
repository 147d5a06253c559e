"""The same data give the same losses and weights on one process and two, accumulated, under DDP, FSDP2 and ZeRO 1 to 3.

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
from layout_run import (
    GLOBAL_BATCH,
    LENGTHS,
    ONE,
    STEPS,
    TWO,
    Layout,
    make_students,
    student_path,
    train,
)
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM

REFERENCE = ONE[0]
GROUPS = {layout: group for group, layouts in TWO.items() for layout in layouts}
RUNS = [(layout, optimizer) for layout in [*ONE[1:], *GROUPS] for optimizer in layout.optimizers]
WRAPPERS = {
    "one": ("NO", "LlamaForCausalLM"),
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "zero": ("DEEPSPEED", "DeepSpeedEngine"),
    "fsdp": ("FSDP", "FSDPLlamaForCausalLM"),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all runs, with those of one process."""
    directory = tmp_path_factory.mktemp("layouts")
    make_students(directory)
    for layout in ONE:
        for optimizer in layout.optimizers:
            train(directory, layout, optimizer)
    return directory


@pytest.fixture(scope="module")
def launched(runs: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The launches so far, by group of backends."""
    return {}


@pytest.fixture
def layout(request: pytest.FixtureRequest, runs: Path, launched: dict[str, subprocess.CompletedProcess[str]]) -> Layout:
    """A layout whose runs were made: two processes make all those of a group when the first is asked for."""
    asked: Layout = request.param
    group = GROUPS.get(asked)
    if group is None:
        return asked
    if group not in launched:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(ROOT / "tests" / "layout_run.py"), str(runs), group]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        launched[group] = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert launched[group].returncode == 0, launched[group].stderr[-5000:]
    return asked


def record(runs: Path, layout: Layout, optimizer: str) -> dict[str, Any]:
    return json.loads((runs / f"{layout.name}-{optimizer}" / "record.json").read_text())


def weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a saved student, as plain transformers loads it, or peft; adapters are merged into them."""
    if (path / "adapter_config.json").exists():
        model = AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in some)


@pytest.mark.parametrize(
    ("layout", "optimizer"), RUNS, ids=lambda part: getattr(part, "name", part), indirect=["layout"]
)
def test_a_layout_ends_with_the_losses_weights_and_metrics_of_one_process(
    layout: Layout, optimizer: str, runs: Path
) -> None:
    found, expected = (record(runs, of, optimizer) for of in (layout, REFERENCE))
    losses = [
        [[log[key] for key in ("loss", "kd", "ce", "grad_norm")] for log in run["log"] if "loss" in log]
        for run in (found, expected)
    ]
    assert len(losses[0]) == STEPS
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    start, mine, reference = (
        weights(path)
        for path in (
            student_path(runs, optimizer),
            runs / f"{layout.name}-{optimizer}",
            runs / f"{REFERENCE.name}-{optimizer}",
        )
    )
    largest = max(float(weight.abs().max()) for weight in reference.values())
    assert largest_difference(start, reference) > 0.02 * largest  # the run did train
    assert largest_difference(mine, reference) <= 5e-6 * largest
    assert found["metrics"]["eval_positions"] > 0
    for key in ("eval_loss", "eval_kd", "eval_ce", "eval_kl", "eval_ece", "eval_positions"):
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize(
    ("layout", "optimizer"), RUNS, ids=lambda part: getattr(part, "name", part), indirect=["layout"]
)
def test_a_layout_is_what_it_says_and_has_the_same_samples_in_each_step(
    layout: Layout, optimizer: str, runs: Path
) -> None:
    run = record(runs, layout, optimizer)
    backend = run["backend"]
    wrapper = backend["wrapper"].replace("PeftModelForCausalLM", "LlamaForCausalLM")
    assert (backend["distributed_type"], wrapper) == WRAPPERS[layout.backend[:4].rstrip("0123456789")]
    assert run["world_size"] == len(run["batches"]) == (1 if layout.backend == "one" else 2)
    assert backend["zero_stage"] == (int(layout.backend[-1]) if layout.backend.startswith("zero") else None)
    assert backend["sharded"] == (backend["parameters"] if layout.backend.startswith("fsdp2") else 0)
    assert backend["layers"] == (2 if layout.backend == "fsdp2" else 0)  # each is a unit, adapters or not
    assert backend["divided"] == (backend["parameters"] if layout.backend == "zero3" else 0)
    assert layout.batch * layout.packed * layout.accumulation * run["world_size"] == GLOBAL_BATCH
    for step in range(STEPS):
        micro = slice(step * layout.accumulation, (step + 1) * layout.accumulation)
        samples = [index for rank in run["batches"] for batch in rank[micro] for index in batch]
        assert sorted(samples) == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))


@pytest.mark.parametrize(
    "layout", [Layout("ddp", 4, 1), Layout("zero3", 4, 1), Layout("fsdp2", 4, 1)], ids=str, indirect=True
)
def test_in_one_step_one_of_two_processes_has_no_target_at_all(layout: Layout, runs: Path) -> None:
    first, second = record(runs, layout, "adamw")["batches"]
    assert [LENGTHS[index] for index in second[1]] == [0, 0, 0, 0]
    assert all(any(LENGTHS[index] > 1 for index in batch) for batch in [*first, second[0], *second[2:]])
    assert len({*LENGTHS}) > 10  # ragged
