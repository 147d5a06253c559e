"""The experiment that decides which targets are good: one real teacher, the same student from scratch by each method.

The one decision: a seed stands for the student's first weights, the order of the data and the draw of the targets, and
is the same for all methods, so that methods are compared in pairs. Runs that are finished are kept in the JSON file and
not repeated; a file of other settings is refused.

    python bench/quality.py --quick                        # 200 steps
    python bench/quality.py --json q.json --plot q.png     # 700 steps of 2,048 tokens
    python bench/quality.py --preset gpu --json gpu.json   # a teacher of 100 M parameters, students of 30 M
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from accel_distill import uniforms
from accel_distill.errors import CacheMismatch, exit_with
from bench.quality_methods import ARMS, Arm, draw, examine, losses_of, teacher_figures, weigh
from bench.quality_report import by_method, paired_table, plot, summary, table, verdict
from bench.quality_teacher import Lesson, TeacherPlan, prepare
from bench.quality_training import Schedule, Shape, block_order, fit, logits_of

QUICK_STEPS = 200
WORK = Path("/tmp/accel_distill/quality")
ROOT = Path(__file__).resolve().parent.parent

TRAINED = TeacherPlan(
    corpora=("stories",),
    tokenizer=None,
    model=None,
    shape=Shape(hidden_size=128, intermediate_size=344, layers=4, heads=4),
    schedule=Schedule(steps=1500, batch=8, learning_rate=3e-3),
)
STORIES260K = TeacherPlan(corpora=("stories",), tokenizer="models/stories260K", model="models/stories260K")
LARGE = TeacherPlan(
    corpora=("books", "stories", "python"),
    tokenizer="tokenizers/gpt2",
    model=None,
    shape=Shape(hidden_size=768, intermediate_size=2048, layers=9, heads=12),
    schedule=Schedule(steps=400, batch=64, learning_rate=6e-4),  # about 3 epochs: it has 50 parameters a token
)


@dataclass(frozen=True)
class Plan:
    """Everything that a run's figures depend on, but its method and seed."""

    teacher: TeacherPlan
    student: Shape
    schedule: Schedule
    block: int  # tokens
    blocks_at_once: int  # a step's blocks are worked on so many at a time


PRESETS = {
    "cpu": Plan(
        teacher=TRAINED,
        student=Shape(hidden_size=96, intermediate_size=256, layers=3, heads=4),
        schedule=Schedule(steps=700, batch=8, learning_rate=8e-3),
        block=256,
        blocks_at_once=8,
    ),
    "gpu": Plan(
        teacher=LARGE,
        student=Shape(hidden_size=384, intermediate_size=1024, layers=6, heads=6),
        schedule=Schedule(steps=500, batch=64, learning_rate=1e-3),
        block=256,
        blocks_at_once=32,
    ),
}
TEACHERS = {"trained": TRAINED, "stories260K": STORIES260K}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = _parser().parse_args(argv)
    plan = PRESETS[arguments.preset]
    if arguments.teacher:
        plan = replace(plan, teacher=TEACHERS[arguments.teacher])
    if arguments.quick:
        plan = replace(plan, schedule=replace(plan.schedule, steps=QUICK_STEPS))

    def run() -> int:
        experiment(
            plan,
            seeds=range(arguments.seeds),
            data=arguments.data,
            work=arguments.work,
            json_path=arguments.json,
            plot_path=arguments.plot,
        )
        return 0

    return exit_with(run)


