"""`accel-distill compare RUN RUN ...`: several training runs in one table, and in one HTML file with their curves.

The one decision: runs are put side by side whatever they are, and what makes their figures incomparable (other held-out
samples, another cache or teacher) is said above them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel_distill.command_line import OneSentenceParser
from accel_distill.errors import ConfigError, exit_with
from accel_distill.report import check_output, open_in_browser, write_page
from accel_distill.report_page import compare_page
from accel_distill.run_directory import Run, read_run, unique_names
from accel_distill.run_table import MEASURES, by_run, held_out, teacher_cell
from accel_distill.run_warnings import not_comparable, setting_differences

FILE = "compare.html"
LONGEST_VALUE = 40  # characters of a setting in the terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        arguments = parse_arguments(argv)
        runs = read_runs(arguments.runs)
        check_output(arguments.output)
        write_page(compare_page(runs, not_comparable(runs)), arguments.output)
        found = as_json(runs) | {"page": str(arguments.output)}
        print(json.dumps(found, indent=1) if arguments.json else as_text(runs, found), flush=True)
        if arguments.open:
            open_in_browser(arguments.output)
        return 0

    return exit_with(run)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = OneSentenceParser(
        prog="accel-distill compare", description="Put training runs side by side: a table, and an HTML file."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the runs' directories (training.output_dir)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output", type=Path, default=Path(FILE), metavar="FILE", help=f"the file to write; {FILE} here by default"
    )
    parser.add_argument("--open", action="store_true", help="open the file in the browser")
    return parser.parse_args(argv)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs, under names that tell them apart; raise ConfigError for fewer than two, and as `read_run`."""
    if len(paths) < 2:
        raise ConfigError(f"found {len(paths)} run, expected two or more; `accel-distill report RUN` shows one")
    return [replace(read_run(path), name=name) for path, name in zip(paths, unique_names(paths), strict=True)]


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Return figures, differing settings, and why the figures cannot be compared, for programs."""
    names = [run.name for run in runs]
    keys = [measure.key for measure in MEASURES] + ["eval_teacher_ce", "eval_positions", "train_samples"]
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), "steps": run.step, **{key: run.number(key) for key in keys}}
            for run in runs
        ],
        "differences": {key: dict(zip(names, values, strict=True)) for key, values in setting_differences(runs)},
        "warnings": not_comparable(runs),
    }


def as_text(runs: Sequence[Run], found: dict[str, Any]) -> str:
    """Return the same for people."""
    lines = [f"{held_out(runs)}; * is the best", *by_run(runs)]
    if teacher := teacher_cell(MEASURES[0], runs[0]):
        lines.append(f"the teacher's {MEASURES[0].title}: {teacher}")
    for key, values in found["differences"].items():
        lines.append(f"{key}: " + ", ".join(f"{_short(value)} ({name})" for name, value in values.items()))
    lines += [f"not comparable: {sentence}" for sentence in found["warnings"]]
    return "\n".join([*lines, f"page: {found['page']}"])


def _short(value: Any) -> str:
    said = "not set" if value is None else str(value)
    return said if len(said) <= LONGEST_VALUE else said[: LONGEST_VALUE - 1] + "…"
