"""Nothing that the package reads is unpickled: a file of a stranger cannot run code."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted([*(ROOT / "accel_distill").glob("*.py"), *(ROOT / "bench").glob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Return the dotted name and the call of everything that is called."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(word.value) for word in call.keywords if word.arg == name), None)


def faults(source: str) -> list[str]:
    """Return what of a source could unpickle a file, or evaluate text."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    for name, call in calls(tree):
        if name == "torch.load" and keyword(call, "weights_only") is not True:
            found.append(name)
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_of_the_package_can_unpickle_or_evaluate(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "np.load('x', allow_pickle=True)",
        "np.savez('x', allow_pickle=True)",
        "eval('1')",
        "yaml.load('x', Loader=None)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert faults(source)
    assert not faults("torch.load('x', weights_only=True)\nlist(map(int, [1]))")
