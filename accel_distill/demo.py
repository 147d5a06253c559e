"""`accel-distill demo`: the whole way, from text to a distilled student and its baseline, with nothing to download.

The one decision: text, tokenizer and teacher are made here, and all that comes after runs the package's own commands in
processes of their own, as they are printed, so that a user can run them again. Its cost: every command imports torch
anew, about 10 s each. All figures of the table are read from the files that the commands wrote.
"""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_distill.command_line import OneSentenceParser
from accel_distill.demo_corpus import python_documents, write_documents
from accel_distill.demo_teacher import train_teacher, train_tokenizer
from accel_distill.errors import ConfigError, RunError, exit_with
from accel_distill.inspect_cache import inspect_cache
from accel_distill.report import report as write_report
from accel_distill.run_file import to_yaml
from accel_distill.screen import labelled, terminal_width

MAX_LENGTH = 128  # tokens of a sample
# Models this small gain a tenth from a second thread (20 s to 18 s), and lose a factor of 8 to it (7 s to 59 s) where
# other programs want the cores too.
THREADS = {"OMP_NUM_THREADS": "1"}
DEFAULT_DIRECTORY = "demo-run"
DESCRIPTION = f"""Run the whole main job on an example that needs no download: a text (Python's own documentation), a
tokenizer and a small teacher trained on it, the teacher's cache, a student trained from the cache, and the same student
trained without the teacher; then a table of what was measured. Nothing is reused and nothing overwritten: without --out
the directory is {DEFAULT_DIRECTORY} or, where that is taken, {DEFAULT_DIRECTORY}-2 and so on."""


@dataclass(frozen=True)
class Sizes:
    """How much is done; the order of the documents is random, so the first ones stand for all."""

    teacher_steps: int
    samples: int  # documents in the cache
    eval_samples: int  # the first of them, which neither teacher nor student is trained on
    epochs: int  # of the students over the cache


FULL = Sizes(teacher_steps=600, samples=1000, eval_samples=200, epochs=3)
QUICK = Sizes(teacher_steps=60, samples=160, eval_samples=40, epochs=1)


