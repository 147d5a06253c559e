"""What the README and the pages of docs/ say is so: commands run, messages are those of the code, pages are complete.

A command of a ```bash block is run here, on a tiny teacher and text in place of what it names, or carries a mark of
MARKS; then its arguments are read. A command that this file does not know fails.
"""

import argparse
import ast
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny import make_teacher, run_config, story, write_jsonl

from accel_distill import cli, generate, train
from accel_distill.command_line import OneSentenceParser
from accel_distill.config import load_config, resolved_yaml

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
MARKS = ("needs a GPU", "needs the network", "needs TensorBoard")
RUN_ELSEWHERE = {"python docs/tutorial.py": "the_tutorial_script"}  # a test of this file
MODULES = {"generate": generate.main, "train": train.main}
# What a command asks for that is too much here, and what it gets.
SMALLER = {"dataset.max_samples": "12", "training.num_train_epochs": "1"}
SAMPLES = 24


class Parsed(BaseException):
    """Raised in place of a command's work, when its parser has taken its arguments."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


class Command:
    """A line of a page: its words without what a shell does, the comment behind it, where its output goes."""

    def __init__(self, line: str) -> None:
        self.line = line
        text, _, self.comment = line.partition(" #")
        words = shlex.split(text)
        self.output = words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if ">" in words else words
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        self.words = words
        self.is_marked = any(mark in self.comment for mark in MARKS)

    def call(self) -> tuple[Callable[[list[str]], int], list[str]]:
        """Return the package's own `main` that the command ends in, and what it is given; read what starts it."""
        words = self.words
        match words:
            case ["accel-distill", *rest]:
                return cli.main, rest
            case ["./launch/demo.sh" | "./launch/test.sh" | "launch/setup.sh"]:
                assert self.is_marked and (ROOT / words[0]).is_file()
                return cli.main, ["--version"]  # what they install is what runs here
            case ["launch/generate.sh" | "launch/train.sh", processes, *rest]:
                assert processes.isdigit() or processes == "N"
                return MODULES[Path(words[0]).stem], rest
            case ["accelerate", "launch", *rest]:
                from accelerate.commands.launch import launch_command_parser

                return self._module(launch_command_parser().parse_args(rest))
            case ["torchrun", *rest]:
                from torch.distributed.run import get_args_parser

                return self._module(get_args_parser().parse_args(rest))
            case ["python", "-m", module, *rest]:
                return MODULES[module.removeprefix("accel_distill.")], rest
            case ["sbatch", "--nodes", nodes, "launch/slurm.sbatch", module, *rest]:
                assert nodes.isdigit()
                return MODULES[module], rest
        raise AssertionError(f"{self.line}: no test knows this command; teach tests/test_docs.py, or mark it")

    def _module(self, arguments: argparse.Namespace) -> tuple[Callable[[list[str]], int], list[str]]:
        assert arguments.module, self.line
        return MODULES[arguments.training_script.removeprefix("accel_distill.")], arguments.training_script_args


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page's ```bash blocks; lines that end in a backslash are joined."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield Command(line)


ALL = [(page, command) for page in PAGES for command in commands(page)]
OURS = ("accel-distill ", "accelerate launch ", "torchrun ", "sbatch ", "launch/generate.sh ", "launch/train.sh ")
INLINE = [
    Command(found.replace("\n", " "))
    for page in PAGES
    for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    if found.startswith(OURS) and "..." not in found and (" -m " in found or not found.startswith("accelerate"))
]


def parsed(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace | None:
    """Return what the command's own parser makes of its arguments; None: it takes none."""
    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)

        def parse(self: Any, *given: Any, real: Any = real, **named: Any) -> Any:
            raise Parsed(real(self, *given, **named))

        monkeypatch.setattr(OneSentenceParser, name, parse)
    run, arguments = command.call()
    try:
        status = run(arguments)
    except Parsed as found:
        return found.arguments
    assert status == 0, command.line
    return None


