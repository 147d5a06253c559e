"""Section `training`, against the fields of the installed `TrainingArguments`."""

import ast
import dataclasses
from typing import Any

import pytest

from accel_distill.explain import WrongValue
from accel_distill.training_arguments import ALLOWED, _fields, _members, _transformers, check_training


def test_the_names_read_from_the_source_are_the_fields_of_the_class() -> None:
    from transformers import TrainingArguments

    source = (_transformers() / "training_args.py").read_text(encoding="utf-8")
    names = _fields(ast.parse(source), "TrainingArguments")
    assert set(names) == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(set(ALLOWED) - set(names)) == 1  # one of two names of the same field


@pytest.mark.parametrize(
    ("annotation", "members"),
    [
        ("bool", ["bool"]),
        ("str | list[str] | None", ["str", "list", "None"]),
        ("Optional[float]", ["float", "None"]),
        ("Union[SchedulerType, str]", ["SchedulerType", "str"]),
        ("'dict[str, int] | None'", ["dict", "None"]),
    ],
)
def test_an_annotation_is_split_into_its_members(annotation: str, members: list[str]) -> None:
    assert list(_members(ast.parse(annotation, mode="eval").body)) == members


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"learning_rate": 3e-4, "num_train_epochs": 3, "max_steps": -1, "bf16": True, "output_dir": "runs/a"},
        {"lr_scheduler_type": "cosine", "eval_strategy": "no", "optim": "adafactor", "save_strategy": "best"},
        {"report_to": "none", "deepspeed": {"zero_optimization": {"stage": 2}}, "warmup_steps": 0.05},
        {"report_to": ["wandb"], "deepspeed": "configs/deepspeed/zero2.json", "eval_steps": None},
        {"remove_unused_columns": False, "average_tokens_across_devices": True, "label_names": ["labels"]},
        {"label_smoothing_factor": 0.0, "label_names": None},
    ],
)
def test_what_training_can_use_passes(values: dict[str, Any]) -> None:
    check_training(values)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rat", 1e-3, "unknown key; did you mean 'learning_rate'?"),
        ("warmup_ratio", 0.1, "unknown key; did you mean 'warmup_steps'?"),
        ("qqqqqq", 1, "unknown key; see the fields of transformers.TrainingArguments"),
        ("learning_rate", "3e-4", "found '3e-4' (text), expected a number"),
        ("learning_rate", True, "found true, expected a number"),
        ("learning_rate", None, "found null, expected a number"),
        ("max_steps", 1.5, "found 1.5 (number), expected a whole number"),
        ("bf16", 1, "found 1 (whole number), expected true or false"),
        ("output_dir", 3, "found 3 (whole number), expected text"),
        ("deepspeed", 3, "found 3 (whole number), expected a mapping or text"),
        ("lr_scheduler_type", "cosin", "found 'cosin' (text); did you mean 'cosine'?"),
        ("eval_strategy", False, "found false; expected one of no, steps, epoch"),
        ("remove_unused_columns", True, "expected false, or no such key: the targets"),
        ("average_tokens_across_devices", False, "expected true, or no such key: the loss"),
        ("label_names", ["x"], "expected ['labels'], or no such key"),
        ("label_smoothing_factor", 0.1, "expected 0, or no such key"),
    ],
)
def test_what_training_cannot_use_is_refused_by_name(name: str, value: Any, words: str) -> None:
    with pytest.raises(WrongValue) as caught:
        check_training({"seed": 1, name: value})
    assert caught.value.key == name
    assert words in caught.value.problem
