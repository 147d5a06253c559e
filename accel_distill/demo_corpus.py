"""The demo's text: Python's own documentation, as short documents.

Holds the reading of `pydoc_data/topics.py` and of the standard library's docstrings, and their grouping
into documents. The one decision: source files are parsed with `ast` and never imported, so reading them
runs nobody's code. Its cost: text that exists only after an import (C modules, generated docstrings) is missing.
"""

import ast
import json
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from accel_distill.errors import RunError

DOCUMENT_CHARACTERS = 240  # a document is closed at the paragraph that reaches this length
SMALLEST_CORPUS = 200_000  # characters; a stripped Python has none of these files
# Directories of the standard library that are tests, other people's code, or one sentence repeated.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_documents(*, seed: int = 0, library: Path | None = None) -> list[str]:
    """Return Python's documentation as documents of about `DOCUMENT_CHARACTERS`, shuffled by `seed`.

    The same Python gives the same list. A paragraph that was met before is left out, so that no paragraph
    is both in a training and in a held-out document. Raises `RunError` where the library's source is missing.
    """
    root = library or Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    documents: list[str] = []
    for texts in source_texts(root):
        paragraphs = (paragraph for text in texts for paragraph in text.split("\n\n"))
        documents.extend(group_paragraphs(fresh_paragraphs(paragraphs, seen)))
    found = sum(map(len, documents))
    if found < SMALLEST_CORPUS:
        raise RunError(
            f"found {found:,} characters of documentation in {root}, and the demo needs {SMALLEST_CORPUS:,}; "
            "run it with a Python that has its standard library as source files (.py)"
        )
    random.Random(seed).shuffle(documents)
    return documents


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write one `{"text": ...}` a line, as `dataset.name: json` reads it."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")


def source_texts(root: Path) -> Iterator[list[str]]:
    """Yield the texts that belong together: each topic of `pydoc`, then the docstrings of each file."""
    for path in source_files(root):
        tree = parse_source(path)
        if tree is None:
            continue
        if path == root / "pydoc_data" / "topics.py":
            yield from ([text] for text in topic_texts(tree))
        else:
            yield list(docstrings(tree))


def source_files(root: Path) -> Iterator[Path]:
    """Yield the library's files in order, without walking into `SKIPPED_DIRECTORIES`."""
    for folder, directories, names in os.walk(root):
        directories[:] = sorted(set(directories) - SKIPPED_DIRECTORIES)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def parse_source(path: Path) -> ast.Module | None:
    """Parse a file; None for the few of the library that are templates or broken on purpose."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def topic_texts(tree: ast.Module) -> list[str]:
    """Read the values of the one literal `topics = {name: text, ...}`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    return []


def docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, in the order of the source."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, DOCUMENTED):
            yield from docstrings(child)


def fresh_paragraphs(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs that are neither blank nor in `seen`, and add them to it."""
    for paragraph in paragraphs:
        text = paragraph.strip("\n").rstrip()
        if text.strip() and text not in seen:
            seen.add(text)
            yield text


def group_paragraphs(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join consecutive paragraphs into documents of at least `DOCUMENT_CHARACTERS`; the last may be shorter."""
    group: list[str] = []
    length = 0
    for paragraph in paragraphs:
        group.append(paragraph)
        length += len(paragraph)
        if length >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(group)
            group, length = [], 0
    if group:
        yield "\n\n".join(group)