@pytest.fixture
def page_run_file(tmp_path: Path) -> Path:
    """Return the README's run file, which the pages call run.yaml."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(block)
    return path


@pytest.mark.parametrize(
    "command",
    [command for _, command in ALL if command.words[0] not in ("export", "pip", "tensorboard")] + INLINE,
    ids=lambda command: command.line[:80],
)
def test_the_arguments_of_every_command_are_understood(
    command: Command, page_run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if " ".join(command.words) in RUN_ELSEWHERE:
        return
    arguments = parsed(command, monkeypatch)
    if arguments is not None and getattr(arguments, "config", None):
        path = page_run_file if arguments.config.name in ("run.yaml", "FILE") else ROOT / arguments.config
        load_config(path, arguments.overrides)


def test_every_command_is_run_or_says_why_not() -> None:
    assert len(ALL) >= 30 and len(INLINE) >= 10
    for page, command in ALL:
        if not command.is_marked and " ".join(command.words) not in RUN_ELSEWHERE:
            command.call()  # so the test below runs it
        assert not (command.comment.strip().startswith("needs") and not command.is_marked), (page, command.line)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny teacher and text, and the run file that takes the place of every other one."""
    path = tmp_path_factory.mktemp("docs")
    make_teacher(path / "teacher", vocab=300)
    write_jsonl(path / "texts.jsonl", [story(n) for n in range(SAMPLES)])
    student = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = run_config(
        path / "teacher",
        path / "texts.jsonl",
        Path("caches/my-run"),
        dataset={"max_samples": SAMPLES},
        student={"config": {**student, "num_attention_heads": 2}},
        training={"output_dir": "runs/my-run", "max_steps": 3, "logging_steps": 1, "report_to": "none"},
    )
    (path / "run.yaml").write_text(resolved_yaml(config))
    return path


def smaller(words: list[str]) -> list[str]:
    """Return a command's arguments with the tiny run file, cache and sizes in place of its own."""
    made = []
    for word in words:
        key, _, _ = word.partition("=")
        if re.fullmatch(r"[\w./-]+\.yaml", word):
            word = "run.yaml"
        elif word.startswith("caches/"):
            word = "caches/my-run"
        elif word.startswith("runs/"):
            word = "runs/my-run"
        elif key in SMALLER:
            word = f"{key}={SMALLER[key]}"
        elif key == "training.output_dir":
            word = f"{key}=runs/other"
        made.append(word)
    return made


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not c.is_marked for c in commands(page))], ids=lambda page: page.name
)
def test_the_commands_of_a_page_do_what_they_say_one_after_another(
    page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = (place / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(run_file)
    monkeypatch.chdir(tmp_path)
    count = 0
    for command in commands(page):
        if command.is_marked or " ".join(command.words) in RUN_ELSEWHERE:
            continue
        run, arguments = command.call()
        status = run(smaller(arguments))
        printed, errors = capsys.readouterr()
        assert status == 0, f"{command.line}\n{printed}\n{errors}"
        if command.output:
            Path(command.output).write_text(printed)
            load_config(Path(command.output))
            Path(command.output).write_text(run_file)  # what comes next reads the tiny one
        count += 1
    assert count


def test_the_tutorial_script_ends_with_a_distilled_student_that_is_nearer_to_its_teacher(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "docs" / "tutorial.py", tmp_path / "all"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    rows = {line[:28].strip(): line[28:].split() for line in run.stdout.splitlines()}
    distilled, alone = map(float, rows["KL(teacher || student)"][-2:])
    assert 0 < distilled < 0.8 * alone
    assert float(rows["cross-entropy, nats"][0]) > float(rows["cross-entropy, nats"][2]) > 0  # the teacher's is lowest
    assert (tmp_path / "all" / "student" / "model.safetensors").is_file()
    assert run.stdout.splitlines()[-1].startswith("Anna had a ")


def test_the_tutorial_page_shows_what_its_script_does() -> None:
    script = (DOCS / "tutorial.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) > 5 and [line for line in lines if line not in script] == []


@functools.cache
def messages() -> list[str]:
    """Return all texts of the code, with … for what is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return "…"

    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "accel_distill").glob("*.py"))]
    found = [text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr)]
    scripts = [re.sub(r"\$\w+", "…", path.read_text()) for path in sorted((ROOT / "launch").glob("*.sh"))]
    return [*{each.replace("%s", "…") for each in found if len(each) > 10}, *scripts]


def quoted(page: Path) -> list[str]:
    """Return the messages in the first column of the page's tables; other cells are no quotations."""
    rows = re.findall(r"^\| (`.+?`) \| ", page.read_text(), re.MULTILINE)
    return [row.strip("`") if row.count("`") == 2 else row.removeprefix("`").removesuffix("`") for row in rows]


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code() -> None:
    heads = quoted(DOCS / "troubleshooting.md")
    assert len(heads) > 40
    assert [head for head in heads if not any(head in message for message in messages())] == []


def test_the_api_page_is_what_the_docstrings_make_of_it() -> None:
    path = DOCS / "make_api.py"
    names: dict[str, Any] = {"__file__": str(path), "__name__": "make_api"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert names["page"]() == (DOCS / "api.md").read_text(), "run `python docs/make_api.py`"


def test_the_index_lists_every_page_and_every_link_leads_somewhere() -> None:
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"]({page.name})" not in index] == []
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", page.read_text())]
    assert len(links) > 20
    assert [link for page, link in links if "://" not in link and not (page.parent / link).exists()] == []
