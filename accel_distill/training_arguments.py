"""What section `training` may hold: the fields of `transformers.TrainingArguments`.

The one decision: the fields are read from the source of the installed transformers with `ast`, so that a
misspelt name is found in milliseconds and without importing torch. Cost: types are checked where the
annotation is made of plain types and of transformers' enums; the rest is left to `TrainingArguments`.
"""

import ast
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accel_distill.errors import ConfigError
from accel_distill.explain import WrongValue, did_you_mean, mismatch
from accel_distill.run_file import describe

PLAIN_TYPES = {"bool": bool, "dict": dict, "float": float, "int": int, "list": list, "str": str}
WORDS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "str": "text",
}

PACKING = "packing"  # our own key; all others are those of TrainingArguments
BY_LENGTH = "group_by_length"

# What the trainer sets itself, or cannot honour: the values that are allowed, and why no other is.
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False,), "the targets are columns that the model's forward does not know"),
    "average_tokens_across_devices": ((True,), "the loss is a mean over the tokens of all processes"),
    "label_names": ((["labels"],), "the collator names the labels"),
    "label_smoothing_factor": ((0,), "the loss is what section `loss` says"),
    "train_sampling_strategy": (("random", "sequential", BY_LENGTH), "another needs a dataset that is no cache"),
    "auto_find_batch_size": ((False,), "the samples of a step follow from the batch size, and checkpoints name them"),
    # in early versions of transformers 5
    BY_LENGTH: ((False,), f"it is train_sampling_strategy: {BY_LENGTH}"),
}

# What `TrainingArguments` takes and training then stumbles over, or quietly does nothing with.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
MORE_THAN = {"eval_steps": 0, "logging_steps": 0, "num_train_epochs": 0, "save_steps": 0}

# The integrations of `report_to`: the package to install, and the modules of which one has to be there.
INTEGRATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "azure_ml": ("azureml-core", ("azureml",)),
    "clearml": ("clearml", ("clearml",)),
    "codecarbon": ("codecarbon", ("codecarbon",)),
    "comet_ml": ("comet-ml", ("comet_ml",)),
    "dagshub": ("dagshub", ("dagshub",)),
    "dvclive": ("dvclive", ("dvclive",)),
    "flyte": ("flytekit", ("flytekit",)),
    "kubeflow": ("", ()),  # an address in the environment, no library
    "mlflow": ("mlflow", ("mlflow",)),
    "neptune": ("neptune", ("neptune",)),
    "swanlab": ("swanlab", ("swanlab",)),
    "tensorboard": ("tensorboard", ("tensorboard", "tensorboardX")),
    "trackio": ("trackio", ("trackio",)),
    "wandb": ("wandb", ("wandb",)),
}


def check_training(values: Mapping[str, Any]) -> None:
    """Raise `WrongValue` for a name, type or value that training could not use."""
    home = _transformers()
    tree = ast.parse((home / "training_args.py").read_text(encoding="utf-8"))
    other = ast.parse((home / "trainer_utils.py").read_text(encoding="utf-8"))
    annotations, enums = _fields(tree, "TrainingArguments"), {**_enums(tree), **_enums(other)}
    for name, value in values.items():
        if name == PACKING:
            _check_packing(values)
            continue
        if name not in annotations:
            near = did_you_mean(name, {*annotations, PACKING}) or "see the fields of transformers.TrainingArguments"
            raise WrongValue(name, f"unknown key; {near}")
        if name == "resume_from_checkpoint" and isinstance(value, bool):
            continue  # ours: the last checkpoint of output_dir, or none
        _check_type(name, value, annotation=annotations[name], enums=enums)
        allowed, reason = ALLOWED.get(name, ((value,), ""))
        if value is not None and value not in allowed:
            written = " or ".join(str(choice).lower() for choice in allowed)
            raise WrongValue(name, f"{mismatch(value, written)}, or no such key: {reason}")
        _check_bounds(name, value)
    if "report_to" in values:
        _check_report_to(values["report_to"])


def is_packed(values: Mapping[str, Any]) -> bool:
    """Return whether section `training` asks for packed rows."""
    return bool(values.get(PACKING))


def is_grouped(values: Mapping[str, Any]) -> bool:
    """Return whether section `training` asks for steps of samples of about equal length."""
    return values.get("train_sampling_strategy") == BY_LENGTH


