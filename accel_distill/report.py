"""`accel-distill report RUN [--open]`: a training run as one HTML file, with a baseline beside it where one is named.

The one decision: whatever of a run is not there any more (its cache, its student, files that an older version did not
write) is said in the report, which goes on without it. Only a directory that holds no training log is an error.
torch is imported for the sample positions alone.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING

from accel_distill.command_line import OneSentenceParser
from accel_distill.errors import ConfigError, RunError, exit_with
from accel_distill.histograms import MOST_SHARDS
from accel_distill.inspect_cache import inspect_cache
from accel_distill.publish import replace
from accel_distill.report_page import Findings, report_page
from accel_distill.run_directory import Run, Values, number, read_run, section, unique_names
from accel_distill.run_table import by_measure
from accel_distill.run_warnings import beside_baseline, warnings

if TYPE_CHECKING:
    from accel_distill.sample_positions import Selection

FILE = "report.html"
ONLINE = "the teacher was online (teacher.mode), so the run has no cache."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        arguments = parse_arguments(argv)
        output = arguments.output or arguments.run / FILE
        lines = report(
            arguments.run,
            output,
            baseline=arguments.baseline,
            cache=arguments.cache,
            with_samples=not arguments.no_samples,
        )
        print("\n".join(lines), flush=True)
        if arguments.open:
            open_in_browser(output)
        return 0

    return exit_with(run)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = OneSentenceParser(
        prog="accel-distill report", description="Write a training run as one HTML file that loads nothing."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory (training.output_dir)")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="another run, to stand beside it")
    parser.add_argument("--cache", type=Path, metavar="CACHE", help="where the run's cache is now, if it was moved")
    parser.add_argument("--no-samples", action="store_true", help="do not run the student over held-out positions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the file to write; RUN/report.html by default")
    parser.add_argument("--open", action="store_true", help="open the report in the browser")
    return parser.parse_args(argv)


def report(
    path: Path,
    output: Path,
    *,
    baseline: Path | None = None,
    cache: Path | None = None,
    with_samples: bool = True,
) -> list[str]:
    """Write the report of the run in `path` to `output`; return a summary as lines.

    `cache` is where the run's cache is now, None where the run file says. Raises ConfigError for what is no run and
    for files that cannot be read, DiskGuard or RunError where the report cannot be written.
    """
    run = read_run(path)
    check_output(output)
    other = None
    if baseline is not None:
        names = unique_names([path, baseline])
        run, other = (
            replace_fields(each, name=name) for each, name in zip((run, read_run(baseline)), names, strict=True)
        )
    is_online = section(run.settings, "teacher").get("mode") == "online"
    place = None if is_online else cache or _cache_path(run)
    found, cache_note = ({}, ONLINE) if is_online else _inspected(run, place)
    selection, selection_note = _selected(run, place if found else None, with_samples=with_samples)
    sentences = warnings(run, cache=found) + (beside_baseline(run, other) if other else [])
    findings = Findings(
        sentences,
        run.missing,
        found,
        cache_note,
        selection,
        selection_note or f"no cache to read them from: {cache_note}",
    )
    write_page(report_page(run, other, findings), output)
    runs = [run] if other is None else [run, other]
    return [*by_measure(runs), *(f"note: {sentence}" for sentence in (*run.missing, *sentences)), f"report: {output}"]


def check_output(output: Path) -> None:
    """Raise ConfigError where a page cannot be put there, before it is made."""
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}: it is no file in a directory that is there; name another one")


def write_page(page: str, output: Path) -> None:
    """Put a page into its file. Raises DiskGuard or RunError."""
    replace(page.encode(), output, scratch=output.parent)


def open_in_browser(output: Path) -> None:
    """Open a page in the user's browser; say so where there is none."""
    if not webbrowser.open(output.resolve().as_uri()):
        print(f"no browser could be started here; open {output} in one", file=sys.stderr)


def _cache_path(run: Run) -> Path | None:
    path = section(run.settings, "cache").get("path")
    return Path(path) if isinstance(path, str) else None


def _inspected(run: Run, place: Path | None) -> tuple[Values, str]:
    """Return what is found of the run's cache, or nothing and the reason."""
    if place is None:
        return {}, "the run file names no cache."
    try:
        found = inspect_cache(place, most_shards=MOST_SHARDS)
    except ConfigError as error:
        return {}, f"{error}, or say where it is with --cache."
    except RunError as error:
        return {}, f"{error}."
    if run.cache_id not in (None, found["cache_id"]):
        return {}, f"the cache in {place} is another one than that the run was trained from."
    return found, ""


def _selected(run: Run, place: Path | None, *, with_samples: bool) -> tuple["Selection | None", str]:
    """Return the positions to show, or None and the reason."""
    if not with_samples:
        return None, "--no-samples was given."
    if place is None:
        return None, ""
    eval_samples = number(run.trained_on, "eval_samples") or number(section(run.settings, "dataset"), "eval_samples")
    from transformers.utils import logging

    from accel_distill.cache import TeacherCache
    from accel_distill.sample_positions import sample_positions

    logging.disable_progress_bar()
    try:
        opened = TeacherCache(place, allow_partial=True)
        return sample_positions(run.path, opened, eval_samples=int(eval_samples or 0)), ""
    except RunError as error:
        return None, f"{error}."
