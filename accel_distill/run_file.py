"""A run file as a plain mapping: strict YAML, and `section.key=value` overrides on top of it.

The one decision: scalars follow YAML 1.2, not PyYAML's 1.1. So `3e-4` is a float, and `no`, `1:30` and
`2024-01-01` are text. One word means one thing: a duplicate key, an anchor, an alias or a tag is refused.
Cost: a loader of our own, 60 lines over `yaml.SafeLoader`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from accel_distill.errors import ConfigError

LARGEST_FILE = 100_000  # bytes: of the densest YAML it takes a second to read as many
DEEPEST_NESTING = 20  # levels
TEXT = "tag:yaml.org,2002:str"

# At most 40 digits, and exponents of at most 3: beyond that it is more likely a commit than a number.
WHOLE = r"(?:0|[1-9][0-9_]{0,39})"
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"[-+]?{WHOLE}", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:{WHOLE}\.[0-9]*|\.[0-9]+|{WHOLE}(?=[eE]))(?:[eE][-+]?[0-9]{{1,3}})?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


@dataclass(frozen=True)
class Override:
    """One `section.key=value` of the command line; `text` is how it was written."""

    key: tuple[str, ...]
    value: Any
    text: str


class RunFileLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars, and without what makes a file mean something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse anchors, aliases, tags and deep nesting before the node is built."""
        event: Any = self.peek_event()
        if event.anchor is not None:
            raise _problem(f"anchors and aliases ({event.anchor:.60}) are not allowed: quote it", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _problem(f"tags ({event.tag:.60}) are not allowed: quote it", event.start_mark)
        if self.depth == DEEPEST_NESTING:
            raise _problem(f"more than {DEEPEST_NESTING} levels of nesting", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys, of which YAML would silently keep the last, and keys that are no text."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != TEXT:
                word = key.value if isinstance(key, yaml.ScalarNode) else f"({key.id})"
                raise _problem(f"the key {word:.80} is not text: quote it", key.start_mark)
            if key.value in seen:
                raise _problem(f"the key {key.value!r:.80} is there twice: delete one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class RunFileDumper(yaml.SafeDumper):
    """Quotes text that `RunFileLoader` or another YAML reader would take for something else."""


for _name, (_pattern, _first) in SCALARS.items():
    for _class in (RunFileLoader, RunFileDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first)


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the mapping that a run file holds. Raises `ConfigError` for whatever else it holds."""
    values = parse_yaml(_read_text(path), source=str(path))
    if values is None:
        raise ConfigError(f"{path}: is empty; expected sections such as `teacher:` and `dataset:`")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {describe(values)}; expected sections such as `teacher:` and `dataset:`")
    return values


def parse_yaml(text: str, *, source: str) -> Any:
    """Return the value of one YAML document. Raises `ConfigError` that names `source` and the line."""
    try:
        loader = RunFileLoader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}{line}: {problem}") from error
    except yaml.YAMLError as error:  # a control character
        raise ConfigError(f"{source}: is not YAML: {' '.join(str(error).split())}") from error


def parse_override(text: str) -> Override:
    """Return `section.key=value` with its value read as a YAML scalar (or a list or mapping in brackets)."""
    name, separator, written = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not separator or len(key) < 2 or not all(key):
        raise ConfigError(f"argument {text!r}: expected section.key=value, such as dataset.max_samples=2000")
    written = written.strip()
    if not written:
        raise ConfigError(f"override {text!r}: no value after '='; write null to unset the key, or '\"\"'")
    return Override(key=key, value=_read_value(written, source=f"override {text!r}"), text=text)


def apply_overrides(values: dict[str, Any], overrides: list[Override]) -> dict[str, Any]:
    """Return a copy of `values` with each override in its place; a later one wins."""
    for override in overrides:
        values = _replaced(values, override.key, override)
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return YAML that `read_run_file` reads back as equal values."""
    return yaml.dump(dict(values), Dumper=RunFileDumper, sort_keys=False, allow_unicode=True)


def describe(value: Any) -> str:
    """Return a value as YAML would write it, cut to one short line, with its kind: `'3' (text)`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {int: "whole number", float: "number", str: "text", dict: "mapping", list: "list"}
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({kinds[type(value)]})"


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            raise ConfigError(f"{path}: no such file; `accel-distill init > run.yaml` writes one to start from")
        if not path.is_file():
            raise ConfigError(f"{path}: is not a regular file; expected a YAML run file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path}: is larger than {LARGEST_FILE:,} bytes; expected a YAML run file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected a YAML run file") from error


def _read_value(written: str, *, source: str) -> Any:
    """Read text in quotes or brackets as YAML, anything else as one plain scalar to its last character."""
    if written[0] in "'\"[{":
        return parse_yaml(written, source=source)
    loader = RunFileLoader("")
    tag = loader.resolve(yaml.ScalarNode, written, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, written))


def _replaced(values: Any, key: tuple[str, ...], override: Override) -> dict[str, Any]:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"override {override.text!r}: {describe(values)} stands where it needs a mapping")
    value = override.value if len(key) == 1 else _replaced(values.get(key[0]), key[1:], override)
    return {**values, key[0]: value}


def _problem(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
