"""The YAML of run files, and overrides: what a word means, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from accel_distill.errors import ConfigError
from accel_distill.run_file import (
    LARGEST_FILE,
    apply_overrides,
    describe,
    parse_override,
    parse_yaml,
    read_run_file,
    to_yaml,
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3e-4", 0.0003),  # text for PyYAML, which follows YAML 1.1
        ("1E5", 100_000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("3", 3),
        ("-12", -12),
        ("10_000", 10_000),
        ("true", True),
        ("null", None),
        ("~", None),
        ("no", "no"),  # False for PyYAML; a value of eval_strategy here
        ("yes", "yes"),
        ("1:30", "1:30"),  # 90 for PyYAML
        ("010", "010"),  # 8 for PyYAML
        ("2024-01-01", "2024-01-01"),  # a date for PyYAML
        ("0x1F", "0x1F"),
        ("12e45678", "12e45678"),  # a commit, not infinity
        ("'3'", "3"),
        ('"3"', "3"),
        ("1" * 5000, "1" * 5000),  # more digits than Python converts
    ],
)
def test_a_scalar_means_the_same_in_a_file_and_in_an_override(written: str, value: Any) -> None:
    in_file = parse_yaml(f"key: {written}", source="run.yaml")["key"]
    in_override = parse_override(f"section.key={written}").value
    assert [in_file, in_override] == [value, value]
    assert type(in_file) is type(in_override) is type(value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("a: &x 1", "line 1: anchors and aliases (x) are not allowed"),
        ("a: 1\nb: *x", "line 2: anchors and aliases (x) are not allowed"),
        ("a: !!str 3", "tags (tag:yaml.org,2002:str) are not allowed"),
        ("!!python/object/apply:os.system ['true']", "tags"),
        ("1: 2", "the key 1 is not text"),
        ("[a]: 2", "the key (sequence) is not text"),
        ("a: " + "[" * 500, "levels of nesting"),
        ("{a: " * 500, "levels of nesting"),
        ("a: [1, 2", "expected ',' or ']'"),
        ("a: 'x", "quoted scalar"),
        ("a: 1\n---\nb: 2", "single document"),
        ("\ta: 1", r"'\t'"),
        ("a: \x07", "not YAML"),
    ],
)
def test_what_could_mean_something_else_is_refused_with_its_line(text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, source="run.yaml")
    assert str(caught.value).startswith("run.yaml")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"# nothing but a comment\n", "is empty"),
        (b"- 1\n", "found [1] (list)"),
        (b"just words", "found 'just words' (text)"),
        (b"a: \xff\xfe", "byte 3 is not UTF-8"),
        (b"#" * (LARGEST_FILE + 1), "larger than 100,000 bytes"),
    ],
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_run_file(path)
    assert str(caught.value).startswith(str(path))
    assert word in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_run_file(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_run_file(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfteacher: {model: x}\n")
    assert read_run_file(path) == {"teacher": {"model": "x"}}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("a.b=x: y # z", ("a", "b"), "x: y # z"),  # a plain scalar to its last character
        ("a.b=*.jsonl", ("a", "b"), "*.jsonl"),
        ("a.b=c=d", ("a", "b"), "c=d"),
        ("a.b= 5 ", ("a", "b"), 5),
        ("a.b.c=null", ("a", "b", "c"), None),
        ("a.b=[x, 2]", ("a", "b"), ["x", 2]),
        ("a.b={c: 3e-4}", ("a", "b"), {"c": 0.0003}),
        ("a.b=''", ("a", "b"), ""),
    ],
)
def test_an_override_is_a_dotted_key_and_a_scalar_or_a_bracket(text: str, key: tuple[str, ...], value: Any) -> None:
    override = parse_override(text)
    assert (override.key, override.value, override.text) == (key, value, text)


@pytest.mark.parametrize("text", ["run.yaml", "a=3", "=3", ".b=3", "a.=3", "a..b=3", "a.b=", "a.b=[1", "a.b='x' y"])
def test_what_is_no_override_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(text)
    assert repr(text) in str(caught.value)


def test_overrides_reach_into_nested_mappings_make_missing_ones_and_the_last_wins() -> None:
    values = {"student": {"config": {"model_type": "llama", "hidden_size": 32}}, "loss": None}
    texts = ["student.config.hidden_size=64", "loss.ce_weight=1", "targets.seed=1", "targets.seed=2"]
    replaced = apply_overrides(values, [parse_override(text) for text in texts])
    assert replaced == {
        "student": {"config": {"model_type": "llama", "hidden_size": 64}},
        "loss": {"ce_weight": 1},
        "targets": {"seed": 2},
    }
    assert values["student"] == {"config": {"model_type": "llama", "hidden_size": 32}}  # untouched


def test_an_override_below_a_value_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'training.seed=1': 3 \(whole number\) stands where it needs a mapping"):
        apply_overrides({"training": 3}, [parse_override("training.seed=1")])


def test_what_is_written_is_read_back_the_same() -> None:
    values = {"a": ["no", "3e-4", "010", "1:30", "2024-01-01", "12e45678", "null", "~", "", "true", "<<", "é: #"]}
    values |= {"b": [3e-4, 1e-05, 1e20, 0.1, 3, 10**15, True, None, {}, []]}  # type: ignore[dict-item]
    assert parse_yaml(to_yaml(values), source="again") == values


def test_a_long_value_is_shown_short() -> None:
    assert describe("x" * 1000).startswith("'xxx")
    assert len(describe("x" * 1000)) < 80
    assert [describe(None), describe(True), describe(1.5)] == ["null", "true", "1.5 (number)"]