def library_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return section `training` without the keys that are not those of TrainingArguments."""
    return {name: value for name, value in values.items() if name != PACKING}


def sharded_by(values: Mapping[str, Any]) -> str | None:
    """Return which of `deepspeed` and `fsdp` section `training` asks for, if any."""
    return next((name for name in ("deepspeed", "fsdp") if values.get(name)), None)


def default_report_to() -> str:
    """Return where the log goes when the run file does not say: TensorBoard where that is installed."""
    return "tensorboard" if _is_installed("tensorboard") else "none"


def _is_installed(integration: str) -> bool:
    _, modules = INTEGRATIONS[integration]
    return not modules or any(find_spec(module) for module in modules)


def _transformers() -> Path:
    """Return the directory of the installed transformers, which is not imported."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("transformers is not installed: pip install 'transformers>=5.0'")
    return Path(spec.submodule_search_locations[0])


def _fields(tree: ast.Module, name: str) -> dict[str, ast.expr]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = (item for item in node.body if isinstance(item, ast.AnnAssign))
            return {item.target.id: item.annotation for item in fields if isinstance(item.target, ast.Name)}
    raise ConfigError(f"the installed transformers has no {name}: pip install 'transformers>=5.0'")


def _enums(tree: ast.Module) -> dict[str, list[str]]:
    """Return the values of each `ExplicitEnum` of a module."""
    enums = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "ExplicitEnum" for base in node.bases):
            values = (item.value for item in node.body if isinstance(item, ast.Assign))
            enums[node.name] = [str(value.value) for value in values if isinstance(value, ast.Constant)]
    return enums


def _check_type(name: str, value: Any, *, annotation: ast.expr, enums: Mapping[str, list[str]]) -> None:
    members = set(_members(annotation))
    choices = [choice for member in sorted(members) for choice in enums.get(member, [])]
    if value is None and "None" in members:
        return
    if choices:
        if value not in choices:
            near = isinstance(value, str) and did_you_mean(value, choices)
            raise WrongValue(name, f"found {describe(value)}; {near or 'expected one of ' + ', '.join(choices)}")
    elif members <= {*PLAIN_TYPES, "None"}:
        kinds = [kind for kind in PLAIN_TYPES if kind in members]
        if not any(_is_a(value, PLAIN_TYPES[kind]) for kind in kinds):
            raise WrongValue(name, mismatch(value, " or ".join(WORDS[kind] for kind in kinds)))


def _check_bounds(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)):
        return
    if name in AT_LEAST and not value >= AT_LEAST[name]:  # so written, nan is refused
        raise WrongValue(name, mismatch(value, f"at least {AT_LEAST[name]}"))
    if name in MORE_THAN and not value > MORE_THAN[name]:
        raise WrongValue(name, mismatch(value, f"more than {MORE_THAN[name]}"))


def _check_packing(values: Mapping[str, Any]) -> None:
    if not isinstance(values[PACKING], bool):
        raise WrongValue(PACKING, mismatch(values[PACKING], WORDS["bool"]))
    if values[PACKING] and is_grouped(values):
        raise WrongValue(PACKING, f"is true, and train_sampling_strategy is {BY_LENGTH}; expected one of the two")


def _check_report_to(value: Any) -> None:
    """Refuse an integration that transformers does not know, or whose library is not installed."""
    wanted = value if isinstance(value, list) else [value]
    if wanted in (["none"], ["all"]):
        return
    for name in wanted:
        if not isinstance(name, str):
            raise WrongValue("report_to", mismatch(name, "none, all, or the names of integrations"))
        if name not in INTEGRATIONS:
            near = did_you_mean(name, [*INTEGRATIONS, "none", "all"] if len(wanted) == 1 else INTEGRATIONS)
            expected = f"expected none or all alone, or some of {', '.join(INTEGRATIONS)}"
            raise WrongValue("report_to", f"found {describe(name)}; {near or expected}")
        package, _ = INTEGRATIONS[name]
        if not _is_installed(name):
            raise WrongValue("report_to", f"{name} is not installed: pip install {package}, or take report_to=none")


def _members(annotation: ast.expr) -> Iterator[str]:
    """Yield the names in a union: `str | list[X] | None` gives str, list, None."""
    if isinstance(annotation, ast.BinOp):
        yield from _members(annotation.left)
        yield from _members(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "Union"):
        inner = annotation.slice
        for item in inner.elts if isinstance(inner, ast.Tuple) else (inner, ast.Constant(None)):
            yield from _members(item)
    elif isinstance(annotation, ast.Subscript):
        yield ast.unparse(annotation.value)
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _members(ast.parse(annotation.value, mode="eval").body)
    else:
        yield ast.unparse(annotation)


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
