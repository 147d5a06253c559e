"""Every key of what a cache was made from: a change of it is refused by name; of numeric settings, unless allowed."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_teacher, run_config, shard_files, story, write_jsonl

from accel_distill.cache import TeacherCache
from accel_distill.config import RunConfig, resolved_yaml
from accel_distill.errors import CacheMismatch, DamagedCache
from accel_distill.generate import generate, main
from accel_distill.identity import open_for_generation
from accel_distill.inspect_cache import as_text, inspect_cache
from accel_distill.manifest import read_record
from accel_distill.shard import read_header
from accel_distill.verify import as_text as verified_text
from accel_distill.verify import verify_cache

CPU = torch.device("cpu")
# Where a value that is none at all would be refused for that; the parameter goes with its method.
OTHER_VALUES: dict[str, Any] = {
    "targets.method": ("top_k", {"parameter": 5.0}),
    "targets.parameter": (0.06, {}),
    "sequence.long_documents": ("split", {}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity")
    make_teacher(path / "teacher")
    write_jsonl(path / "data.jsonl", [story(n) for n in range(40)])
    generate(configured(path, path / "cache"))
    return path


def configured(place: Path, cache: Path, **changes: dict[str, Any]) -> RunConfig:
    return run_config(place / "teacher", place / "data.jsonl", cache, **changes)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of what is no mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def at(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the mapping that holds a dotted key, and its last word."""
    *path, last = key.split(".")
    for word in path:
        values = values[word]
    return values, last


def other(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str) and len(value) == 64:
        return ("1" if value[0] == "0" else "0") + value[1:]
    if isinstance(value, list):
        return [["other", *value[0][1:]], *value[1:]]
    return "other" if value is None or isinstance(value, str) else value + 1


def test_a_change_of_any_key_of_the_identity_is_refused_by_its_name_with_both_values(
    place: Path, tmp_path: Path
) -> None:
    """One case for each key that a real record has, so that a new key is a new case."""
    content = json.loads((place / "cache" / "cache.json").read_text())
    keys = list(leaves(content["identity"]))
    assert len(keys) > 30 and len(keys) == len(set(keys))
    for key in keys:
        cache = shutil.copytree(place / "cache", tmp_path / key)
        changed = json.loads(json.dumps(content))
        inner, last = at(changed["identity"], key)
        before = inner[last]
        inner[last], more = OTHER_VALUES.get(key, (None, {}))
        inner |= more
        inner[last] = other(before) if inner[last] is None else inner[last]
        if key == "teacher.vocab_size":  # ranks.bin goes with it
            ranks = np.arange(inner[last]).astype("<u4").tobytes()
            (cache / "ranks.bin").write_bytes(ranks)
            changed["identity"]["layout"]["ranks_sha256"] = hashlib.sha256(ranks).hexdigest()
        (cache / "cache.json").write_text(json.dumps(changed))
        files = shard_files(cache)
        with pytest.raises((CacheMismatch, DamagedCache)) as caught:
            open_for_generation(configured(place, cache), world_size=1, device=CPU)
        said = str(caught.value)
        if key == "layout.ranks_sha256":  # its file has still the old one
            assert "ranks.bin: sha256" in said and inner[last] in said and before in said
            continue
        assert isinstance(caught.value, CacheMismatch), (key, said)
        words = [last] if key != "dataset.source.files" else ["data_files[0]"]
        words += ["threshold"] if key == "targets.parameter" else []
        assert any(word in said for word in words), (key, said)
        if not isinstance(before, list):
            assert str(inner[last]) in said and str(before) in said, (key, said)
        assert "another cache.path" in said, (key, said)
        assert shard_files(cache) == files and (cache / "cache.json").read_text() == json.dumps(changed)
        shutil.rmtree(cache)


