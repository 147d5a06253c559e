"""A run's directory, as training left it: its log, its results, its run file, its record.

The one decision: only the log is needed. Whatever else is not there, or is of another version, is None or empty where
it is asked for, and named in `missing`: a run of last year still gives a report.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from accel_distill.errors import ConfigError
from accel_distill.regular_file import MEBIBYTE, parse_json_object, read_regular
from accel_distill.run_file import read_run_file
from accel_distill.run_record import FILE as RECORD
from accel_distill.run_record import read_run_record

LARGEST_STATE = 256 * MEBIBYTE  # bytes of a trainer_state.json: it holds the whole log
LARGEST_RESULTS = MEBIBYTE
Values = dict[str, Any]
Series = tuple[list[int], list[float]]  # steps, and a value at each of them


@dataclass(frozen=True)
class Run:
    """One training run, as its directory says."""

    path: Path
    name: str
    state: Values  # trainer_state.json
    results: Values = field(default_factory=dict)  # all_results.json
    settings: Values = field(default_factory=dict)  # run.yaml
    record: Values = field(default_factory=dict)  # run_record.json
    missing: tuple[str, ...] = ()  # sentences: what is not there

    @cached_property
    def metrics(self) -> Values:
        """The final figures: the results, and where there are none what the log says last."""
        logged: Values = {}
        for line in self.log:
            logged |= {name: value for name, value in line.items() if name.startswith(("eval_", "train_"))}
        return logged | self.results

    @cached_property
    def log(self) -> list[Values]:
        """The lines of the log that have a step, in order."""
        return [line for line in self.state["log_history"] if isinstance(line.get("step"), int)]

    @property
    def step(self) -> int:
        """The last step."""
        return max([int(number(self.state, "global_step") or 0), *(line["step"] for line in self.log)])

    def number(self, name: str) -> float | None:
        """Return a final figure."""
        return number(self.metrics, name)

    def series(self, name: str) -> Series:
        """Return a value of the log by steps; of several at one step the last, as after a resumption."""
        found = {line["step"]: value for line in self.log if (value := number(line, name)) is not None}
        return sorted(found), [found[step] for step in sorted(found)]

    @cached_property
    def positions_seen(self) -> Series:
        """How many positions the student had seen after each logged step; empty for a run of an older version."""
        steps, counts = self.series("positions")
        return steps, [sum(counts[: place + 1]) for place in range(len(counts))]

    @cached_property
    def trained_on(self) -> Values:
        """What the checkpoints say of the data: cache_id, content_sha256, samples, eval_samples, global_batch."""
        return section(self.state, "stateful_callbacks", "CheckpointRecord", "args")

    @property
    def cache_id(self) -> str | None:
        """The identity of the cache that was trained from; None without one, or where nothing says it."""
        found = section(self.record, "cache").get("cache_id") or self.trained_on.get("cache_id")
        return found if isinstance(found, str) else None

    @property
    def identity(self) -> Values:
        """What the cache was made from."""
        return section(self.record, "cache", "identity")


def read_run(path: Path) -> Run:
    """Read a run's directory; raise ConfigError where it is none, or where a file of it cannot be read."""
    if not path.is_dir():
        raise ConfigError(f"run {path}: it is not a directory; name a training.output_dir")
    missing: list[str] = []
    state_file = _state_file(path, missing)
    state = _read_json(state_file, limit=LARGEST_STATE)
    log = state.get("log_history")
    if not isinstance(log, list) or not all(isinstance(line, dict) for line in log):
        raise ConfigError(f"{state_file}: its 'log_history' is no list of objects; it was not written by a Trainer")
    name = path.resolve().name
    return Run(path, name, state, *_the_rest(path, missing), tuple(missing))


def calibration_bins(run: Run) -> list[tuple[float, float, float]]:
    """Return positions, mean confidence and share that was right, by bins of confidence; empty where not known."""
    bins = section(run.results, "eval_calibration")
    columns = [bins.get(name) for name in ("positions", "confidence", "accuracy")]
    known = [column for column in columns if isinstance(column, list)]
    if len({len(column) for column in known}) != 1 or len(known) < len(columns):
        return []
    rows = list(zip(*known, strict=True))
    are_numbers = all(_is_number(value) for row in rows for value in row)
    return rows if are_numbers and any(row[0] for row in rows) else []


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart; the same directory twice gets a number."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for place, own in enumerate(parts):
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in others))
        again = parts[:place].count(own)
        names.append("/".join(own[-length:]) + (f" ({again + 1})" if again else ""))
    return names


def section(values: Values, *names: str) -> Values:
    """Return a mapping inside mappings; an empty one where it is not there, or is something else."""
    for name in names:
        inner = values.get(name)
        values = inner if isinstance(inner, dict) else {}
    return values


def number(values: Values, name: str) -> float | None:
    """Return a number of a mapping, which may be NaN or infinite; None where it is not there or something else."""
    value = values.get(name)
    return value if _is_number(value) else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _state_file(path: Path, missing: list[str]) -> Path:
    """Return the run's own trainer_state.json or, of a run that did not end, that of its last checkpoint."""
    if (path / "trainer_state.json").exists():
        return path / "trainer_state.json"
    checkpoints = [
        (int(digits), file)
        for file in path.glob("checkpoint-*/trainer_state.json")
        if (digits := file.parent.name.removeprefix("checkpoint-")).isdigit()
    ]
    if not checkpoints:
        raise ConfigError(
            f"run {path}: it holds no trainer_state.json, so no training ended or saved a checkpoint there; name a "
            "training.output_dir"
        )
    step, file = max(checkpoints)
    missing.append(f"The run has not ended: this is its log up to its last checkpoint, at step {step:,}.")
    return file


def _the_rest(path: Path, missing: list[str]) -> tuple[Values, Values, Values]:
    """Return results, settings and record; what is not there is empty, and said in `missing`."""
    results: Values = {}
    settings: Values = {}
    record: Values = {}
    if (path / "all_results.json").exists():
        results = _read_json(path / "all_results.json", limit=LARGEST_RESULTS)
    else:
        missing.append("There is no all_results.json: the final figures are the last ones of the log.")
    if (path / "run.yaml").exists():
        settings = read_run_file(path / "run.yaml")
    else:
        missing.append("There is no run.yaml: the settings of the run are not known.")
    try:
        record = read_run_record(path)
    except FileNotFoundError:
        missing.append(
            f"There is no {RECORD} (an older version trained the run): versions, machine and student are not known."
        )
    except (OSError, ValueError) as error:
        raise _unreadable(path / RECORD, error) from error
    return results, settings, record


def _read_json(path: Path, *, limit: int) -> Values:
    try:
        return parse_json_object(read_regular(path, limit=limit))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError(f"{path}: it cannot be read ({reason}); bring it back, or train again")
