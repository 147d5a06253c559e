"""The rooms of the package: imports go downwards only, and the heavy ones come late."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "accel_distill"
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# A file imports only from lower floors. A new file gets a line here, on the lowest floor that it can have.
FLOORS = {
    "deal": 0,
    "divergences": 0,
    "errors": 0,
    "figures": 0,
    "lm_head": 0,
    "packing": 0,
    "packing_probe": 0,
    "regular_file": 0,
    "screen": 0,
    "text_hash": 0,
    "turns": 0,
    "uniforms": 0,
    "worker_batch": 0,
    "charts": 1,
    "codec": 1,
    "command_line": 1,
    "demo_corpus": 1,
    "demo_teacher": 2,
    "estimate_table": 1,
    "losses": 1,
    "processes": 1,
    "progress": 1,
    "projection": 1,
    "publish": 1,
    "reading": 1,
    "recent_losses": 1,
    "run_file": 1,
    "shard": 1,
    "stopping": 1,
    "training_log": 1,
    "alive": 2,
    "byte_curves": 2,
    "disk_space": 2,
    "divided": 2,
    "explain": 2,
    "head_jobs": 2,
    "record_checks": 2,
    "rows": 2,
    "targets": 2,
    "fused_head": 3,
    "lookout": 3,
    "manifest": 3,
    "batch_targets": 3,
    "teacher_mode": 3,
    "training_arguments": 3,
    "config": 4,
    "head_probe": 4,
    "hints": 4,
    "histograms": 4,
    "noted_stream": 5,
    "shard_checks": 4,
    "adapters": 5,
    "cache": 5,
    "stream": 5,
    "tokens": 5,
    "length_sample": 6,
    "packs": 6,
    "run_record": 6,
    "sample_positions": 6,
    "student": 6,
    "teacher": 6,
    "collator": 7,
    "identity": 7,
    "pipeline": 7,
    "online_targets": 7,
    "run_directory": 7,
    "padding": 10,
    "probe": 8,
    "run_plan": 8,
    "checkpoint_record": 8,
    "recomputed": 8,
    "run_curves": 8,
    "run_facts": 8,
    "run_table": 8,
    "run_warnings": 8,
    "shard_writer": 8,
    "text_rows": 8,
    "filled_rows": 9,
    "shuffle": 9,
    "text_collator": 9,
    "cached_data": 11,
    "trainer": 10,
    "online_data": 10,
    "audit": 9,
    "generate": 9,
    "estimate": 9,
    "inspect_cache": 9,
    "train": 12,
    "verify": 9,
    "report_page": 10,
    "sizes": 10,
    "report": 11,
    "compare": 12,
    "demo": 13,
    "__init__": 14,
    "cli": 14,
    "__main__": 15,
}

# Distributions whose import name is another one.
IMPORTED_AS = {"yaml": "pyyaml", "pydantic_core": "pydantic"}


def imports(name: str) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere, functions and type checks included."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py, line {node.lineno}: write the import out: from accel_distill..."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(name: str) -> set[str]:
    """Return the files of the package that a file imports; `__version__`, a constant, is not one."""
    parts = [dotted.split(".") for dotted in imports(name)]
    inside = {second[0] for first, *second in parts if first == "accel_distill" and second}
    return {room if room in FILES else "__init__" for room in inside - {"__version__"}}


def outside(name: str) -> set[str]:
    """Return the top-level names that a file imports and that neither Python nor the package has."""
    return {dotted.split(".")[0] for dotted in imports(name)} - sys.stdlib_module_names - {"accel_distill"}


def test_every_file_has_a_floor_and_every_floor_a_file() -> None:
    assert set(FLOORS) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_lower_floors(name: str) -> None:
    upward = {room: FLOORS[room] for room in rooms(name) if FLOORS[room] >= FLOORS[name]}
    assert not upward, f"{name}.py is on floor {FLOORS[name]} and imports {upward}"


def test_the_walk_sees_lazy_imports() -> None:
    assert {"config", "demo", "inspect_cache"} <= rooms("cli")  # all three inside functions


@pytest.mark.parametrize(("library", "owner"), [("h5py", "shard"), ("yaml", "run_file")])
def test_a_format_is_known_to_one_file(library: str, owner: str) -> None:
    assert [name for name in FILES if library in outside(name)] == [owner]


def test_every_library_that_is_imported_is_a_declared_dependency() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    lines = settings["options"]["install_requires"] + extras["deepspeed"] + extras["lora"]
    declared = {re.split(r"[ <>=~!]", line)[0].lower() for line in lines.split("\n") if line}
    imported = {IMPORTED_AS.get(library, library) for name in FILES for library in outside(name)}
    assert imported <= declared
    assert len(imported) > 5


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import accel_distill; accel_distill.__version__; dir(accel_distill)", "torch numpy yaml pydantic"),
        ("import accel_distill.cli", "torch numpy yaml pydantic transformers"),
        ("import accel_distill.config", "torch numpy transformers accelerate datasets"),
        ("import accel_distill.inspect_cache", "torch transformers accelerate datasets"),
        ("import accel_distill.verify", "torch transformers accelerate datasets pydantic"),
    ],
)
def test_a_light_module_imports_nothing_heavy(statement: str, absent: str, tmp_path: Path) -> None:
    program = f"{statement}; import sys; print(*[name for name in {absent.split()!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_public_names_are_those_of_their_modules() -> None:
    import accel_distill
    from accel_distill.cache import TeacherCache
    from accel_distill.collator import CachedLogitCollator
    from accel_distill.trainer import DistillationTrainer

    assert accel_distill.TeacherCache is TeacherCache
    assert accel_distill.CachedLogitCollator is CachedLogitCollator
    assert accel_distill.DistillationTrainer is DistillationTrainer
    with pytest.raises(AttributeError, match="Nothing"):
        _ = accel_distill.Nothing
