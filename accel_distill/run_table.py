"""The figures that runs are judged by, as rows of cells: for the terminal and for pages.

The one decision: these are the rows of the README and of the demo, in one place; the best of several runs is marked
where lower or higher is better whatever the machine, so not in seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from accel_distill.run_directory import Run


@dataclass(frozen=True)
class Measure:
    """One figure of a run."""

    title: str
    short: str  # as the head of a column
    key: str
    form: str
    best: Literal["lowest", "highest"] | None
    of_teacher: str | None = None  # the key of the teacher's own


MEASURES = (
    Measure("cross-entropy, nats", "CE", "eval_ce", "{:.4f}", "lowest", "eval_teacher_ce"),
    Measure("KL(teacher || student), nats", "KL", "eval_kl", "{:.4f}", "lowest"),
    Measure("top-1 agreement", "agreement", "eval_top1_agreement", "{:.2%}", "highest"),
    Measure("expected calibration error", "ECE", "eval_ece", "{:.2%}", "lowest"),
    Measure("training, seconds", "seconds", "train_runtime", "{:,.0f}", None),
)


@dataclass(frozen=True)
class Cell:
    """One figure as it is shown."""

    text: str  # empty: not known
    is_best: bool = False


def row(measure: Measure, runs: Sequence[Run]) -> list[Cell]:
    """Return one measure of each run; the best is marked, of those evaluated on as much as the first that differ."""
    values = [run.number(measure.key) for run in runs]
    alike = [place for place, run in enumerate(runs) if _evaluated_on(run) == _evaluated_on(runs[0])]
    finite = [value for place in alike if (value := values[place]) is not None and math.isfinite(value)]
    best = None
    if measure.best and len(finite) > 1 and min(finite) != max(finite):
        best = min(finite) if measure.best == "lowest" else max(finite)
    return [
        Cell("" if value is None else measure.form.format(value), value == best is not None and place in alike)
        for place, value in enumerate(values)
    ]


def teacher_cell(measure: Measure, run: Run) -> str:
    """Return the teacher's own figure; empty where it has none."""
    value = run.number(measure.of_teacher) if measure.of_teacher else None
    return "" if value is None else measure.form.format(value)


def by_measure(runs: Sequence[Run]) -> list[str]:
    """Return a line for each measure, a column for each run, and the teacher's; of two runs in 79 columns."""
    names = (*(run.name for run in runs), "teacher")
    lines = [held_out(runs), " ".join([" " * 32, *(f"{name[-14:]:>14}" for name in names)])]
    for measure in MEASURES:
        cells = [_marked(cell) for cell in row(measure, runs)]
        cells.append(teacher_cell(measure, runs[0]))
        lines.append(" ".join([f"  {measure.title:30}", *(f"{cell:>14}" for cell in cells)]).rstrip())
    return lines


def by_run(runs: Sequence[Run]) -> list[str]:
    """Return a line for each run, a column for each measure; an asterisk marks the best."""
    width = max(len(run.name) for run in runs)
    heads = [measure.short for measure in MEASURES]
    columns = [[_marked(cell) for cell in row(measure, runs)] for measure in MEASURES]
    lines = ["  ".join([f"{'run':{width}}", *(f"{head:>10}" for head in heads), f"{'steps':>9}"])]
    for place, run in enumerate(runs):
        cells = [f"{column[place]:>10}" for column in columns]
        lines.append("  ".join([f"{run.name:{width}}", *cells, f"{run.step:>9,}"]))
    return lines


def held_out(runs: Sequence[Run]) -> str:
    """Say what the figures were measured on, by the names of the runs where that is not one thing."""
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(_held_out(run), []).append(run.name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{said} ({', '.join(which)})" for said, which in names.items())


def _evaluated_on(run: Run) -> tuple[float | None, float | None]:
    return run.number("eval_samples"), run.number("eval_positions")


def _held_out(run: Run) -> str:
    samples, positions = run.number("eval_samples"), run.number("eval_positions")
    if not positions:
        return "nothing was evaluated"
    of = "" if samples is None else f"{samples:,.0f} samples held out, "
    return f"{of}{positions:,.0f} positions"


def _marked(cell: Cell) -> str:
    return f"{cell.text}{'*' if cell.is_best else ' '}" if cell.text else ""