def experiment(
    plan: Plan, *, seeds: Sequence[int], data: Path, work: Path, json_path: Path | None, plot_path: Path | None
) -> list[dict[str, Any]]:
    """Run every method with every seed that the JSON file lacks, print what was found, and return all runs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()  # of loading weights
    started = time.perf_counter()
    lesson = prepare(
        plan.teacher, data=data, work=work, block=plan.block, blocks_at_once=plan.blocks_at_once, device=device
    )
    settings = settings_of(plan, lesson, device=device)
    sizes = {arm.name: weigh(arm, lesson.train, at_once=plan.blocks_at_once) for arm in ARMS}
    runs = [{**run, **sizes[run["method"]]} for run in finished_runs(json_path, settings)]  # by today's codec
    print(description(plan, lesson, device=device), flush=True)
    print(f"The teacher is there after {time.perf_counter() - started:.0f} s.", flush=True)
    for seed in seeds:
        for arm in ARMS:
            if any(run["method"] == arm.name and run["seed"] == seed for run in runs):
                continue
            runs.append({**run_arm(arm, plan, lesson, seed=seed), **sizes[arm.name]})
            if json_path is not None:
                write_json(json_path, {"settings": settings, **report(runs)})
            print(_line(runs[-1]), flush=True)
    print(f"\n{table(runs)}\n\n{paired_table(runs)}\n\n{verdict(runs)}")
    if plot_path is not None:
        plot(runs, plot_path, title=_title(plan, lesson))
    return runs


def run_arm(arm: Arm, plan: Plan, lesson: Lesson, *, seed: int) -> dict[str, Any]:
    """Train a student by one method and examine it."""
    started = time.perf_counter()
    text = lesson.train
    student = plan.student.model(vocab_size=lesson.train.vocab_size, block=plan.block, seed=seed).to(text.ids.device)
    order = block_order(len(text.ids), plan.schedule, seed=seed).to(text.ids.device)
    targets = None
    if arm.method is not None:
        targets = draw(arm, text, order.unique(), seed=seed, at_once=plan.blocks_at_once)
    losses = losses_of(arm, text, targets)
    fit(
        student,
        lambda rows: losses(logits_of(student, text.ids[rows]), rows),
        order=order,
        learning_rate=plan.schedule.learning_rate,
        blocks_at_once=plan.blocks_at_once,
    )
    return {
        "method": arm.name,
        "seed": seed,
        **examine(student, lesson.held_out, at_once=plan.blocks_at_once),
        "seconds": time.perf_counter() - started,
    }


def settings_of(plan: Plan, lesson: Lesson, *, device: torch.device) -> dict[str, Any]:
    """Return what must be the same for runs to stand in one table, as JSON gives it back."""
    settings = {
        **asdict(plan),
        "text_and_teacher": lesson.identity,
        "uniforms": uniforms.VERSION,
        "device": device.type,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(settings))


def finished_runs(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that the file holds; raise CacheMismatch where they were made with other settings."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    names = sorted({*settings, *found["settings"]})
    differing = [name for name in names if settings.get(name) != found["settings"].get(name)]
    if differing:
        name = differing[0]
        raise CacheMismatch(
            f"{path}: it holds runs with {name} = {found['settings'].get(name)!r}, and this run has "
            f"{settings.get(name)!r} (differing: {', '.join(differing)}); name another file with --json"
        )
    return found["runs"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write under a temporary name and rename, so that an interruption leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def report(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the JSON file holds beside the settings."""
    methods = [summary(of_method) for _, of_method in by_method(runs)]
    return {"machine": machine(), "runs": list(runs), "methods": methods, "verdict": verdict(runs).splitlines()}


def description(plan: Plan, lesson: Lesson, *, device: torch.device) -> str:
    """Say all sizes and the machine."""
    student = plan.student.model(vocab_size=lesson.train.vocab_size, block=plan.block, seed=0).num_parameters()
    train, held_out, schedule = lesson.train, lesson.held_out, plan.schedule
    (train_ce, _), (ce, entropy) = (teacher_figures(text, at_once=plan.blocks_at_once) for text in (train, held_out))
    return (
        f"Machine: {machine()}, device {device.type}\n"
        f"Teacher: {lesson.teacher_parameters:,} parameters, vocabulary {lesson.train.vocab_size:,}, from "
        f"{plan.teacher.model or plan.teacher.schedule};\n"
        f"  held out its CE is {ce:.4f} and its entropy {entropy:.4f} nats; its CE on the students' text is "
        f"{train_ce:.4f}\n"
        f"Student: {student:,} parameters, {plan.student}, from scratch\n"
        f"Training: {schedule.steps} steps of {schedule.batch * plan.block:,} tokens, learning rate "
        f"{schedule.learning_rate:g}, text of {train.ids.numel():,} tokens ({', '.join(plan.teacher.corpora)})\n"
        f"Held out: {len(held_out.ids) * held_out.positions:,} positions"
    )


def machine() -> str:
    """Name the machine by what matters for these figures."""
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} used by torch"
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{cores}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    data = Path(os.environ.get("ACCEL_DISTILL_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description="Compare students of one teacher by the targets they learn from.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--teacher", choices=sorted(TEACHERS), help="another teacher for --preset cpu")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps a student")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many seeds, from 0 (default 3)")
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help=f"texts and models (default {data})")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"keeps the teacher (default {WORK})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps finished runs; goes on with those it holds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of KL and CE against bytes")
    return parser


def _title(plan: Plan, lesson: Lesson) -> str:
    """Name what the plot shows."""
    tokens = plan.schedule.batch * plan.block
    return (
        f"Teacher of {lesson.teacher_parameters:,} parameters, vocabulary {lesson.train.vocab_size:,}; students after "
        f"{plan.schedule.steps} steps of {tokens:,} tokens; mean and range over seeds"
    )


def _line(run: dict[str, Any]) -> str:
    return f"seed {run['seed']}, {run['method']}: KL {run['kl']:.4f}, CE {run['ce']:.4f}, {run['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
