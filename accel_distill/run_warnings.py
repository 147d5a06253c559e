"""What a reader of a run's figures must know: rules over the run's log, its results, its cache and a baseline.

The one decision: each rule is a function that returns sentences with the figures that made it speak, or none; it reads
what is there and is silent about what is not (`Run.missing` says that).
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from accel_distill.manifest import differences, drift_sentences
from accel_distill.run_directory import Run, Values, number, section

FEW_POSITIONS = 10_000  # held out: below, top-1 agreement is known to about a point
RISES = 0.01  # of the loss, from one fifth of the run to the next
WORSE = 0.005  # of a held-out loss: less is what evaluations differ by anyway
TOLD_FIRST = ("teacher.", "tokenizer.", "dataset.", "sequence.", "targets.")  # of the identity: the rest may follow
OTHER_LENGTH = 0.01  # of the epochs
DATA_KEYS = (  # of the run file: where no cache says what was trained on
    "teacher.model",
    "teacher.revision",
    "dataset.name",
    "dataset.config_name",
    "dataset.data_files",
    "dataset.split",
    "dataset.max_length",
    "dataset.eval_samples",
)


def warnings(run: Run, *, cache: Values | None = None) -> list[str]:
    """Return what is to be said of one run; `cache` is what `inspect_cache` found of its cache."""
    found = [sentence for rule in RULES for sentence in rule(run)]
    return [*found, *_of_cache(run, cache or {})]


def beside_baseline(run: Run, baseline: Run) -> list[str]:
    """Return where a run is not better than its baseline, and why the two cannot be compared."""
    sentences = []
    for name, what in (("eval_kl", "KL to the teacher"), ("eval_ce", "cross-entropy")):
        ours, theirs = run.number(name), baseline.number(name)
        if ours is not None and theirs is not None and not ours < theirs:
            sentences.append(f"The {what} is {ours:.4f} nats and not below the baseline's {theirs:.4f}.")
    ours, theirs = run.number("eval_ece"), baseline.number("eval_ece")
    if ours is not None and theirs is not None and ours > theirs:
        sentences.append(
            f"The student is calibrated worse than the baseline: its expected calibration error is {ours:.2%}, the "
            f"baseline's {theirs:.2%}."
        )
    ours, theirs = number(run.state, "epoch"), number(baseline.state, "epoch")
    if ours and theirs and abs(ours - theirs) > OTHER_LENGTH * max(ours, theirs):
        sentences.append(f"The run trained for {ours:.4g} epochs, the baseline for {theirs:.4g}.")
    return [*sentences, *not_comparable([run, baseline])]


def not_comparable(runs: Sequence[Run]) -> list[str]:
    """Return why figures of the runs cannot be compared with those of the first."""
    first, *others = runs
    return [f"{first.name} and {other.name}: {why}." for other in others for why in _why_not(first, other)]


def setting_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Return the dotted keys at which the run files differ, with the value of each run (None: not set)."""
    flat = [dict(_flattened(run.settings)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, [values.get(key) for values in flat]) for key in keys if key != "training.output_dir"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _stopped_early(run: Run) -> list[str]:
    planned = number(run.state, "max_steps")
    if not planned or run.step >= planned:
        return []
    return [f"Training stopped at step {run.step:,} of {planned:,.0f}."]


def _not_finite(run: Run) -> list[str]:
    for line in run.log:
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                return [f"At step {line['step']:,} {name} is {value}: not finite."]
    return []


def _rising(run: Run) -> list[str]:
    """Compare the loss of the last fifth of the log with that of the fifth before."""
    values = [value for value in run.series("loss")[1] if math.isfinite(value)]
    size = len(values) // 5
    if size < 2:
        return []
    before, last = values[-2 * size : -size], values[-size:]
    error = math.hypot(stdev(before), stdev(last)) / math.sqrt(size)
    rise = fmean(last) - fmean(before)
    if rise <= max(RISES * abs(fmean(before)), 3 * error):
        return []
    return [
        f"The training loss rises at the end: {fmean(last):.4f} on the mean of the last fifth of the log, "
        f"{fmean(before):.4f} in the fifth before; the learning rate may be too high."
    ]


def _was_better(run: Run) -> list[str]:
    steps, values = run.series("eval_loss")
    if not values or not all(map(math.isfinite, values)):
        return []
    best = min(range(len(values)), key=lambda place: values[place])
    if values[-1] - values[best] <= WORSE * abs(values[best]):
        return []
    return [
        f"The held-out loss was lowest at step {steps[best]:,} ({values[best]:.4f}) and is {values[-1]:.4f} at the "
        "end: the student may have learnt its training samples by heart, so fewer epochs or more samples may help."
    ]


def _few_held_out(run: Run) -> list[str]:
    positions, agreement = run.number("eval_positions"), run.number("eval_top1_agreement")
    if positions is None:
        return ["Nothing was held out and evaluated, so nothing here says how well the student does on other text."]
    if not 0 < positions < FEW_POSITIONS or agreement is None:
        return []
    error = 1.96 * math.sqrt(agreement * (1 - agreement) / positions)
    samples = run.number("eval_samples") or 0
    return [
        f"Only {samples:,.0f} samples with {positions:,.0f} positions were evaluated: top-1 agreement is known to "
        f"{100 * error:.1f} points either way, at best."
    ]


def _full_logits(run: Run) -> list[str]:
    reason = run.record.get("full_logits")
    if not isinstance(reason, str):
        return []
    return [f"The logits of all positions of a batch existed at once, which costs memory, because {reason}."]


def _bound_only(run: Run) -> list[str]:
    targets = section(run.identity, "targets") or section(run.settings, "targets")
    if targets.get("method") != "top_k":
        return []
    return ["The targets are the teacher's most probable ids (top_k), so KD and KL are lower bounds."]


def _partial_cache(run: Run) -> list[str]:
    cache = section(run.record, "cache")
    if cache.get("complete") is not False:
        return []
    planned = number(section(run.settings, "dataset"), "max_samples")
    of = f" of {planned:,.0f}" if planned else ""
    return [f"The cache was not complete: it had {number(cache, 'samples') or 0:,.0f}{of} samples at training time."]


RULES: Sequence[Callable[[Run], list[str]]] = (
    _stopped_early,
    _not_finite,
    _rising,
    _was_better,
    _few_held_out,
    _partial_cache,
    _bound_only,
    _full_logits,
)


def _of_cache(run: Run, inspected: Values) -> list[str]:
    """Say what the run's record of its cache, or else the cache as it is now, has of damage."""
    sentences = []
    recorded = section(run.record, "cache")
    without, positions = (number(recorded or inspected, name) for name in ("nonfinite", "positions"))
    if without:
        share = without / (without + (positions or 0))
        sentences.append(
            f"{without:,.0f} positions ({share:.2%}) were left out of the cache because a logit of the teacher was not "
            "finite."
        )
    sentences += [f"{sentence}." for sentence in drift_sentences(inspected.get("drift") or [])]
    now, then = number(inspected, "samples"), number(recorded, "samples") or number(run.trained_on, "samples")
    if now and then and now != then:
        sentences.append(f"The cache now has {now:,.0f} samples; the run was trained when it had {then:,.0f}.")
    return sentences


def _why_not(first: Run, other: Run) -> list[str]:
    """Return, as ends of sentences, why two runs cannot be compared."""
    if first.cache_id and other.cache_id:
        why = _other_data(first, other)
    else:
        ours, theirs = (dict(_flattened(run.settings)) for run in (first, other))
        keys = [key for key in DATA_KEYS if ours.get(key) != theirs.get(key)] if ours and theirs else []
        why = [f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys]
    held_out = [run.number("eval_positions") for run in (first, other)]
    if not why and None not in held_out and held_out[0] != held_out[1]:
        why = [f"other positions were held out ({held_out[0]:,.0f} and {held_out[1]:,.0f})"]
    return why


def _other_data(first: Run, other: Run) -> list[str]:
    if first.cache_id != other.cache_id:
        changed = differences(first.identity, other.identity) if first.identity and other.identity else []
        changed.sort(key=lambda sentence: not sentence.startswith(TOLD_FIRST))
        details = f" ({changed[0].split(' is ')[0]} differs)" if changed else ""
        return [f"they were trained from different caches{details}"]
    (ours, theirs), why = (first.trained_on, other.trained_on), []
    if ours.get("eval_samples") != theirs.get("eval_samples"):
        why.append(f"{ours.get('eval_samples')} and {theirs.get('eval_samples')} samples were held out")
    if ours.get("samples") != theirs.get("samples"):
        why.append(f"the cache had {ours.get('samples')} and {theirs.get('samples')} samples")
    return why


def _flattened(values: Values, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys and values of nested mappings."""
    flat = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flattened(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