@dataclass(frozen=True)
class Command:
    """A command line with what it adds to the environment."""

    words: tuple[str, ...]
    variables: Mapping[str, str]

    def __str__(self) -> str:
        """Return it as one types it into a shell."""
        return " ".join([*(f"{name}={value}" for name, value in self.variables.items()), shlex.join(self.words)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        parser = OneSentenceParser(prog="accel-distill demo", description=DESCRIPTION)
        parser.add_argument("--out", type=Path, metavar="DIR", help="a new or empty directory for all files")
        parser.add_argument("--quick", action="store_true", help="less of everything: shows that it runs, no more")
        arguments = parser.parse_args(argv)
        os.environ.update(THREADS)  # read when torch is imported, by step 3
        demo(new_directory(arguments.out), QUICK if arguments.quick else FULL)
        return 0

    return exit_with(run)


def demo(out: Path, sizes: Sizes) -> None:
    """Do the six steps, writing below `out`, and print the table. Raises RunError."""
    begun = time.monotonic()
    environment = command_environment(os.environ)  # before a library of step 3 adds to it
    say(f"Six steps, some minutes on a CPU. All files go to {out}/\n")
    with step(1, "Text: Python's own documentation"):
        documents = python_documents()
        write_documents(out / "documents.jsonl", documents)
        say(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters")
    training_text = documents[sizes.eval_samples :]
    with step(2, "Tokenizer: byte-level BPE"):
        tokenizer = train_tokenizer(training_text)
        say(f"{len(tokenizer):,} ids")
    with step(3, f"Teacher: a small Llama, {sizes.teacher_steps} steps"):
        path, steps = out / "teacher", sizes.teacher_steps
        train_teacher(training_text, tokenizer, path=path, steps=steps, block=MAX_LENGTH)
    (out / "run.yaml").write_text(to_yaml(run_file(out, sizes)), encoding="utf-8")
    generate, distil, baseline = commands(out, gpus=count_gpus())
    with step(4, "Cache: the teacher's distributions for the first documents"):
        run_command(generate, environment)
    with step(5, "Student: trained from the cache"):
        run_command(distil, environment)
    with step(6, "Baseline: the same student, data and steps, with cross-entropy alone"):
        run_command(baseline, environment)
    for text in report(out).splitlines():
        say_prose(text)
    page = out / "student" / "report.html"
    write_report(out / "student", page, baseline=out / "baseline")
    say_prose(f"Curves, calibration and ten positions as text, in a browser: {page}")
    files = "run.yaml (what these commands read), documents.jsonl, teacher/, cache/, student/, baseline/"
    say("")
    say_prose(f"{time.monotonic() - begun:.0f} s in all. In {out}/: {files}.")
    say(suggestions(out, samples=sizes.samples))


def run_file(out: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the run file's content."""
    return {
        "teacher": {"model": str(out / "teacher")},
        "dataset": {
            "name": "json",
            "data_files": str(out / "documents.jsonl"),
            "streaming": True,
            "max_samples": sizes.samples,
            "eval_samples": sizes.eval_samples,
            "max_length": MAX_LENGTH,
        },
        "targets": {"method": "threshold", "threshold": 0.03},
        "cache": {"path": str(out / "cache"), "samples_per_shard": 200, "min_free_disk": "100MB"},
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "tie_word_embeddings": False,
                "initializer_range": 0.08,
            }
        },
        "loss": {"kd_weight": 1.0, "ce_weight": 0.0},
        "training": {
            "output_dir": str(out / "student"),
            "num_train_epochs": sizes.epochs,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 16,
            "learning_rate": 6e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "logging_steps": 25,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        },
    }


def commands(out: Path, *, gpus: int) -> tuple[Command, Command, Command]:
    """Return generation on 2 processes (1 on a single GPU), training, and the baseline."""
    run = ("--config", str(out / "run.yaml"))
    two = (
        "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    )
    one = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    how = one if gpus == 1 else two
    # Without a GPU, --multi_gpu means several processes, and this variable that they run on the CPU.
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if gpus == 0 else {}
    launch = ("accelerate", "launch", "--quiet", *how.split(), "-m", "accel_distill.generate", *run)
    train = (Path(sys.executable).name, "-m", "accel_distill.train", *run)
    alone = ("loss.kd_weight=0", "loss.ce_weight=1", f"training.output_dir={out / 'baseline'}")
    return Command(launch, {**on_cpu, **THREADS}), Command(train, THREADS), Command((*train, *alone), THREADS)


def run_command(command: Command, environment: Mapping[str, str]) -> None:
    """Print a command and run it; its output is passed through. Raise RunError where it fails."""
    say(f"$ {command}\n")
    program = shutil.which(command.words[0], path=environment["PATH"])
    if program is None:
        raise RunError(f"{command.words[0]} is not installed beside {sys.executable}; install the package again")
    status = subprocess.run([program, *command.words[1:]], env={**environment, **command.variables}).returncode
    if status:
        error = RunError(f"`{command}` ended with exit status {status}, and the demo with it; its reason is above")
        error.exit_status = status if status > 0 else 128 - status
        raise error


def report(out: Path) -> str:
    """Return the table, from what the commands wrote, and what follows from its figures."""
    distilled, alone = (json.loads((out / name / "all_results.json").read_text()) for name in ("student", "baseline"))
    return "\n".join([*table(distilled, alone, inspect_cache(out / "cache")), "", *comparison(distilled, alone)])


def table(distilled: Mapping[str, Any], alone: Mapping[str, Any], cache: Mapping[str, Any]) -> list[str]:
    """Return the figures of both students and of the teacher as lines."""
    rows = [
        ("cross-entropy, nats", "eval_ce", ".4f", f"{distilled['eval_teacher_ce']:.4f}"),
        ("KL(teacher || student), nats", "eval_kl", ".4f", ""),
        ("top-1 agreement", "eval_top1_agreement", ".2%", ""),
        ("expected calibration error", "eval_ece", ".2%", ""),
        ("training, seconds", "train_runtime", ".0f", ""),
    ]
    held_out = f"{distilled['eval_samples']:,} documents held out, {distilled['eval_positions']:,} positions"
    return [
        f"{held_out:42}{'distilled':>12}{'CE alone':>12}{'teacher':>12}",
        *(f"  {name:40}{distilled[key]:>12{how}}{alone[key]:>12{how}}{last:>12}" for name, key, how, last in rows),
        f"The cache: {cache['positions']:,} positions in {cache['samples']:,} documents, "
        f"{cache['bytes_per_position']:.2f} bytes and {cache['ids_per_position']:.2f} ids a position (of "
        f"{cache['vocab_size']:,}), {cache['bytes']:,} bytes.",
    ]


def comparison(distilled: Mapping[str, Any], alone: Mapping[str, Any]) -> list[str]:
    """Return what the figures say of the distilled student beside the baseline, whichever way."""
    lines = []
    for name, key in (("cross-entropy", "eval_ce"), ("KL to the teacher", "eval_kl")):
        difference = distilled[key] - alone[key]
        word = "lower" if difference < 0 else "higher"
        lines.append(f"The distilled student's {name} is {abs(difference):.4f} nats {word} than the baseline's.")
    return lines


def suggestions(out: Path, *, samples: int) -> str:
    """Return the commands to go on with, which need no launcher for one process."""
    folder = str(Path(sys.executable).parent)
    on_path = folder in os.environ.get("PATH", "").split(os.pathsep)
    run, student = f"--config {shlex.quote(str(out / 'run.yaml'))}", shlex.quote(str(out / "student"))
    python, longer = Path(sys.executable).name, shlex.quote(f"training.output_dir={out}/student-10")
    lines = [] if on_path else [f'export PATH={shlex.quote(folder)}:"$PATH"']
    lines += [
        f"accel-distill inspect {shlex.quote(str(out / 'cache'))}",
        f"{python} -m accel_distill.generate {run} dataset.max_samples={2 * samples}   # adds to the cache",
        f"{python} -m accel_distill.train {run} training.num_train_epochs=10 {longer}",
        f"accel-distill report {student} --baseline {shlex.quote(str(out / 'baseline'))}",
        "accel-distill init > my-run.yaml   # a run file to fill in, for a teacher and a text of your own",
    ]
    return "To go on, from this directory:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """Say which step begins, and after it what it took."""
    say(f"[{number}/6] {title}")
    begun = time.monotonic()
    yield
    say(f"      step {number} took {time.monotonic() - begun:.1f} s\n")


def say(line: str) -> None:
    """Print a line at once, so that it stays before what a command prints."""
    print(line, flush=True)


def say_prose(text: str) -> None:
    """Print a line of text, broken between words where the terminal is narrower."""
    say("\n".join(labelled({"": text}, at=0, width=terminal_width(sys.stdout))))


def new_directory(out: Path | None) -> Path:
    """Make and return the directory for all files. Raises ConfigError where `out` holds something already."""
    path = out or next(path for path in default_directories() if not path.exists())
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ConfigError(f"--out {path}: there are files in it; name a new directory, or delete it first")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be made: {error.strerror}") from error
    return path


def default_directories() -> Iterator[Path]:
    """Yield demo-run, demo-run-2, demo-run-3, ..."""
    yield Path(DEFAULT_DIRECTORY)
    for number in itertools.count(2):
        yield Path(f"{DEFAULT_DIRECTORY}-{number}")


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the commands: `accelerate` is found beside this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    return {**environment, "PATH": path}


def count_gpus() -> int:
    """Return how many CUDA devices there are."""
    import torch

    return torch.cuda.device_count()
