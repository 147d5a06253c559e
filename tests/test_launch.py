"""The scripts of launch/: what they start, and what they answer to a wrong word, without installing anything."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"])
RUN_FILE = "teacher: {model: org/teacher}\ndataset: {name: org/text}\ncache: {path: caches/a}\n"

# Stands in for a command of the package: says which rank it is, of how many, and what it was given.
PROBE = """
import os, sys
from accelerate import PartialState
state = PartialState(cpu=True)
said = [state.process_index, state.num_processes, state.distributed_type.value, os.environ.get("OMP_NUM_THREADS")]
os.write(1, (" ".join(map(str, ["PROBE", *said, *sys.argv[1:]])) + chr(10)).encode())  # one write: lines stay whole
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout of its own, in a directory with a space, with a package and no .venv."""
    root = tmp_path / "a checkout"
    shutil.copytree(LAUNCH, root / "launch")
    (root / "accel_distill").symlink_to(ROOT / "accel_distill")
    (root / "probe.py").write_text(PROBE)
    (root / "run.yaml").write_text(RUN_FILE)
    return root


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script from another directory, with this Python as `python3`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [str(script), *arguments],
        cwd="/",
        env={**inherited, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_executable_and_its_syntax_is_right(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", ["generate.sh", "train.sh"])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "found ''"),
        (["two"], "found 'two'"),
        (["0"], "found '0'"),
        (["2"], "--config FILE is missing"),
        (["2", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["2", "--config", "run.yaml", "dataset.max_sample=3"], "did you mean 'max_samples'?"),
    ],
)
def test_a_wrong_word_costs_one_sentence_and_no_launch(
    checkout: Path, name: str, arguments: list[str], word: str
) -> None:
    arguments = [argument.replace("run.yaml", str(checkout / "run.yaml")) for argument in arguments]
    answer = run(checkout / "launch" / name, *arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert word in answer.stderr


def test_a_missing_accelerate_configuration_is_named(checkout: Path) -> None:
    arguments = ["2", "--config", str(checkout / "run.yaml")]
    answer = run(checkout / "launch" / "generate.sh", *arguments, ACCELERATE_CONFIG="nowhere.yaml")
    assert (answer.returncode, answer.stderr) == (2, "error: ACCELERATE_CONFIG: no such file: nowhere.yaml\n")


def probe(checkout: Path, processes: int, **environment: str) -> list[list[str]]:
    """Start the probe on so many processes; return what each rank said, in the order of the ranks."""
    arguments = ["probe", str(processes), "--config", str(checkout / "run.yaml"), "dataset.split=a b"]
    answer = run(checkout / "launch" / "start.sh", *arguments, **environment)
    assert answer.returncode == 0, answer.stderr
    said = [line.split(maxsplit=5)[1:] for line in answer.stdout.splitlines() if line.startswith("PROBE")]
    assert said, answer.stdout
    assert all(line[-1] == f"--config {checkout / 'run.yaml'} dataset.split=a b" for line in said)
    return sorted(line[:-1] for line in said)


def test_one_process_is_started_without_a_launcher(checkout: Path) -> None:
    assert probe(checkout, 1) == [["0", "1", "NO", "None"]]


@pytest.mark.slow
def test_two_processes_without_a_gpu_are_two_ranks_that_share_the_cores(checkout: Path) -> None:
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert probe(checkout, 2) == [["0", "2", "MULTI_CPU", threads], ["1", "2", "MULTI_CPU", threads]]


@pytest.mark.slow
def test_an_accelerate_configuration_is_started_with_the_number_of_processes_given(checkout: Path) -> None:
    config = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    said = probe(checkout, 3, ACCELERATE_CONFIG=config, OMP_NUM_THREADS="1")
    assert said == [[str(rank), "3", "MULTI_CPU", "1"] for rank in range(3)]


@pytest.mark.slow
def test_a_failure_on_several_processes_is_what_the_process_said_with_its_exit_status(checkout: Path) -> None:
    lines = ["import os, sys, time", "if os.environ['RANK'] == '1':", "    time.sleep(60)"]
    lines += ["print('sorry', file=sys.stderr)", "sys.exit(5)"]
    (checkout / "probe.py").write_text("\n".join(lines))
    answer = run(checkout / "launch" / "start.sh", "probe", "2", "--config", str(checkout / "run.yaml"))
    assert answer.returncode == 5
    assert answer.stderr == "starting 2 processes of probe\nsorry\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_many_more_processes_than_cores_are_refused(checkout: Path) -> None:
    answer = run(checkout / "launch" / "start.sh", "probe", "4000", "--config", str(checkout / "run.yaml"))
    assert answer.returncode == 2
    assert re.fullmatch(
        r"error: 4000 processes asked for, and no GPU and \d+ cores here, and each process loads a model of its own; "
        r"expected at most one for each core\n",
        answer.stderr,
    )


def test_deepspeed_that_is_not_installed_is_one_sentence(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    )
    arguments = ["probe", "2", "--config", str(checkout / "run.yaml")]
    zero2 = str(ROOT / "configs" / "accelerate" / "zero2.yaml")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    answer = run(checkout / "launch" / "start.sh", *arguments, ACCELERATE_CONFIG=zero2, PYTHONPATH=path)
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith("error: DeepSpeed is not installed")
    assert answer.stderr.splitlines()[-1].endswith(
        "(launch/setup.sh deepspeed, or pip install 'accel-distill[deepspeed]')"
    )
    assert "Traceback" not in answer.stderr


def test_set_up_answers_at_once_when_it_was_done_and_notices_a_change(checkout: Path) -> None:
    shutil.copy(ROOT / "setup.cfg", checkout)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nif [ "$1" = -m ]; then echo "$@"; fi\n')  # says what it would install
    python.chmod(0o755)
    set_up = checkout / "launch" / "setup.sh"

    first, second, other_extra = run(set_up), run(set_up), run(set_up, "test")
    assert f"--editable {checkout}\n" in first.stdout
    assert f"--constraint {checkout}/launch/constraints.txt" in first.stdout
    assert (second.returncode, second.stdout) == (0, "")
    assert f"--editable {checkout}[test]\n" in other_extra.stdout

    with (checkout / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    assert f"--editable {checkout}\n" in run(set_up).stdout


def test_constraints_pin_every_direct_dependency_and_nothing_that_needs_a_gpu() -> None:
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = dict(line.split(" ;")[0].split("==") for line in lines if not line.startswith("#"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    wanted = settings["options"]["install_requires"] + settings["options.extras_require"]["test"]
    names = {re.split(r"[ <>=]", line)[0] for line in wanted.split("\n") if line}
    assert names <= set(pins)
    assert "+" not in "".join(pins.values())  # a build for one device; torch 2.13.0 is any of them
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
