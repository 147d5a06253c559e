"""`docs/reliability.md` names tests that exist, and names every file of this directory."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
TABLE = (TESTS.parent / "docs" / "reliability.md").read_text()
ROWS = [line for line in TABLE.splitlines() if line.startswith("|") and not re.match(r"\| (fault|---)", line)]
TEST_NAME = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def names_of(path: Path) -> set[str]:
    """Return the names of the test functions of a file."""
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return {function.name for function in functions if function.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:60])
def test_a_row_has_a_fault_a_promise_and_tests_that_exist(row: str) -> None:
    _, fault, promise, named, end = (cell.strip() for cell in row.split("|"))
    assert fault and promise and end == ""
    assert TEST_NAME.sub("", named).strip() == "", "a test is written `path/test_file.py::test_name`"
    tests = TEST_NAME.findall(named)
    assert tests, "a fault without a test has no row"
    for file, test in tests:
        assert test in names_of(TESTS / file), f"tests/{file} has no {test}"


def test_every_file_of_this_directory_is_named() -> None:
    files = {f"reliability/{path.name}" for path in Path(__file__).parent.glob("test_*.py")} - {
        "reliability/test_table.py"
    }
    assert files <= {file for row in ROWS for file, _ in TEST_NAME.findall(row)}
    assert len(ROWS) == len(set(ROWS)) > 0
