"""What the runs of the quality experiment say: a table, paired differences, a verdict, a plot.

The one decision: methods are compared in pairs, seed by seed, since runs of one seed share their first weights and
their order of data: what a seed does to all methods alike cancels. It needs runs of the same seeds; a seed that lacks
one of the two methods is left out of that comparison.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.quality_methods import ARMS, CE_ONLY, DENSE, RANDOM, THRESHOLDS

Run = Mapping[str, Any]  # method, seed, ce, kl, top1_agreement, ece, ids_per_position, bytes_per_position, ...

COLUMNS = ("method", "seeds", "ids", "bytes", "KL to teacher", "held-out CE", "top-1 agreement, %", "ECE, %")
PAIRED = ("minus dense KD, seed by seed", "seeds", "KL to teacher", "held-out CE", "top-1 agreement, %")


def table(runs: Sequence[Run]) -> str:
    """Return a line for each method: its mean over seeds, and in parentheses the smallest and the largest."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, of_method in by_method(runs):
        size = [_mean_or_dash(of_method, key) for key in ("ids_per_position", "bytes_per_position")]
        shares = [_spread([100 * run[key] for run in of_method], "{:.2f}") for key in ("top1_agreement", "ece")]
        nats = [_spread([run[key] for run in of_method], "{:.4f}") for key in ("kl", "ce")]
        rows.append((name, str(len(of_method)), *size, *nats, *shares))
    return _aligned(rows)


def paired_table(runs: Sequence[Run]) -> str:
    """Return a line for each method but dense KD: mean (smallest .. largest) of its differences to dense KD."""
    rows: list[tuple[str, ...]] = [PAIRED]
    for name, _ in by_method(runs):
        pairs = paired(runs, name, DENSE.name)
        if name == DENSE.name or not pairs:
            continue
        cells = [_spread([a[key] - b[key] for a, b in pairs], "{:+.4f}") for key in ("kl", "ce")]
        cells.append(_spread([100 * (a["top1_agreement"] - b["top1_agreement"]) for a, b in pairs], "{:+.2f}"))
        rows.append((name, str(len(pairs)), *cells))
    return _aligned(rows)


def verdict(runs: Sequence[Run]) -> str:
    """Say, by figures, whether a threshold with no more ids than random N=50 is nearer to dense KD than that is."""
    means = {name: summary(of_method) for name, of_method in by_method(runs)}
    if not {RANDOM.name, DENSE.name} <= set(means):
        return "No verdict: it needs finished runs of random N=50 and of dense KD."
    ids = means[RANDOM.name]["ids_per_position"]
    lines = [
        f"How far from dense KD, seed by seed? {RANDOM.name} has {ids:.1f} ids a position; with no more than that:"
    ]
    nearer: dict[str, list[str]] = {"kl": [], "ce": []}
    for arm in THRESHOLDS:
        if arm.name not in means or means[arm.name]["ids_per_position"] > ids:
            continue
        for key, of_key in nearer.items():
            if distances := distances_to_dense(runs, arm.name, RANDOM.name, key=key):
                own, other = (fmean(pair[at] for pair in distances) for at in (0, 1))
                wins = sum(a < b for a, b in distances)
                lines.append(
                    f"  {arm.name} ({means[arm.name]['ids_per_position']:.1f} ids), {key.upper()}: "
                    f"{own:.4f} away, random {other:.4f}; nearer in {wins} of {len(distances)} seeds"
                )
                of_key += [arm.name] if own < other else []
    for key, names in nearer.items():
        said = f"YES: {', '.join(names)}" if names else "NO, none of them"
        lines.append(f"Is one of them nearer to dense KD than {RANDOM.name} in {key.upper()}, on the mean? {said}.")
    return "\n".join(lines)


