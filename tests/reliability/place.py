"""A small cache to make, its bytes when nothing goes wrong, and the check that nothing false is in another one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import make_teacher, run_config, story, write_jsonl

from accel_distill.cache import TeacherCache
from accel_distill.config import resolved_yaml
from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.generate import generate

SAMPLES = 40
LANES = 3
LEFT_BEHIND = (".tmp/", "logs/", "run.yaml", "hints.json")  # times, hosts and paths: no part of what is promised


@dataclass(frozen=True)
class Place:
    """A directory with a teacher and data, and what a cache made from them must be."""

    path: Path
    whole: dict[str, bytes]

    def run_file(self, directory: Path, /, **changes: dict[str, Any]) -> Path:
        """Write a run file for a cache of its own in `directory`; return its path."""
        directory.mkdir(exist_ok=True)
        path = directory / "run.yaml"
        path.write_text(resolved_yaml(settings(self.path, directory / "cache", **changes)))
        return path

    def check_part(self, cache: Path) -> int:
        """Assert that a cache that may be half made holds nothing false; return how many shards it has."""
        shards = cache / "shards"
        found = (
            {f"shards/{path.name}": path.read_bytes() for path in sorted(shards.iterdir())} if shards.is_dir() else {}
        )
        for name, content in found.items():
            assert content == self.whole[name], f"{name} is there and is not what it should be"
        if (cache / "manifest.json").exists():
            assert kept(cache) == self.whole
        try:
            opened = len(TeacherCache(cache))
        except (CacheMismatch, ConfigError):
            opened = 0
        assert opened in (0, SAMPLES)
        return len(found)


def settings(place: Path, cache: Path, /, **changes: dict[str, Any]) -> Any:
    """Return the run: 40 samples in 21 shards."""
    values: dict[str, dict[str, Any]] = {
        "dataset": {"max_samples": SAMPLES},
        "cache": {"samples_per_shard": 2, "lanes": LANES, "min_free_disk": "1MB"},
    }
    return run_config(
        place / "teacher",
        place / "data.jsonl",
        cache,
        **{name: values.get(name, {}) | changes.get(name, {}) for name in values | changes},
    )


def make_place(path: Path) -> Place:
    """Make the teacher, the data and the cache that is never interrupted."""
    make_teacher(path / "teacher")
    write_jsonl(path / "data.jsonl", [story(n) for n in range(60)])
    generate(settings(path, path / "cache"))
    return Place(path, kept(path / "cache"))


def kept(cache: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a cache that its identity determines, by name."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    names = {str(path.relative_to(cache)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(LEFT_BEHIND)}


Kept = Callable[[Path], dict[str, bytes]]
