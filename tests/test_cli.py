"""The command `accel-distill`, as a user calls it: what it prints, where, and with which exit status."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from accel_distill import __version__
from accel_distill.cli import COMMANDS, TEMPLATE, main
from accel_distill.command_line import parse_arguments
from accel_distill.config import SECTIONS, RunConfig, load_config
from accel_distill.errors import ConfigError


def run(*arguments: str, module: str = "accel_distill", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("teacher: {model: org/teacher}\ndataset: {name: org/text}\ncache: {path: caches/a}\n")
    return path


def test_help_names_every_command_and_answers_at_once() -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        answer = run("--help")
        seconds.append(time.perf_counter() - start)
    assert answer.returncode == 0
    assert all(f"\n  {command} " in answer.stdout for command in COMMANDS)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    "command", ["check", "init", "estimate", "inspect", "verify", "audit", "report", "compare", "sizes", "demo"]
)
def test_every_command_explains_itself(command: str) -> None:
    answer = run(command, "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert f"usage: accel-distill {command}" in answer.stdout


def test_check_takes_the_flags_of_generate_as_the_launch_scripts_pass_them_on(run_file: Path) -> None:
    assert main(["check", "--config", str(run_file), "--allow-numerics-drift"]) == 0
    assert main(["check", "--config", str(run_file), "--allow-drift"]) == 2


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"accel-distill {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "no command"),
        (["chek"], "'chek'"),
        (["--verbose"], "'--verbose'"),
        (["check"], "--config FILE is missing"),
        (["check", "run.yaml"], "--config FILE is missing"),
        (["check", "--confg", "run.yaml"], "--confg"),
        (["check", "--config"], "--config"),
        (["check", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["check", "--config", "run.yaml", "verbose"], "'verbose'"),
        (["check", "--config", "run.yaml", "dataset.max_sample=3"], "'max_samples'"),
        (["check", "--config", "run.yaml", "dataset.streaming=true"], "max_samples MUST be specified"),
        (["init", "run.yaml"], "run.yaml"),
        (["inspect"], "CACHE"),
        (["inspect", "nowhere"], "nowhere"),
        (["report"], "RUN"),
        (["compare", "nowhere", "nowhere"], "nowhere"),
        (["demo", "--no-such-flag"], "--no-such-flag"),
        (["generate"], "accelerate launch -m accel_distill.generate"),
    ],
)
def test_a_wrong_word_costs_one_sentence_and_exit_status_2(run_file: Path, arguments: list[str], word: str) -> None:
    answer = run(*arguments, cwd=run_file.parent)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert word in answer.stderr


@pytest.mark.parametrize("module", ["accel_distill.generate", "accel_distill.train"])
def test_the_launched_commands_answer_a_wrong_word_the_same_way(run_file: Path, module: str) -> None:
    answer = run("--config", str(run_file), "dataset.max_sample=3", module=module)
    assert answer.returncode == 2
    assert answer.stderr == "error: override 'dataset.max_sample=3': unknown key; did you mean 'max_samples'?\n"


def test_check_says_in_one_line_what_would_run(run_file: Path) -> None:
    answer = run("check", "--config", "run.yaml", "dataset.max_samples=2000", cwd=run_file.parent)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == (
        "run.yaml: valid: teacher org/teacher, 2,000 samples of org/text, threshold 0.03, into caches/a\n"
    )


def test_check_notes_local_paths_that_are_not_there(run_file: Path) -> None:
    here = run_file.parent
    (here / "a.jsonl").touch()
    there = ["teacher.model=./teacher", "dataset.name=json", "dataset.data_files=[b*.jsonl, ./a.jsonl]"]
    answer = run("check", "--config", "run.yaml", *there, "student.model=/nope", cwd=here)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines()[1:] == [
        f"note: teacher.model: there is no directory ./teacher (seen from {here})",
        f"note: student.model: there is no directory /nope (seen from {here})",
        f"note: dataset.data_files: there is no file b*.jsonl (seen from {here})",
    ]


def test_check_imports_no_torch(run_file: Path) -> None:
    program = (
        "import sys; from accel_distill.cli import main; "
        f"status = main(['check', '--config', {str(run_file)!r}, 'training.learning_rate=3e-4']); "
        "print(status, [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "0 []"


def test_the_command_works_from_any_directory(tmp_path: Path) -> None:
    assert "PYTHONPATH" in os.environ  # of the checkout, set by conftest.py
    assert run("init", cwd=tmp_path).stdout == TEMPLATE.read_text()


def test_init_prints_a_run_file_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["check", "--config", str(path)]) == 0


def test_init_shows_every_key_of_every_section_with_its_default(tmp_path: Path) -> None:
    keys = [line.lstrip(" #") for line in TEMPLATE.read_text().splitlines()]
    sections = {name: section for name, section in SECTIONS.items() if section is not None}
    for section, model in sections.items():
        missing = [key for key in model.model_fields if not any(line.startswith(f"{key}:") for line in keys)]
        assert not missing, f"run_file.yaml says nothing about {missing} of section {section}"
    shown = tmp_path / "run.yaml"  # with every default that is commented out
    shown.write_text(TEMPLATE.read_text().replace("\n  # ", "\n  ").replace("\n  model: null", "\n  # model: null"))
    with_defaults, without = load_config(shown), load_config(TEMPLATE)
    sections_of = [config.model_dump(exclude={"training"}) for config in (with_defaults, without)]
    assert sections_of[0] == sections_of[1]
    ours = {"packing": False, "train_sampling_strategy": "random", "report_to": "tensorboard"}
    assert with_defaults.training == without.training | ours  # what it shows of the many keys of that section
    assert set(RunConfig.model_fields) == {*sections, "training"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "run.yaml", "a.b=1", "c.d=--x"],
        ["a.b=1", "--config", "run.yaml", "c.d=--x"],
        ["a.b=1", "c.d=--x", "--config=run.yaml"],
    ],
)
def test_overrides_may_stand_on_either_side_of_the_flag(argv: list[str]) -> None:
    assert parse_arguments(argv, prog="x") == (Path("run.yaml"), ["a.b=1", "c.d=--x"])


def test_a_flag_is_not_guessed_from_its_beginning() -> None:
    with pytest.raises(ConfigError, match="--conf"):
        parse_arguments(["--conf", "run.yaml"], prog="x")
