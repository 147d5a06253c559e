"""Plots as SVG that stands inside an HTML page: curves over steps, a calibration diagram, histograms.

The one decision: a plot has no colours of its own. matplotlib draws with stand-ins, and each becomes a CSS variable of
the page, so that one SVG reads on light and dark ground; text stays text in the page's font, and titles and legends are
the page's. The same figures give the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from accel_distill import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches of 72 units: on a telephone about as many pixels
HEIGHT = 2.7
FEW = 20  # positions of a bin below which its accuracy is hardly more than chance
RUN_COLOURS = 8  # variables --run-0 to --run-7 of the page
INK, FAINT, GRID, FLOOR = "#010101", "#020202", "#030303", "#040404"
STAND_INS = {INK: "--ink", FAINT: "--faint", GRID: "--grid", FLOOR: "--floor"}
STAND_INS |= {f"#0501{number:02x}": f"--run-{number}" for number in range(RUN_COLOURS)}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 10.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}
SETTLED = (
    0.04  # of the steps: the highest value after them ends the axis, so that the first ones do not flatten the rest
)

Kind = Literal["train", "eval", "floor"]
Bins = Sequence[tuple[float, float, float]]  # of confidence: positions, mean confidence, share that was right
Unit = Literal["nats", "share", "bytes", "count", "rate"]


@dataclass(frozen=True)
class Line:
    """One curve: what was measured in training, at evaluations (with points), or a floor (dashed)."""

    kind: Kind
    steps: Sequence[float]
    values: Sequence[float]
    run: int = 0  # which colour


def curves(
    title: str,
    lines: Sequence[Line],
    *,
    unit: Unit,
    positions: tuple[Sequence[int], Sequence[float]] = ((), ()),
    axis: Literal["steps", "positions"] = "steps",
) -> str:
    """Return curves over steps or positions; `positions` are steps and the positions seen at them, for more labels."""
    with _style(title):
        figure = _figure(HEIGHT)
        axes = figure.subplots()
        for line in lines:
            _draw(axes, line)
        last = max((line.steps[-1] for line in lines), default=1)
        axes.set_xlim(0, max(last, 1))
        _limit(axes, lines, from_zero=unit in ("bytes", "count"))
        axes.yaxis.set_major_locator(_locator(5))
        if unit != "nats":
            axes.yaxis.set_major_formatter(lambda value, _: _shown(value, unit))
        axes.xaxis.set_major_locator(_locator(5, whole=True))
        if axis == "positions":
            axes.xaxis.set_major_formatter(lambda seen, _: _short(seen))
            axes.set_xlabel("positions seen")
        else:
            axes.xaxis.set_major_formatter(lambda step, _: _step_label(step, positions))
            axes.set_xlabel("step" + (", and positions seen" if positions[0] else ""))
        return _svg(figure, title)


def calibration(title: str, diagrams: Sequence[Bins]) -> str:
    """Return accuracy over confidence, and below it the share of the first one's positions in each bin.

    Bins of fewer than `FEW` positions are dots beside the curve.
    """
    with _style(title):
        figure = _figure(3.9)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color=FLOOR, linewidth=1, linestyle=(0, (4, 3)))
        for number, bins in enumerate(diagrams):
            colour, points = _colour(number), [(x, y) for count, x, y in bins if count >= FEW]
            few = [(x, y) for count, x, y in bins if 0 < count < FEW]
            for x, y in points if number == 0 else []:
                axes.plot([x, x], [x, y], color=colour, linewidth=2, alpha=0.35)
            face = colour if number == 0 else "none"
            style: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": face, "linewidth": 1.3}
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, **style)
            if few:
                axes.plot(
                    *zip(*few, strict=True), color=colour, linestyle="none", marker="o", markersize=2.5, clip_on=False
                )
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that was right")
        counts = [count for count, *_ in diagrams[0]]
        middles = [(place + 0.5) / len(counts) for place in range(len(counts))]
        below.bar(
            middles, [count / sum(counts) for count in counts], width=0.8 / len(counts), color=_colour(0), alpha=0.8
        )
        below.set(xlabel="confidence: probability of the student's first choice", ylabel="positions")
        for each in (axes, below):
            each.xaxis.set_major_formatter(lambda value, _: _shown(value, "share"))
            each.yaxis.set_major_formatter(lambda value, _: _shown(value, "share"))
        below.yaxis.set_major_locator(_locator(2))
        return _svg(figure, title)


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], *, mean: float) -> str:
    """Return counted bins as bars, with a line at the mean."""
    with _style(title):
        figure = _figure(2.1)
        axes = figure.subplots()
        width = edges[1] - edges[0]
        axes.bar(list(edges[:-1]), list(counts), width=width * 0.9, align="edge", color=_colour(0), alpha=0.8)
        axes.axvline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(_locator(6))
        axes.yaxis.set_major_locator(_locator(3))
        axes.yaxis.set_major_formatter(lambda value, _: _shown(value, "count"))
        return _svg(figure, title)


def _draw(axes: "Axes", line: Line) -> None:
    colour = _colour(line.run)
    if line.kind == "train":
        axes.plot(line.steps, line.values, color=colour, linewidth=1.3, alpha=0.6)
    elif line.kind == "eval":
        points: dict[str, Any] = {"marker": "o", "markersize": 4.5} if len(line.steps) <= 60 else {}
        axes.plot(line.steps, line.values, color=colour, linewidth=1.8, clip_on=False, zorder=3, **points)
    else:
        axes.plot(line.steps, line.values, color=FLOOR, linewidth=1.2, linestyle=(0, (4, 3)))


def _limit(axes: "Axes", lines: Sequence[Line], *, from_zero: bool) -> None:
    """Set the y axis: to what each curve reaches once its first steps are over."""
    drawn = [
        (step >= SETTLED * line.steps[-1], value)
        for line in lines
        for step, value in zip(line.steps, line.values, strict=True)
        if math.isfinite(value)
    ] or [(True, 0.0)]
    settled = [value for is_settled, value in drawn if is_settled] or [value for _, value in drawn]
    low, high = min(value for _, value in drawn), max(settled)
    low = 0.0 if from_zero else low
    room = 0.08 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low if from_zero else low - room, high + room)


def _step_label(step: float, positions: tuple[Sequence[int], Sequence[float]]) -> str:
    """Return a tick's label: the step and, below it, about how many positions had been seen."""
    import numpy as np

    label = f"{step:,.0f}"
    if not positions[0] or step > positions[0][-1] * 1.001:
        return label
    seen = float(np.interp(step, [0, *positions[0]], [0, *positions[1]]))
    return f"{label}\n{_short(seen)}"