def test_what_can_be_set_back_is_told_so_and_what_cannot_is_told_otherwise(place: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(place / "cache", tmp_path / "cache")
    content = json.loads((cache / "cache.json").read_text())
    content["identity"]["layout"]["chunk"] = 99
    content["identity"]["targets"]["seed"] = 5
    (cache / "cache.json").write_text(json.dumps(content))
    with pytest.raises(CacheMismatch) as caught:
        open_for_generation(configured(place, cache), world_size=1, device=CPU)
    said = str(caught.value)
    assert "targets.seed is 5 in the cache and 0 in this run (set it back)" in said
    assert "in this run (this version of accel_distill writes it so: use the version that began the cache)" in said


NUMERICS: dict[str, tuple[dict[str, dict[str, Any]], str, str]] = {
    "tokens_per_batch": ({"teacher": {"tokens_per_batch": 64}}, "teacher.tokens_per_batch is 128", "64}"),
    "head_chunk": ({"teacher": {"head_chunk": 16}}, "teacher.head_chunk is 32", "16}"),
    "attn_implementation": (
        {"teacher": {"attn_implementation": "eager"}},
        "teacher.attn_implementation is None",
        '"eager"}',
    ),
}


@pytest.mark.parametrize("key", NUMERICS)
def test_a_numeric_setting_is_refused_by_name_and_let_through_when_asked(key: str, place: Path, tmp_path: Path) -> None:
    changes, words, value = NUMERICS[key]
    cache = shutil.copytree(place / "cache", tmp_path / "cache")
    config = configured(place, cache, **changes)
    with pytest.raises(CacheMismatch) as caught:
        open_for_generation(config, world_size=1, device=CPU)
    assert words in str(caught.value) and "(set it back)" in str(caught.value)
    assert "or say --allow-numerics-drift" in str(caught.value)
    opening = open_for_generation(config, world_size=1, device=CPU, allow_numerics_drift=True)
    assert opening.record.drift == f'{{"{key}":{value}'
    assert any(words in note for note in opening.notes)


def test_every_numeric_setting_of_a_record_is_one_that_is_tested(place: Path) -> None:
    assert set(read_record(place / "cache").numerics) == {*NUMERICS, "device"}


def test_another_device_is_a_drift(place: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(place / "cache", tmp_path / "cache")
    cuda = torch.device("cuda")
    with pytest.raises(CacheMismatch, match="device is 'cpu' in the cache and 'cuda' in this run"):
        open_for_generation(configured(place, cache), world_size=1, device=cuda)
    opening = open_for_generation(configured(place, cache), world_size=1, device=cuda, allow_numerics_drift=True)
    assert opening.record.drift == '{"device":"cuda"}'


def test_a_difference_of_the_identity_is_refused_however_much_drift_is_allowed(place: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(place / "cache", tmp_path / "cache")
    config = configured(place, cache, teacher={"head_chunk": 16}, targets={"threshold": 0.1})
    with pytest.raises(CacheMismatch, match="targets.threshold is 0.05 in the cache and 0.1") as caught:
        open_for_generation(config, world_size=1, device=CPU, allow_numerics_drift=True)
    assert "head_chunk is 32" in str(caught.value) and "allow-numerics-drift" not in str(caught.value)


def begun(place: Path, path: Path, *, missing: int) -> Path:
    """Copy the cache without its manifest and its last shards."""
    cache = shutil.copytree(place / "cache", path)
    (cache / "manifest.json").unlink()
    for shard in sorted((cache / "shards").iterdir())[-missing:]:
        shard.unlink()
    return cache


def test_shards_made_under_drift_say_so_and_the_others_keep_their_bytes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = begun(place, tmp_path / "cache", missing=3)
    before, whole = shard_files(cache), shard_files(place / "cache")
    drifting = configured(place, cache, teacher={"tokens_per_batch": 64, "head_chunk": 16})
    (tmp_path / "run.yaml").write_text(resolved_yaml(drifting))
    assert main(["--config", str(tmp_path / "run.yaml")]) == 5
    assert main(["--config", str(tmp_path / "run.yaml"), "--allow-numerics-drift"]) == 0
    after = shard_files(cache)
    assert {name: after[name] for name in before} == before
    said = {name: read_header(cache / "shards" / name).numerics for name in after}
    drift = '{"head_chunk":16,"tokens_per_batch":64}'
    assert said == {name: "" if name in before else drift for name in whole}
    entries = [{"shards": 3, "numerics": {"head_chunk": 16, "tokens_per_batch": 64}}]
    for found, text in ((inspect_cache(cache), as_text), (verify_cache(cache, deep=True), verified_text)):
        assert found["drift"] == entries
        assert "3 shards were made with other numeric settings: head_chunk 16, tokens_per_batch 64" in text(found)
    assert verify_cache(cache)["ok"] and len(TeacherCache(cache)) == 30
    assert inspect_cache(place / "cache")["drift"] == verify_cache(place / "cache")["drift"] == []
    assert read_record(cache).numerics == read_record(place / "cache").numerics


def test_where_nothing_drifts_the_flag_changes_no_byte(place: Path, tmp_path: Path) -> None:
    cache = begun(place, tmp_path / "cache", missing=3)
    generate(configured(place, cache), allow_numerics_drift=True)
    assert shard_files(cache) == shard_files(place / "cache")
    assert (cache / "manifest.json").read_bytes() == (place / "cache" / "manifest.json").read_bytes()


def test_a_cache_without_shards_begins_anew_and_has_nothing_to_drift_from(place: Path, tmp_path: Path) -> None:
    cache = begun(place, tmp_path / "cache", missing=8)
    generate(configured(place, cache, teacher={"head_chunk": 16}), allow_numerics_drift=True)
    assert read_record(cache).numerics["head_chunk"] == 16
    assert verify_cache(cache)["drift"] == []
