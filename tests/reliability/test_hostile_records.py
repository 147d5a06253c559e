"""cache.json, ranks.bin, plan.json, manifest.json, damaged or forged: one named error from every reader of a cache."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_distill.cache import TeacherCache
from accel_distill.errors import CacheMismatch, DamagedCache, RunError
from accel_distill.inspect_cache import as_text, inspect_cache
from accel_distill.manifest import cache_id, read_manifest, read_plan, read_record
from accel_distill.verify import verify_cache
from reliability.hostile import LFS, PAGE, good_cache

NAMES = ("cache.json", "manifest.json", "plan.json", "ranks.bin")
SECONDS = 2.0  # of processor time for all four readers


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "good"
    good_cache(path)
    return path


@pytest.fixture
def cache(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "cache")


def read_all_ways(path: Path) -> list[RunError | None]:
    """Read a cache by each of its readers; return what each raised. Anything but a RunError fails the test."""
    readers: tuple[Callable[[Path], Any], ...] = (
        lambda path: [TeacherCache(path)[item] for item in range(13)],
        lambda path: as_text(inspect_cache(path)),
        lambda path: _raised(verify_cache(path, deep=True)),
        lambda path: read_plan(path),
    )
    raised: list[RunError | None] = []
    begun = time.process_time()
    for read in readers:
        try:
            read(path)
            raised.append(None)
        except RunError as error:
            raised.append(error)
            assert "\n" not in str(error) and len(str(error)) < 1500
    assert time.process_time() - begun < SECONDS
    return raised


def _raised(found: dict[str, Any]) -> None:
    if not found["ok"]:
        raise DamagedCache(found["problems"][0]["what"])


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "text": b'"cache"',
    "an empty object": b"{}",
    "half a file": b'{"identity": {"teacher"',
    "no UTF-8": b"\xff\xfe{}",
    "zeros": bytes(1000),
    "nested deep": b"[" * 200_000,
    "objects nested deep": b'{"a":' * 200_000,
    "a number of a million digits": b'{"identity": ' + b"9" * 1_000_000 + b"}",
    "not a number": b'{"identity": NaN, "max_samples": NaN, "cache_id": NaN}',
    "infinity": b'{"identity": Infinity, "max_samples": -Infinity, "cache_id": Infinity}',
    "20 MB": b"[" + b"[],[]," * 3_500_000 + b"[]]",
    "a pointer of Git LFS": LFS,
    "a web page": PAGE,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_small_file_with_other_content_is_named(name: str, content: str, cache: Path) -> None:
    (cache / name).write_bytes(CONTENTS[content])
    raised = read_all_ways(cache)
    named = [error for error in raised if error is not None]
    assert named and all(isinstance(error, DamagedCache) and name in str(error) for error in named)
    assert raised[2] is not None  # verify sees all four
    assert name == "plan.json" or raised[0] is not None


OTHER_THINGS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere"),
}


@pytest.mark.parametrize("thing", OTHER_THINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_small_file_that_is_no_regular_file_is_named_and_not_waited_for(name: str, thing: str, cache: Path) -> None:
    (cache / name).unlink()
    OTHER_THINGS[thing](cache / name)
    named = [error for error in read_all_ways(cache) if error is not None]
    assert named and all(name in str(error) for error in named)
    assert "not a regular file" in str(named[0]) or "a symbolic link" in str(named[0])


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield where each key of nested objects and lists is, the inner ones too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from leaves(below, (*path, key))


def replaced(content: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Return a copy of JSON with another value at one place; `GONE` removes the key."""
    copy = json.loads(json.dumps(content))
    inner: Any = copy
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


GONE = object()
WRONG = (GONE, None, True, -1, 0, 1.5, 1e300, 2**70, "x", "", [], {}, [[]], {"a": {}})


@pytest.mark.parametrize("name", ["cache.json", "manifest.json", "plan.json"])
def test_any_key_with_a_value_of_another_kind_is_an_error_and_never_a_traceback(
    name: str, good: Path, tmp_path: Path
) -> None:
    """One case for each key of a real file and each kind of value."""
    content, cases, refused = json.loads((good / name).read_text()), 0, 0
    path = shutil.copytree(good, tmp_path / "cache")
    for place in leaves(content):
        for wrong in WRONG:
            changed = replaced(content, place, wrong)
            if changed == content:
                continue
            (path / name).write_text(json.dumps(changed))
            cases += 1
            try:
                record = read_record(path)
                read_plan(path)
                read_manifest(record)
            except (DamagedCache, CacheMismatch) as error:
                refused += 1
                assert name in str(error) or "manifest.json" in str(error)
                continue
            assert name == "plan.json" or place[0] in ("numerics", "environment"), (place, wrong)
            as_text(inspect_cache(path))
            verify_cache(path)
    assert cases > 10 and refused > 5