def by_method(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Return the methods that have runs, in the order of `ARMS`, with their runs by seed."""
    ordered = sorted(runs, key=lambda run: run["seed"])
    found = [(arm.name, [run for run in ordered if run["method"] == arm.name]) for arm in ARMS]
    return [(name, of_method) for name, of_method in found if of_method]


def paired(runs: Sequence[Run], name: str, other: str) -> list[tuple[Run, Run]]:
    """Return the runs of two methods that share a seed, by seed."""
    of = dict(by_method(runs))
    others = {run["seed"]: run for run in of.get(other, [])}
    return [(run, others[run["seed"]]) for run in of.get(name, []) if run["seed"] in others]


def distances_to_dense(runs: Sequence[Run], name: str, other: str, *, key: str) -> list[tuple[float, float]]:
    """Return, for each seed that has all three, how far `key` of two methods lies from that of dense KD."""
    dense = {run["seed"]: run[key] for run in runs if run["method"] == DENSE.name}
    pairs = paired(runs, name, other)
    return [(abs(a[key] - dense[a["seed"]]), abs(b[key] - dense[b["seed"]])) for a, b in pairs if a["seed"] in dense]


def summary(of_method: Sequence[Run]) -> dict[str, Any]:
    """Return the means of a method's runs, and the standard deviations over seeds of those that have one."""
    keys = [key for key, value in of_method[0].items() if isinstance(value, float)]
    means: dict[str, Any] = {key: fmean(run[key] for run in of_method) for key in keys}
    if len(of_method) > 1:
        means |= {f"{key}_sd": stdev(run[key] for run in of_method) for key in keys}
    return {"method": of_method[0]["method"], "seeds": [run["seed"] for run in of_method], **means}


def plot(runs: Sequence[Run], path: Path, *, title: str) -> None:
    """Draw against bytes per position: KL to the teacher of all methods, then differences to dense KD of the unbiased.

    Points are means, bars go from the smallest to the largest over seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    whole, *close = figure.subplots(1, 3)
    of = dict(by_method(runs))
    for arm, style in ((CE_ONLY, "-."), (DENSE, "--")):
        if arm.name in of:
            whole.axhline(fmean(run["kl"] for run in of[arm.name]), color="0.45", linestyle=style, label=arm.name)
    for name in of:
        if name not in (CE_ONLY.name, DENSE.name):
            _point(whole, of[name], [run["kl"] for run in of[name]], color=_color(name), label=name)
    whole.set(ylabel="held-out KL to the teacher, nats")
    whole.legend(fontsize=7)
    for axes, key in zip(close, ("kl", "ce"), strict=True):
        axes.axhline(0, color="0.45", linestyle="--")
        axes.set(ylabel=f"held-out {key.upper()} minus that of dense KD, same seed, nats")
        for arm in (RANDOM, *THRESHOLDS):
            if pairs := paired(runs, arm.name, DENSE.name):
                values = [a[key] - b[key] for a, b in pairs]
                _point(axes, of[arm.name], values, color=_color(arm.name), label=None)
                at = of[arm.name][0]["bytes_per_position"], fmean(values)
                left = arm != RANDOM  # which lies to the right of the threshold that it is compared with
                offset, side = ((-6, -3), "right") if left else ((6, 4), "left")
                axes.annotate(arm.name, at, xytext=offset, textcoords="offset points", ha=side, fontsize=8)
    for axes, ticks in ((whole, [5, 10, 20, 50, 100, 200]), *((axes, [5, 10, 20, 50]) for axes in close)):
        axes.set(xscale="log", xlabel="bytes per position, without input_ids")
        axes.minorticks_off()
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=95)


def _point(axes: Any, of_method: Sequence[Run], values: Sequence[float], *, color: str, label: str | None) -> None:
    mean = fmean(values)
    below_above = [[mean - min(values)], [max(values) - mean]]
    size = of_method[0]["bytes_per_position"]
    axes.errorbar([size], [mean], yerr=below_above, fmt="o", color=color, capsize=3, markersize=4, label=label)


def _color(name: str) -> str:
    """Return one of matplotlib's colours: thresholds in blues, every other method in its own."""
    blues = dict(zip((arm.name for arm in THRESHOLDS), ("#9ecae1", "#4292c6", "#2171b5", "#08306b"), strict=False))
    return {**blues, RANDOM.name: "C1"}.get(name) or ("C3" if "renormalised" in name else "C2")


def _spread(values: Sequence[float], form: str) -> str:
    low, mean, high = (form.format(value) for value in (min(values), fmean(values), max(values)))
    return f"{mean} ({low} .. {high})"


def _mean_or_dash(of_method: Sequence[Run], key: str) -> str:
    return "-" if of_method[0][key] is None else f"{fmean(run[key] for run in of_method):.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