def _shown(value: float, unit: Unit) -> str:
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return figures.size(value) if value else "0"
    if unit == "count":
        return _short(value)
    return f"{value:.2g}"


def _short(value: float) -> str:
    """Return a number in thousands and so on, without digits that are 0: 15 k, 2.5 M."""
    scale, unit = next(((s, u) for s, u in figures.COUNTS if abs(value) >= s), (1, ""))
    return f"{value / scale:.3g} {unit}".rstrip()


def _colour(run: int) -> str:
    return f"#0501{run % RUN_COLOURS:02x}"


def _locator(most: int, *, whole: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10])


def _style(title: str) -> Any:
    """Return matplotlib's settings for a plot; names in the SVG follow from its title, so none is twice in a page."""
    import matplotlib

    settings: Any = {**STYLE, "svg.hashsalt": title}
    return matplotlib.rc_context(settings)


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _svg(figure: "Figure", title: str) -> str:
    """Return the figure as an element of a page: scales with its column, coloured by variables, labelled."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', drawn)
    assert box is not None
    inside = drawn[drawn.index(">") + 1 :].replace("xlink:href", "href")
    inside = re.sub(r"<style.*?</style>", "", inside, flags=re.DOTALL)  # it would be the whole page's
    inside = re.sub(r'<g id="[^"]*"', "<g", inside)  # matplotlib counts its groups anew in each plot
    inside = re.sub(r"(?<=[ \"(-])(\d+\.\d\d)\d+(?=[ \")\n])", r"\1", inside)  # coordinates
    inside = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", inside)
    for stand_in, variable in STAND_INS.items():
        inside = inside.replace(stand_in, f"var({variable})")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(title)}">{inside}'
