"""Section `training`, against the fields of the installed `TrainingArguments`."""

import ast
import dataclasses
from typing import Any

import pytest

from accel_distill import training_arguments
from accel_distill.explain import WrongValue
from accel_distill.training_arguments import (
    ALLOWED,
    AT_LEAST,
    INTEGRATIONS,
    MORE_THAN,
    _fields,
    _members,
    _transformers,
    check_training,
    default_report_to,
    is_packed,
    library_arguments,
    sharded_by,
)


def test_the_names_read_from_the_source_are_the_fields_of_the_class() -> None:
    from transformers import TrainingArguments

    source = (_transformers() / "training_args.py").read_text(encoding="utf-8")
    names = _fields(ast.parse(source), "TrainingArguments")
    assert set(names) == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(set(ALLOWED) - set(names)) == 1  # one of two names of the same field
    assert {*AT_LEAST, *MORE_THAN} <= set(names)


def test_the_integrations_are_those_of_transformers() -> None:
    source = (_transformers() / "integrations" / "integration_utils.py").read_text(encoding="utf-8")
    tables = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"
    ]
    assert [{ast.literal_eval(key) for key in table.keys} for table in tables] == [set(INTEGRATIONS)]


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
        {"report_to": ["none"], "deepspeed": "configs/deepspeed/zero2.json", "eval_steps": None},
        {"remove_unused_columns": False, "average_tokens_across_devices": True, "label_names": ["labels"]},
        {"label_smoothing_factor": 0.0, "label_names": None},
        {"learning_rate": 0, "weight_decay": 0.0, "max_grad_norm": 0, "warmup_steps": 0, "seed": 0},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0},
        {"num_train_epochs": 0.01, "logging_steps": 0.1, "save_total_limit": None, "report_to": "all"},
        {"report_to": []},
        {"packing": True},
        {"packing": False, "train_sampling_strategy": "group_by_length"},
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
        ("per_device_train_batch_size", 0, "found 0 (whole number), expected at least 1"),
        ("per_device_eval_batch_size", -1, "expected at least 1"),
        ("gradient_accumulation_steps", 0, "expected at least 1"),
        ("save_total_limit", 0, "expected at least 1"),
        ("learning_rate", -1e-3, "expected at least 0"),
        ("learning_rate", float("nan"), "expected at least 0"),
        ("weight_decay", -0.1, "expected at least 0"),
        ("max_grad_norm", -1, "expected at least 0"),
        ("warmup_steps", -5, "expected at least 0"),
        ("dataloader_num_workers", -1, "expected at least 0"),
        ("seed", -1, "expected at least 0"),
        ("num_train_epochs", 0, "found 0 (whole number), expected more than 0"),
        ("logging_steps", 0, "expected more than 0"),
        ("save_steps", -1, "expected more than 0"),
        ("eval_steps", 0, "expected more than 0"),
        ("packing", 1, "found 1 (whole number), expected true or false"),
        ("packing", "true", "found 'true' (text), expected true or false"),
        ("packing", None, "found null, expected true or false"),
        ("packin", True, "unknown key; did you mean 'packing'?"),
        ("auto_find_batch_size", True, "the samples of a step follow from the batch size"),
        ("train_sampling_strategy", "batch_rebalance", "expected random or sequential or group_by_length, or no"),
        ("report_to", "tensorbord", "found 'tensorbord' (text); did you mean 'tensorboard'?"),
        ("report_to", ["non"], "did you mean 'none'?"),
        ("report_to", "qqq", "expected none or all alone, or some of azure_ml, clearml"),
        ("report_to", ["none", "kubeflow"], "expected none or all alone"),
        ("report_to", [3], "found 3 (whole number), expected none, all, or the names"),
        ("report_to", None, "found null, expected none, all, or the names"),
    ],
)
def test_what_training_cannot_use_is_refused_by_name(name: str, value: Any, words: str) -> None:
    with pytest.raises(WrongValue) as caught:
        check_training({"seed": 1, name: value})
    assert caught.value.key == name
    assert words in caught.value.problem


@pytest.mark.parametrize("name", sorted(set(INTEGRATIONS) - {"kubeflow"}))
def test_an_integration_is_refused_just_where_its_library_is_not_installed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, modules = INTEGRATIONS[name]
    installed = {"transformers"}
    real = training_arguments.find_spec
    monkeypatch.setattr(
        training_arguments, "find_spec", lambda module: real("transformers") if module in installed else None
    )
    with pytest.raises(WrongValue) as caught:
        check_training({"report_to": ["kubeflow", name]})
    assert caught.value.problem == f"{name} is not installed: pip install {package}, or take report_to=none"
    installed.add(modules[-1])
    check_training({"report_to": name})


@pytest.mark.parametrize(
    ("installed", "expected"), [((), "none"), (("tensorboard",), "tensorboard"), (("tensorboardX",), "tensorboard")]
)
def test_the_log_goes_to_tensorboard_where_that_is_installed(
    installed: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_arguments, "find_spec", lambda module: module if module in installed else None)
    assert default_report_to() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"deepspeed": None, "fsdp": ""}, None),
        ({"fsdp": [], "fsdp_config": {"version": 2}}, None),
        ({"deepspeed": "configs/deepspeed/zero2.json"}, "deepspeed"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed"),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp"),
        ({"fsdp": True}, "fsdp"),
    ],
)
def test_section_training_tells_who_shards_the_student(values: dict[str, Any], expected: str | None) -> None:
    assert sharded_by(values) == expected


def test_packing_and_grouping_by_length_are_one_or_the_other() -> None:
    with pytest.raises(WrongValue, match="train_sampling_strategy is group_by_length; expected one of the two"):
        check_training({"train_sampling_strategy": "group_by_length", "packing": True})


def test_our_own_key_does_not_reach_the_library() -> None:
    assert library_arguments({"packing": True, "seed": 1}) == {"seed": 1}
    assert is_packed({"packing": True}) and not is_packed({"packing": False}) and not is_packed({})