def test_an_identity_forged_with_a_right_manifest_is_refused_for_what_it_says(good: Path, tmp_path: Path) -> None:
    """Whoever writes cache.json can write its id everywhere; so what is used of it is checked by type and range."""
    content, refused = json.loads((good / "cache.json").read_text()), 0
    manifest = json.loads((good / "manifest.json").read_text())
    path = shutil.copytree(good, tmp_path / "cache")
    for place in leaves(content["identity"]):
        for wrong in WRONG:
            changed = replaced(content, ("identity", *place), wrong)
            (path / "cache.json").write_text(json.dumps(changed))
            identity = changed["identity"]
            (path / "manifest.json").write_text(json.dumps({**manifest, "cache_id": cache_id(identity)}))
            try:
                TeacherCache(path)[0]
            except (DamagedCache, CacheMismatch):
                refused += 1
    assert refused > 200


def test_an_incomplete_cache_with_a_forged_identity_says_that_its_shards_are_anothers(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    content = json.loads((cache / "cache.json").read_text())
    content["identity"]["targets"]["temperature"] = 2.5
    (cache / "cache.json").write_text(json.dumps(content))
    with pytest.raises(CacheMismatch, match="it belongs to the cache"):
        inspect_cache(cache)
    assert {problem["exit_status"] for problem in verify_cache(cache)["problems"]} == {5}


def forge_ranks(cache: Path, ranks: bytes) -> None:
    """Put other ranks into a cache, and their hash into its identity."""
    (cache / "ranks.bin").write_bytes(ranks)
    content = json.loads((cache / "cache.json").read_text())
    content["identity"]["layout"]["ranks_sha256"] = hashlib.sha256(ranks).hexdigest()
    (cache / "cache.json").write_text(json.dumps(content))


RANKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "an id beyond the vocabulary": (lambda ranks: b"\xff\xff\xff\x7f" + ranks[4:], "does not hold each id"),
    "an id twice": (lambda ranks: ranks[4:8] + ranks[4:], "does not hold each id"),
    "an id less": (lambda ranks: ranks[:-4], "it has 196 bytes, expected 4 for each of 50 ids"),
    "half an id": (lambda ranks: ranks[:-2], "it has 198 bytes"),
    "an id more": (lambda ranks: ranks + bytes(4), "it has 204 bytes, expected at most 200"),
}


@pytest.mark.parametrize("kind", RANKS)
def test_forged_ranks_with_a_right_hash_are_refused(kind: str, cache: Path) -> None:
    change, words = RANKS[kind]
    forge_ranks(cache, change((cache / "ranks.bin").read_bytes()))
    with pytest.raises(DamagedCache, match=f"ranks.bin.*{words}"):
        read_record(cache)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a shard less": (lambda manifest: manifest["shards"].pop(), "4 shards are not those of 13 samples"),
    "a shard twice": (lambda manifest: manifest["shards"].append(manifest["shards"][0]), "6 shards are not those"),
    "shards in another order": (lambda manifest: manifest["shards"].reverse(), "5 shards are not those"),
    "a path for a name": (
        lambda manifest: manifest["shards"][0].update(name="../../../etc/passwd"),
        "is named '../../../etc/passwd', which is not its place",
    ),
    "sums that are not": (lambda manifest: manifest["sums"].update(positions=7), "its sums.positions is 7, and"),
    "10 to the 12 samples": (lambda manifest: manifest.update(samples=10**12), "5 shards are not those of"),
    "no end": (lambda manifest: manifest.update(stream_end="maybe"), "its stream_end is 'maybe'"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_refused(kind: str, cache: Path) -> None:
    change, words = MANIFESTS[kind]
    manifest = json.loads((cache / "manifest.json").read_text())
    change(manifest)
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCache, match=f"manifest.json: .*{words}.*; delete it and run generate again"):
        TeacherCache(cache)


def test_a_manifest_that_grew_beyond_its_shards_is_not_read(cache: Path) -> None:
    with open(cache / "manifest.json", "ab") as file:
        file.write(b" " * (2 << 20))
    with pytest.raises(DamagedCache, match=r"manifest.json cannot be read \(it has 2,.* bytes, expected at most 1,"):
        TeacherCache(cache)
