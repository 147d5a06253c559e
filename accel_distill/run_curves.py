"""Which curves of one or more runs are drawn, each with its title, legend and text for those who cannot see it.

The one decision: a report and a comparison draw the same plots. Runs whose steps cover the same number of positions
share an axis of steps; where they do not, and all say how many positions they saw, the axis is of positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from accel_distill import figures
from accel_distill.charts import RUN_COLOURS, Line, Unit, curves
from accel_distill.run_directory import Run, Series

SAME = 1e-6  # relative: KD and KL that differ by less are one curve
SAME_PACE = 0.02  # relative: positions a step


@dataclass(frozen=True)
class Plot:
    """A drawn plot and what the page puts around it."""

    title: str
    svg: str
    latest: str = ""  # the last value, in words
    has_floor: bool = False


@dataclass(frozen=True)
class Curve:
    """What is drawn in one plot."""

    title: str
    train: str | None  # keys of the log
    held_out: str | None
    unit: Unit
    floor: str | None = None
    least: int = 1  # points below which it is not drawn
    told: Literal["last", "highest", "mean"] = "last"  # which of its values stands beside the title


CURVES = (
    Curve("KL to the teacher, nats", "kl", "eval_kl", "nats"),
    Curve("Cross-entropy, nats", "ce", "eval_ce", "nats", floor="eval_teacher_ce"),
    Curve("KD, the divergence of the loss", "kd", "eval_kd", "nats"),
    Curve("Top-1 agreement", None, "eval_top1_agreement", "share", least=2),
    Curve("Expected calibration error", None, "eval_ece", "share", least=2),
    Curve("Learning rate", "learning_rate", None, "rate", told="highest"),
    Curve("Positions per second", "positions_per_second", None, "count", told="mean"),
    Curve("Peak memory", "peak_memory_bytes", None, "bytes", told="highest"),
)


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Return the plots for which the runs have figures."""
    by_positions = _paces_differ(runs)
    return [plot for curve in CURVES if (plot := _plot(curve, runs, by_positions=by_positions)) is not None]


def evaluated_once(runs: Sequence[Run]) -> bool:
    """Whether no run was evaluated more than once, so that there is no curve of it."""
    return max(len(run.series("eval_kl")[0]) for run in runs) == 1


def _plot(curve: Curve, runs: Sequence[Run], *, by_positions: bool) -> Plot | None:
    if curve.train == "kd" and all(_same(run.series("kd"), run.series("kl")) for run in runs):
        return None
    lines: list[Line] = []
    for number, run in enumerate(runs):
        for kind, key in (("train", curve.train), ("eval", curve.held_out)):
            steps, values = run.series(key) if key else ([], [])
            if steps:
                lines.append(Line(kind, _axis(run, steps, by_positions), values, run=number % RUN_COLOURS))  # type: ignore[arg-type]
    if max((len(line.steps) for line in lines), default=0) < curve.least:
        return None
    floor = _floor(curve, runs, last=max(line.steps[-1] for line in lines))
    latest = "; ".join(_latest(curve, run, run.name if len(runs) > 1 else "") for run in runs)
    title = f"{curve.title}, over {'positions' if by_positions else 'steps'}: {latest}"
    seen: Series = ([], []) if by_positions else runs[0].positions_seen
    svg = curves(
        title, [*floor, *lines], unit=curve.unit, positions=seen, axis="positions" if by_positions else "steps"
    )
    return Plot(curve.title, svg, latest if len(runs) == 1 else "", bool(floor))


def _floor(curve: Curve, runs: Sequence[Run], *, last: float) -> list[Line]:
    """Return the floor of the first run that has one, from end to end."""
    values = [run.number(curve.floor) for run in runs] if curve.floor else []
    value = next((value for value in values if value is not None), None)
    return [] if value is None else [Line("floor", [0, last], [value, value])]


def _axis(run: Run, steps: Sequence[int], by_positions: bool) -> list[float]:
    if not by_positions:
        return [float(step) for step in steps]
    at, seen = run.positions_seen
    return np.interp(steps, [0, *at], [0, *seen]).tolist()


def _paces_differ(runs: Sequence[Run]) -> bool:
    """Whether the runs' steps cover other numbers of positions, and all say which."""
    seen = [run.positions_seen for run in runs]
    if not all(steps for steps, _ in seen):
        return False
    paces = [counts[-1] / max(steps[-1], 1) for steps, counts in seen]
    return max(paces) - min(paces) > SAME_PACE * max(paces)


def _same(one: Series, other: Series) -> bool:
    return one[0] == other[0] and all(
        math.isclose(a, b, rel_tol=SAME, abs_tol=SAME) for a, b in zip(one[1], other[1], strict=True)
    )


def _latest(curve: Curve, run: Run, name: str) -> str:
    """Say the last value of a run's curve, held out where there is one; or the highest, or the mean."""
    held_out = run.series(curve.held_out)[1] if curve.held_out else []
    values = held_out or (run.series(curve.train)[1] if curve.train else [])
    if not values:
        return f"{name} nothing".strip()
    value = {"last": values[-1], "highest": max(values), "mean": fmean(values)}[curve.told]
    where = "held out" if held_out and curve.train else "" if curve.told == "last" else curve.told
    return " ".join(part for part in (name, worded(value, curve.unit), where) if part)


def worded(value: float, unit: Unit) -> str:
    """Return a value of a curve as text."""
    if unit == "share":
        return f"{value:.2%}"
    if unit in ("bytes", "count"):
        return figures.size(value) if unit == "bytes" else f"{value:,.0f}"
    return f"{value:.4f}" if unit == "nats" else f"{value:.3g}"
