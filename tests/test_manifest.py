"""A cache's directory: made, read back, completed, and every broken or foreign file in it named."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_cache import make_cache, make_record, make_rows, write_shards

from accel_distill.deal import shard_name
from accel_distill.errors import CacheMismatch, ConfigError, DamagedCache, RunError
from accel_distill.manifest import (
    Record,
    committed_shards,
    create,
    differences,
    listed_shards,
    make_directories,
    read_manifest,
    read_plan,
    read_record,
    remove_superseded,
    withdraw_manifest,
    write_manifest,
    write_plan,
)

LENGTHS = [[9], [0], [4], [2], [7], [5], [3]]  # 7 samples: two lanes of 2 are 3 shards and a short one
SETTINGS = {"lanes": 2, "samples_per_shard": 2}


@pytest.fixture
def complete(tmp_path: Path) -> Record:
    return make_cache(tmp_path / "cache", make_rows(LENGTHS), **SETTINGS)


@pytest.fixture
def begun(tmp_path: Path) -> Record:
    return make_record(tmp_path / "cache", **SETTINGS)


def test_a_record_is_read_as_it_was_made(begun: Record) -> None:
    found = read_record(begun.path)
    assert (found.identity, found.numerics, found.environment) == (begun.identity, begun.numerics, begun.environment)
    np.testing.assert_array_equal(found.ids_by_rank, begun.ids_by_rank)
    assert found.cache_id == begun.cache_id
    assert (begun.path / "ranks.bin").read_bytes() == begun.ids_by_rank.astype("<u4").tobytes()
    assert "accel-distill inspect" in (begun.path / "README.txt").read_text()
    assert list((begun.path / ".tmp").iterdir()) == []


def test_the_cache_id_is_that_of_the_identity_alone(begun: Record) -> None:
    same = Record(
        Path("/elsewhere"), begun.identity, {"device": "cuda"}, {"versions": {"torch": "9"}}, begun.ids_by_rank
    )
    other = Record(begun.path, {**begun.identity, "format": 99}, begun.numerics, begun.environment, begun.ids_by_rank)
    assert same.cache_id == begun.cache_id != other.cache_id


def test_who_comes_second_gets_the_record_of_the_first(begun: Record) -> None:
    second = Record(begun.path, {**begun.identity, "format": 99}, {}, {}, begun.ids_by_rank[::-1].copy())
    assert create(second).identity == begun.identity
    np.testing.assert_array_equal(read_record(begun.path).ids_by_rank, begun.ids_by_rank)


def test_what_a_run_left_that_died_before_cache_json_is_overwritten(tmp_path: Path) -> None:
    make_record(tmp_path, vocab=60)
    (tmp_path / "cache.json").unlink()
    again = make_record(tmp_path, vocab=50)
    np.testing.assert_array_equal(read_record(tmp_path).ids_by_rank, again.ids_by_rank)


def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"cache.path: {tmp_path}/file/cache cannot be made \(Not a directory\)"):
        make_directories(tmp_path / "file" / "cache")


BROKEN_RECORDS: dict[str, tuple[str, bytes | None, str]] = {
    "no JSON": ("cache.json", b"{", "cache.json: it is not JSON"),
    "a list": ("cache.json", b"[]", "cache.json: it holds list, expected an object"),
    "no identity": ("cache.json", b"{}", "cache.json: its 'identity' is missing"),
    "no text": ("cache.json", b"\xff\xfe\xff", "cache.json: it is not JSON"),
    "identity of another kind": ("cache.json", b'{"identity": 3}', "cache.json"),
    "no ranks": ("ranks.bin", None, "ranks.bin is missing"),
    "short ranks": ("ranks.bin", b"123", "ranks.bin: sha256 .*, cache.json says"),
    "other ranks": ("ranks.bin", bytes(200), "ranks.bin: sha256 .*, cache.json says"),
}


@pytest.mark.parametrize("kind", BROKEN_RECORDS)
def test_a_broken_record_is_named(kind: str, begun: Record) -> None:
    name, content, words = BROKEN_RECORDS[kind]
    if content is None:
        (begun.path / name).unlink()
    else:
        (begun.path / name).write_bytes(content)
    with pytest.raises(DamagedCache, match=words):
        read_record(begun.path)


def test_no_cache_is_a_configuration_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"cache {path}: it .*make one with"):
            read_record(path)


def test_the_plan_is_read_as_it_was_written_and_replaced(begun: Record) -> None:
    assert read_plan(begun.path) is None
    for max_samples in (10, 20, None):
        write_plan(begun.path, max_samples=max_samples)
        assert read_plan(begun.path) == {"max_samples": max_samples}


def test_the_manifest_counts_what_the_shards_hold(complete: Record) -> None:
    manifest = read_manifest(complete)
    assert manifest is not None
    names = [shard_name(0, 0, 2), shard_name(0, 1, 2), shard_name(1, 0, 2), shard_name(1, 1, 1)]
    assert [shard["name"] for shard in manifest["shards"]] == names
    assert [shard["tokens"] for shard in manifest["shards"]] == [13, 2, 10, 5]  # samples 0 2; 1 3; 4 6; 5
    assert [shard["positions"] for shard in manifest["shards"]] == [11, 1, 8, 4]
    assert (manifest["samples"], manifest["stream_end"], manifest["cache_id"]) == (7, "exhausted", complete.cache_id)
    files = [complete.path / "shards" / name for name in names]
    assert [shard["bytes"] for shard in manifest["shards"]] == [file.stat().st_size for file in files]
    headers = [hashlib.sha256(file.read_bytes()[:4096]).hexdigest() for file in files]
    assert [shard["header_sha256"] for shard in manifest["shards"]] == headers
    sums = {
        "tokens": 30,
        "positions": 24,
        "sequences": 7,
        "untargeted": 1,
        "bytes": sum(f.stat().st_size for f in files),
    }
    assert {key: manifest["sums"][key] for key in sums} == sums


def test_the_manifest_is_the_same_bytes_whoever_writes_it_and_a_different_one_is_an_error(complete: Record) -> None:
    path = complete.path / "manifest.json"
    first = path.read_bytes()
    write_manifest(complete, total=7, stream_end="exhausted")
    path.unlink()
    write_manifest(complete, total=7, stream_end="exhausted")
    assert path.read_bytes() == first
    with pytest.raises(CacheMismatch, match="manifest.json is there and says something else"):
        write_manifest(complete, total=7, stream_end="cap")


def test_a_withdrawn_manifest_is_gone(complete: Record) -> None:
    withdraw_manifest(complete.path)
    assert read_manifest(complete) is None
    withdraw_manifest(complete.path)


def test_no_manifest_is_written_of_a_cache_that_lacks_a_shard(complete: Record) -> None:
    withdraw_manifest(complete.path)
    (complete.path / "shards" / shard_name(1, 0, 2)).unlink()
    with pytest.raises(RunError, match=shard_name(1, 0, 2)):
        write_manifest(complete, total=7, stream_end="exhausted")
    assert read_manifest(complete) is None


def test_committed_shards_are_listed_with_their_headers_and_other_files_are_not(complete: Record) -> None:
    (complete.path / "shards" / "notes.txt").write_text("mine")
    found = committed_shards(complete)
    assert {place: header.samples for place, header in found.items()} == {(0, 0): 2, (0, 1): 2, (1, 0): 2, (1, 1): 1}
    assert found[1, 0].first_sample == 4
    assert listed_shards(complete.path) == {(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 1)}


def test_of_two_shards_of_a_place_the_longer_counts_and_the_short_one_is_removed(complete: Record) -> None:
    longer = make_rows([*LENGTHS, [6]])
    write_shards(complete, longer)
    assert committed_shards(complete)[1, 1].samples == 2
    assert (1, 1, 1) in listed_shards(complete.path)
    assert remove_superseded(complete, 8) == [shard_name(1, 1, 1)]
    assert listed_shards(complete.path) == {(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)}
    assert remove_superseded(complete, 8) == []


def test_a_smaller_total_removes_no_longer_shard_and_none_beyond_it(complete: Record) -> None:
    before = listed_shards(complete.path)
    assert remove_superseded(complete, 3) == []
    complete.shard_path(0, 0, 1).write_bytes(b"short")
    complete.shard_path(1, 0, 1).write_bytes(b"short, and beyond")
    assert remove_superseded(complete, 3) == [shard_name(0, 0, 1)]
    assert listed_shards(complete.path) == before | {(1, 0, 1)}


def test_a_shard_that_is_removed_between_its_listing_and_its_reading_is_not_there(
    complete: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = listed_shards(complete.path)
    monkeypatch.setattr("accel_distill.manifest.listed_shards", lambda _: listed | {(1, 0, 1)})
    assert set(committed_shards(complete)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert committed_shards(complete)[1, 0].samples == 2


def test_a_short_shard_stays_where_the_longer_one_is_not_there(complete: Record) -> None:
    assert remove_superseded(complete, 8) == []
    assert (1, 1, 1) in listed_shards(complete.path)


def test_a_shard_of_another_cache_is_a_mismatch(complete: Record, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", make_rows(LENGTHS, vocab=40), vocab=40, **SETTINGS)
    shutil.copy(other.shard_path(0, 0, 2), complete.shard_path(0, 0, 2))
    with pytest.raises(CacheMismatch, match=f"{shard_name(0, 0, 2)}: it belongs to the cache {other.cache_id[:12]}"):
        committed_shards(complete)


@pytest.mark.parametrize("name", [shard_name(0, 0, 2), shard_name(5, 1, 2), shard_name(0, 1, 1)])
def test_a_shard_under_the_name_of_another_is_damaged(name: str, complete: Record) -> None:
    shutil.copy(complete.shard_path(0, 1, 2), complete.path / "shards" / name)
    with pytest.raises(DamagedCache, match=f"{name}: it says group 0, lane 1, 2 samples, which is not its name"):
        committed_shards(complete)


def test_a_broken_shard_is_named(complete: Record) -> None:
    complete.shard_path(1, 1, 1).write_bytes(b"")
    with pytest.raises(DamagedCache, match=shard_name(1, 1, 1)):
        committed_shards(complete)


def test_differences_are_told_by_dotted_key_with_both_values() -> None:
    cache = {"a": {"b": 1, "c": [1, 2]}, "d": "x", "same": {"e": None}}
    run: dict[str, Any] = {"a": {"b": 2, "c": [1, 2]}, "new": 3, "same": {"e": None}}
    assert differences(cache, run) == [
        "a.b is 1 in the cache and 2 in this run",
        "d is 'x' in the cache and None in this run",
        "new is None in the cache and 3 in this run",
    ]
    files = {"files": [["a", 1], ["b", 2], ["c", 3]]}
    assert differences(files, {"files": [["a", 1], ["c", 3], ["b", 2]]}) == [
        "files[1] is ['b', 2] in the cache and ['c', 3] in this run"
    ]
    assert differences(files, {"files": [["a", 1], ["b", 2]]}) == [
        "files[2] is ['c', 3] in the cache and None in this run"
    ]
    assert differences(cache, json.loads(json.dumps(cache))) == []


def test_a_record_that_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_distill.manifest.LARGEST_RECORD", 500)
    with pytest.raises(ConfigError, match="the list of its files takes .* bytes, more than the 500 of a cache.json"):
        make_record(tmp_path)
    assert not (tmp_path / "cache.json").exists()


def test_a_cache_of_another_format_is_a_mismatch_that_says_so(begun: Record) -> None:
    content = json.loads((begun.path / "cache.json").read_text())
    content["identity"]["format"] = 1
    (begun.path / "cache.json").write_text(json.dumps(content))
    with pytest.raises(CacheMismatch, match=r"format is 1 in the cache and \d in this version .* use the version"):
        read_record(begun.path)
