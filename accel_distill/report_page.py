"""The pages of `report` and `compare`: what is known of runs, filled into templates.

The one decision: a page is one file that asks for nothing else: style and plots are in it, and no script. Whatever
comes from a run, a text or a token is escaped by the template engine; only our own SVG is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from accel_distill import __version__, charts
from accel_distill.figures import size
from accel_distill.histograms import TITLES
from accel_distill.inspect_cache import bytes_by_kind
from accel_distill.run_curves import Plot, evaluated_once, plots
from accel_distill.run_directory import Run, Values, calibration_bins
from accel_distill.run_facts import facts, subtitle
from accel_distill.run_table import MEASURES, held_out, row, teacher_cell
from accel_distill.run_warnings import setting_differences

if TYPE_CHECKING:
    from accel_distill.sample_positions import Selection

VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}  # in tokens, where a reader has to see them
# In any text: control characters, which no page may have, and those that turn the direction of what follows.
CONTROLS = {number: chr(0x2400 + number) for number in range(32) if chr(number) not in VISIBLE} | {0x7F: "␡"}
CONTROLS |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


@dataclass(frozen=True)
class Findings:
    """What a report is made of, beside the run itself; a note says why something is not there."""

    warnings: Sequence[str] = ()
    missing: Sequence[str] = ()
    cache: Values = field(default_factory=dict)  # what `inspect_cache` found
    cache_note: str = ""
    selection: "Selection | None" = None
    selection_note: str = ""


def report_page(run: Run, baseline: Run | None, findings: Findings) -> str:
    """Return the page of one run, beside its baseline where there is one."""
    runs = [run] if baseline is None else [run, baseline]
    return _render(
        "report.html",
        title=run.name,
        subtitle=subtitle(run),
        run=run,
        runs=runs,
        findings=findings,
        headline=[_headline(measure, runs) for measure in MEASURES if measure.best],
        rows=[(measure, row(measure, runs), teacher_cell(measure, run)) for measure in MEASURES],
        held_out=held_out(runs),
        plots=[_safe(plot) for plot in plots(runs)],
        evaluated_once=evaluated_once(runs),
        calibration=_calibration(runs),
        cache=_cache(findings.cache),
        facts=facts(run),
    )


def compare_page(runs: Sequence[Run], warnings: Sequence[str]) -> str:
    """Return the page that puts several runs side by side; their names tell them apart."""
    return _render(
        "compare.html",
        title=" · ".join(run.name for run in runs),
        runs=runs,
        warnings=warnings,
        measures=MEASURES,
        columns=[row(measure, runs) for measure in MEASURES],
        teacher=[teacher_cell(measure, runs[0]) for measure in MEASURES],
        held_out=held_out(runs),
        plots=[_safe(plot) for plot in plots(runs)],
        evaluated_once=evaluated_once(runs),
        differences=setting_differences(runs),
        missing=[(run.name, sentence) for run in runs for sentence in run.missing],
    )


def _render(template: str, **values: Any) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"token": visible, "printable": printable, "width": percent_width}
    return environment.get_template(template).render(version=__version__, colours=charts.RUN_COLOURS, **values)


def percent_width(share: float) -> str:
    """Return a share as a CSS width."""
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


def visible(text: str) -> Markup:
    """Return a token as HTML in which spaces at its ends, and line ends, can be seen."""
    text = printable(text)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    marked = _marked("·" * before) + inner + _marked("·" * (len(text) - before - len(inner)))
    for character, shown in VISIBLE.items():
        marked = marked.replace(character, _marked(shown))
    return marked


def printable(text: str) -> str:
    """Return a text with signs in place of characters that a page cannot show."""
    return text.translate(CONTROLS)


def _marked(text: str) -> Markup:
    return Markup('<span class="space">{}</span>').format(text) if text else Markup("")


def _safe(plot: Plot) -> dict[str, Any]:
    return {"title": plot.title, "latest": plot.latest, "has_floor": plot.has_floor, "svg": Markup(plot.svg)}


def _headline(measure: Any, runs: Sequence[Run]) -> dict[str, str]:
    """Return one of the figures at the top, and what it is to be seen beside."""
    own, *others = row(measure, runs)
    beside = [f"baseline {other.text}" for other in others if other.text]
    if teacher := teacher_cell(measure, runs[0]):
        beside.append(f"teacher {teacher}")
    return {"title": measure.title, "value": own.text or "not known", "beside": ", ".join(beside)}


def _calibration(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the diagram with its figures; None where the first run does not have the bins."""
    diagrams = [bins for run in runs if (bins := calibration_bins(run))]
    if not calibration_bins(runs[0]):
        return None
    errors = [(run.name, run.number("eval_ece")) for run in runs]
    known = [(name if len(runs) > 1 else "", error) for name, error in errors if error is not None]
    said = "; ".join(f"{name} {error:.2%}".strip() for name, error in known)
    title = f"Calibration: accuracy over confidence; expected calibration error {said}"
    return {
        "svg": Markup(charts.calibration(title, diagrams)),
        "ece": said,
        "bins": len(diagrams[0]),
        "few": charts.FEW,
        "rows": _bin_rows(diagrams[0]),
    }


def _bin_rows(bins: charts.Bins) -> list[tuple[str, list[str]]]:
    """Return the bins that have positions as texts: the range of confidence, then the figures."""
    rows = []
    for place, (count, confidence, accuracy) in enumerate(bins):
        low, high = (100 * end / len(bins) for end in (place, place + 1))
        if count:
            rows.append((f"{low:.0f} to {high:.0f}%", [f"{count:,.0f}", f"{confidence:.1%}", f"{accuracy:.1%}"]))
    return rows


def _cache(found: Values) -> dict[str, Any] | None:
    """Return the statistics of a cache: figures, histograms, bytes by kind."""
    if not found or not found["positions"]:
        return None
    measured = found["distributions"]
    histograms = []
    for name, title in TITLES.items() if measured else ():
        mean = measured[name]["mean"]
        label = f"Histogram of {title}: mean {mean:.2f}"
        svg = charts.histogram(label, measured[name]["edges"], measured[name]["counts"], mean=mean)
        histograms.append({"title": title[0].upper() + title[1:], "mean": f"{mean:.2f}", "svg": Markup(svg)})
    kinds = bytes_by_kind(found)
    total = sum(kinds.values())
    figures = [
        ("samples", f"{found['samples']:,} ({found['empty']:,} empty, {found['truncated']:,} cut at max_length)"),
        ("positions with a target", f"{found['positions']:,}"),
        ("bytes", f"{size(found['bytes'])} in {found['shards']:,} shards"),
        (
            "ids a position",
            f"{found['ids_per_position']:.2f} ({found['head_ids_per_position']:.2f} kept, "
            f"{found['tail_ids_per_position']:.2f} drawn)",
        ),
    ]
    shares = [(kind, f"{value:.2f}", value / total) for kind, value in kinds.items()]
    of = "" if not measured or measured["of_shards"] == found["shards"] else f"{measured['of_shards']} of its shards"
    return {
        "figures": figures,
        "histograms": histograms,
        "bytes": shares,
        "bytes_per_position": f"{found['bytes_per_position']:.2f}",
        "from": of,
    }
