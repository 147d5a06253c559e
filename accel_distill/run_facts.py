"""What was run, as groups of named facts: student, teacher, text, targets, cache, loss, training, machine, versions.

The one decision: the record of the training's own time counts first, then the run file; what neither says is left out,
never guessed from the machine that the report is made on.
"""

from collections.abc import Sequence
from typing import Any

from accel_distill.figures import duration, number_of, size
from accel_distill.run_directory import Run, number, section

Facts = list[tuple[str, str]]  # a name and what is to be said of it
SHORT_ID = 16  # hexadecimal digits


def facts(run: Run) -> list[tuple[str, Facts]]:
    """Return the groups that have something to say, each with its title."""
    groups = [
        ("Student", _student(run)),
        ("Teacher", _teacher(run)),
        ("Text", _text(run)),
        ("Targets", _targets(run)),
        ("Cache", _cache(run)),
        ("Loss", _named(section(run.settings, "loss"), LOSS)),
        ("Training", _training(run)),
        ("Machine", _machine(run)),
        ("Versions", _named(section(run.record, "versions"))),
    ]
    return [(title, said) for title, values in groups if (said := [(name, text) for name, text in values if text])]


LOSS = ("divergence", "kd_weight", "ce_weight")


def subtitle(run: Run) -> str:
    """Return the run in a line: who learnt what from whom, how long."""
    student = section(run.record, "student")
    parameters = number(student, "parameters")
    who = f"{student.get('class', 'A student')}" + (f" of {parameters:,.0f} parameters" if parameters else "")
    adapters = number(student, "adapter_parameters")
    who += f" with adapters of {adapters:,.0f}" if adapters else ""
    teacher = section(run.settings, "teacher").get("model")
    loss = section(run.settings, "loss")
    how = "trained" if loss.get("kd_weight") == 0 else "distilled"
    whom = f" from {_last_part(teacher)}" if isinstance(teacher, str) and how == "distilled" else ""
    samples, seconds = run.number("train_samples"), run.number("train_runtime")
    on = f" on {samples:,.0f} samples" if samples else ""
    took = f" in {duration(seconds)}" if seconds else ""
    return f"{who}, {how}{whom}{on}; {number_of(run.step, 'step')}{took}."


def _student(run: Run) -> Facts:
    student, made = section(run.settings, "student"), section(run.record, "student")
    total, trained = number(made, "parameters"), number(made, "trained_parameters")
    adapters = number(made, "adapter_parameters")
    parameters = "" if total is None else f"{total:,.0f}"
    if trained is not None and trained not in (total, adapters):
        parameters += f"; {trained:,.0f} were trained"
    sizes, lora = section(student, "config"), section(student, "lora")
    return [
        ("class", _text_of(made.get("class"))),
        ("parameters", parameters),
        ("began as", _text_of(student.get("model")) or ("random weights" if sizes else "")),
        *_named(sizes),
        ("adapters", "" if not adapters else f"{adapters:,.0f} parameters"),
        *[(f"lora.{name}", text) for name, text in _named(lora)],
        *_named(student, [key for key in student if key not in ("model", "config", "lora")]),
    ]


def _teacher(run: Run) -> Facts:
    teacher, identity = section(run.settings, "teacher"), section(run.identity, "teacher")
    vocabulary = number(identity, "vocab_size")
    return [
        ("model", _text_of(teacher.get("model") or identity.get("name"))),
        ("commit", _text_of(identity.get("commit"))),
        ("dtype", _text_of(identity.get("dtype"))),
        ("vocabulary", "" if vocabulary is None else f"{vocabulary:,.0f}"),
        ("quantization", _text_of(identity.get("quantization"))),
    ]


def _text(run: Run) -> Facts:
    said, made = section(run.settings, "dataset"), section(run.identity, "dataset")
    trained, held_out = run.number("train_samples"), run.number("eval_samples")
    files = said.get("data_files")
    return [
        *_named(made or said, ("name", "config_name", "split", "text_column")),
        ("files", ", ".join(map(str, files)) if isinstance(files, list) else ""),
        ("trained on", "" if trained is None else number_of(int(trained), "sample")),
        ("held out", "" if held_out is None else number_of(int(held_out), "sample")),
        *_named(section(run.identity, "sequence") or said, ("max_length", "long_documents", "append_eos")),
    ]


def _targets(run: Run) -> Facts:
    made, said = section(run.identity, "targets"), section(run.settings, "targets")
    if made:
        return [
            ("method", f"{made.get('method')} {_text_of(made.get('parameter'))}".rstrip()),
            *_named(made, ("temperature", "seed")),
        ]
    method = said.get("method")
    key = {"threshold": "threshold", "top_k": "top_k", "random": "draws"}.get(str(method))
    return _named(said, ("method", *([key] if key else []), "temperature", "seed"))


def _cache(run: Run) -> Facts:
    cache, stored = section(run.record, "cache"), number(section(run.record, "cache"), "bytes")
    if not cache:
        return [("identity", _short_id(run.cache_id)), *_named(section(run.settings, "cache"), ("path",))]
    return [
        *_named(section(run.settings, "cache"), ("path",)),
        ("identity", _short_id(run.cache_id)),
        ("complete", "yes" if cache.get("complete") else "no"),
        *[(name, _count(number(cache, name))) for name in ("samples", "positions")],
        ("size", "" if stored is None else size(stored)),
    ]


def _training(run: Run) -> Facts:
    asked = section(run.settings, "training")
    epochs, seconds = number(run.state, "epoch"), run.number("train_runtime")
    counted, positions = run.positions_seen
    until = f" up to step {counted[-1]:,}" if counted and counted[-1] < run.step else ""
    return [
        ("began", _text_of(run.record.get("started"))),
        ("steps", f"{run.step:,}"),
        ("epochs", "" if epochs is None else f"{epochs:.4g}"),
        ("positions seen", f"{positions[-1]:,.0f}{until}" if positions else ""),
        ("wall time", "" if seconds is None else duration(seconds)),
        *_named(asked, [key for key in asked if key != "output_dir"]),
    ]


def _machine(run: Run) -> Facts:
    machine = section(run.record, "machine")
    memory, cores = number(machine, "memory_bytes"), number(machine, "cores")
    found = machine.get("gpus")
    gpus = [gpu for gpu in found if isinstance(gpu, dict)] if isinstance(found, list) else []
    names = [f"{gpu.get('name')}, {size(number(gpu, 'memory_bytes') or 0)}" for gpu in gpus]
    return [
        ("GPUs", ("; ".join(names) or "none") if isinstance(found, list) else ""),
        ("processor", _text_of(machine.get("processor"))),
        ("cores", _count(cores)),
        ("memory", "" if memory is None else size(memory)),
        ("system", _text_of(machine.get("system"))),
        ("processes", _count(number(run.record, "world_size") or run.number("world_size"))),
        ("distributed type", _text_of(run.record.get("distributed_type") or run.results.get("distributed_type"))),
    ]


def _named(values: dict[str, Any], names: Sequence[str] | None = None) -> Facts:
    """Return values under their own names; what is null or not there is left out."""
    return [(name, _text_of(values.get(name))) for name in (values if names is None else names)]


def _text_of(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _short_id(value: str | None) -> str:
    return value[:SHORT_ID] if value else ""


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
