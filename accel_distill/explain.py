"""A value that a model refuses, as one sentence: where it stands, what was found, what is expected.

The one decision: only the first mistake is told, unknown keys before anything else, because the rest often
follows from it (`modle: x` is an unknown key and a missing `model`). Cost: two mistakes take two runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from accel_distill.run_file import Override, describe

LONGEST_WORD = 64  # characters for which a near word is looked for
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "is_instance_of": "a path",
    "list_type": "text or a list of texts",
    "model_type": "a mapping",
    "string_type": "text",
    "string_too_short": "at least one character",
    "too_short": "at least one item",
}
BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}


class WrongValue(ValueError):
    """A value that its type alone cannot judge; raised inside a validator with the dotted key below it, "" for none."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


def first_mistake(
    error: ValidationError,
    *,
    source: str,
    overrides: Sequence[Override],
    sections: Mapping[str, Iterable[str]],
) -> str:
    """Return the sentence for one validation error; `sections` maps each section to its valid keys."""
    mistakes = sorted(error.errors(include_url=False), key=lambda mistake: mistake["type"] != "extra_forbidden")
    mistake = mistakes[0]
    key, problem = _key(mistake), _problem(mistake, sections)
    place = f"{source}: {'.'.join(key)}"
    for override in overrides:  # the last one that sets the key, or something in it, is what was judged
        shared = min(len(key), len(override.key))
        if key[:shared] == override.key[:shared]:
            place = f"override {override.text!r}"
    return f"{place}: {problem}"


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the valid word nearest to `word`, or an empty text."""
    near = get_close_matches(word, list(valid), n=1) if len(word) <= LONGEST_WORD else []
    return f"did you mean {near[0]!r}?" if near else ""


def mismatch(value: Any, expected: str) -> str:
    """Return what was found and what was expected, with the hint that the pair suggests."""
    hint = ""
    if expected == "text" and isinstance(value, (int, float)):
        hint = " (write it in quotes)"
    elif "number" in expected and isinstance(value, str) and value.strip("+-").replace("_", "").isdigit():
        hint = " (write it without quotes)"
    elif "whole" in expected and isinstance(value, float) and value.is_integer():
        hint = f" (write {int(value)})"
    return f"found {describe(value)}, expected {expected}{hint}"


def _key(mistake: ErrorDetails) -> tuple[str, ...]:
    below = _cause(mistake)
    return (*map(str, mistake["loc"]), *(below.key.split(".") if below and below.key else ()))


def _cause(mistake: ErrorDetails) -> WrongValue | None:
    cause = mistake.get("ctx", {}).get("error")
    return cause if isinstance(cause, WrongValue) else None


def _problem(mistake: ErrorDetails, sections: Mapping[str, Iterable[str]]) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    cause = _cause(mistake)
    if cause is not None:
        return cause.problem
    if kind == "extra_forbidden":
        return _unknown(mistake["loc"], sections)
    if kind == "missing":
        return "is missing; every run file needs it"
    if kind == "literal_error":
        return mismatch(mistake["input"], context["expected"])
    bound = next((BOUNDS[name].format(limit) for name, limit in context.items() if name in BOUNDS), None)
    return mismatch(mistake["input"], bound or EXPECTED.get(kind) or mistake["msg"])


def _unknown(place: tuple[int | str, ...], sections: Mapping[str, Iterable[str]]) -> str:
    word, home = str(place[-1]), ".".join(map(str, place[:-1]))
    homes = [f"{section}.{word}" for section, keys in sections.items() if word in keys]
    if homes:
        return f"unknown key; did you mean {' or '.join(homes)}?"
    valid = sorted(sections[home] if home else (name for name in sections if "." not in name))
    return f"unknown key; {did_you_mean(word, valid) or 'expected one of ' + ', '.join(valid)}"
