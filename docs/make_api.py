"""Make docs/api.md from the docstrings of the public names: `python docs/make_api.py`.

The one decision: signatures and docstrings are read from the source with `ast`, so that the page is the same whatever
Python made it, and nothing is imported. A test makes the page again and compares.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"

# What users of the package call, by what they want to do: file and names.
PUBLIC: dict[str, list[tuple[str, list[str]]]] = {
    "Runs": [
        ("config", ["load_config"]),
        ("estimate", ["estimate"]),
        ("generate", ["generate"]),
        ("train", ["train"]),
    ],
    "A cache": [
        ("cache", ["TeacherCache", "CachedSample"]),
        ("targets", ["SparseTargets"]),
        ("inspect_cache", ["inspect_cache"]),
        ("verify", ["verify_cache"]),
        ("audit", ["audit"]),
    ],
    "Training in a program of your own": [
        ("collator", ["CachedLogitCollator"]),
        ("losses", ["Objective"]),
        ("trainer", ["DistillationTrainer", "peak_memory"]),
    ],
    "Targets of logits": [
        ("targets", ["read_logits", "Chunk", "sample", "threshold_targets", "random_targets", "top_k_targets"]),
    ],
    "Divergences": [
        ("losses", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd", "alpha_beta", "cross_entropy"]),
    ],
    "Errors": [
        (
            "errors",
            ["RunError", "ConfigError", "DoesNotFit", "DiskGuard", "CacheMismatch", "DamagedCache", "RankStopped"]
            + ["NotFinite", "Stopped"],
        ),
    ],
}
TOP_LEVEL = {"TeacherCache", "CachedLogitCollator", "DistillationTrainer"}  # of `accel_distill` itself
OVERRIDES = {"DistillationTrainer"}  # whose methods are those of the class that it inherits from

HEAD = """# The API

Made from the docstrings by `python docs/make_api.py`; a test makes it again and compares. `from accel_distill import
TeacherCache, CachedLogitCollator, DistillationTrainer` works, and imports torch only then; all else is imported from
its module. What is not on this page may change at any time. [tutorial.py](tutorial.py) uses most of it.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for title, files in PUBLIC.items():
        parts.append(f"## {title}\n")
        for file, names in files:
            source = (ROOT / "accel_distill" / f"{file}.py").read_text(encoding="utf-8")
            nodes = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
            found = {node.name: node for node in nodes}
            parts += [_entry(file, found[name], source.splitlines()) for name in names]
    return "\n".join(parts)


def _entry(file: str, node: ast.FunctionDef | ast.ClassDef, source: list[str]) -> str:
    home = "accel_distill" if node.name in TOP_LEVEL else f"accel_distill.{file}"
    lines = [f"### `{home}.{node.name}`\n"]
    if isinstance(node, ast.FunctionDef):
        return "\n".join([*lines, _code(_signature(node)), _text(node)])
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [source[item.lineno - 1].strip() for item in node.body if isinstance(item, ast.AnnAssign)]
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    lines += [_code("\n    ".join([head + (":" if fields else ""), *fields])), _text(node)]
    for method in _methods(node):
        shown = "property" if any(ast.unparse(mark).endswith("property") for mark in method.decorator_list) else ""
        name = f"{method.name}: {ast.unparse(method.returns)}" if shown and method.returns else _signature(method)
        lines.append(f"- `{name}`  \n{_text(method, indent='  ')}")
    return "\n".join(lines)


def _methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Yield what has a docstring and is not private; of a class of overrides, how it is made."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and ast.get_docstring(item):
            special = item.name in ("__init__", "__call__")
            if special or (not item.name.startswith("_") and node.name not in OVERRIDES):
                yield item


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}".replace("(self, ", "(").replace("(self)", "()")


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _text(node: ast.FunctionDef | ast.ClassDef, *, indent: str = "") -> str:
    lines = (ast.get_docstring(node) or "").splitlines()
    return "".join(f"{indent}{line}".rstrip() + "\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
