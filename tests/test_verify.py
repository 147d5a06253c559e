"""`accel-distill verify`: what it finds, says and returns; and that a repaired cache gets the same bytes again."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_cache import make_cache, make_rows, write_shards
from tiny import make_teacher, run_config, shard_files, story, write_jsonl

from accel_distill.cache import TeacherCache
from accel_distill.codec import Method
from accel_distill.deal import shard_name
from accel_distill.errors import ConfigError
from accel_distill.generate import generate
from accel_distill.manifest import listed_shards, withdraw_manifest
from accel_distill.verify import main, set_aside, verify_cache

LENGTHS = [[9], [0], [1], [2], [17], [5], [0], [30], [3], [8], [4], [12], [6]]  # 13 samples: 3 + 3, 3 + 3, 1
SPLIT = [[9], [8, 8, 3], [0], [5], [8, 2], [1], [8, 8, 8, 5], [7]]
FIRST, LAST = shard_name(0, 0, 3), shard_name(2, 0, 1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache", make_rows(LENGTHS), lanes=2, samples_per_shard=3)
    (tmp_path / "cache" / "tokenizer").mkdir()
    (tmp_path / "cache" / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path / "cache"


@pytest.mark.parametrize("method", ["threshold", "top_k", "random"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_cache_of_every_method_is_fine(method: Method, deep: bool, tmp_path: Path) -> None:
    rows = make_rows(LENGTHS, method=method)
    make_cache(tmp_path, rows, method=method, lanes=2, samples_per_shard=3)
    found = verify_cache(tmp_path, deep=deep)
    assert (found["ok"], found["complete"], found["problems"], found["deep"]) == (True, True, [], deep)
    assert (found["shards"], found["samples"], found["sequences"]) == (5, 13, 13)
    assert found["positions"] == sum(len(row.targets) for row in rows) > 0
    assert found["heads"] == sum(len(row.targets.head_ids) for row in rows)
    assert found["tails"] == sum(len(row.targets.tail_ids) for row in rows)


def test_pieces_of_split_documents_are_one_sample(tmp_path: Path) -> None:
    make_cache(tmp_path, make_rows(SPLIT), long_documents="split")
    found = verify_cache(tmp_path, deep=True)
    assert (found["ok"], found["samples"], found["sequences"]) == (True, 8, 14)


def test_positions_left_out_for_a_logit_that_was_not_finite_are_no_damage(tmp_path: Path) -> None:
    rows = make_rows(LENGTHS)
    rows[4] = replace(rows[4], targets=rows[4].targets.position_slice(1, 16), left_out=(0,))
    make_cache(tmp_path, rows)
    assert verify_cache(tmp_path, deep=True)["ok"]
    assert TeacherCache(tmp_path)[4].target_mask.tolist() == [False] + [True] * 15 + [False]


def test_a_sample_in_two_pieces_where_none_is_split_is_damage(tmp_path: Path) -> None:
    make_cache(tmp_path, make_rows(SPLIT))
    assert "rows for 4 samples, and none is split" in verify_cache(tmp_path)["problems"][0]["what"]


def test_what_it_says_of_a_cache_that_is_fine(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(cache)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{cache}: complete",
        "5 of 5 shards are as published, with 13 samples; headers, hashes and counts checked (all: --deep)",
        "no problem found",
    ]
    assert said.err == ""


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-300] ^= 8
    path.write_bytes(data)


def test_every_problem_is_told_and_the_other_shards_are_counted(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped(cache / "shards" / FIRST)
    (cache / "shards" / LAST).unlink()
    assert main([str(cache), "--json"]) == 6
    found = json.loads(capsys.readouterr().out)
    assert [problem["file"] for problem in found["problems"]] == [f"shards/{LAST}", f"shards/{FIRST}"]
    assert "it is in manifest.json and not there" in found["problems"][0]["what"]
    assert "do not have the hash that its header says" in found["problems"][1]["what"]
    assert (found["shards"], found["samples"], found["ok"], found["complete"]) == (3, 9, False, False)


def test_an_incomplete_cache_is_fine_and_said_to_be_incomplete(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    withdraw_manifest(cache)
    (cache / "shards" / FIRST).unlink()
    (cache / "plan.json").write_text('{"max_samples": 20}')
    assert main([str(cache), "--deep"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{cache}: NOT complete: run the same generate command, which makes what is missing",
        "4 of at most 8 shards are as published, with 10 samples; every value decoded and checked",
        "no problem found",
    ]


def test_a_shard_of_another_cache_is_exit_status_5_and_damage_beside_it_6(cache: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "other", make_rows(LENGTHS, vocab=40), vocab=40, lanes=2, samples_per_shard=3)
    shutil.copy(tmp_path / "other" / "shards" / FIRST, cache / "shards" / FIRST)
    assert main([str(cache)]) == 5
    flipped(cache / "shards" / LAST)
    assert main([str(cache)]) == 6


def test_what_is_no_cache_is_exit_status_2_and_a_broken_record_6(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    with pytest.raises(ConfigError, match="holds no cache.json"):
        verify_cache(tmp_path)
    (cache / "cache.json").write_text("{")
    assert main([str(cache), "--json"]) == 6
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and "it is not JSON" in found["problems"][0]["what"]


def test_stray_files_are_named_and_are_no_damage(cache: Path) -> None:
    (cache / "shards" / "notes.txt").write_text("mine")
    os.mkfifo(cache / "shards" / "pipe")
    (cache / "core.1234").write_text("")
    (cache / "tokenizer" / "tokenizer.json").unlink()
    found = verify_cache(cache)
    assert found["ok"]
    assert found["notes"] == [
        "shards/notes.txt is no shard: it is not read",
        "shards/pipe is no shard: it is not read",
        "core.1234 does not belong to a cache: it is not read",
        "tokenizer/ is missing or empty: train needs it; copy it from the teacher",
    ]


def test_a_short_shard_that_a_longer_one_replaces_is_a_note_and_not_counted(tmp_path: Path) -> None:
    record = make_cache(tmp_path, make_rows(LENGTHS[:2]), lanes=1, samples_per_shard=3)
    withdraw_manifest(tmp_path)
    write_shards(record, make_rows(LENGTHS[:3]))
    found = verify_cache(tmp_path)
    assert (found["ok"], found["samples"], found["shards"]) == (True, 3, 1)
    assert f"shards/{shard_name(0, 0, 2)} is superseded by a longer one" in found["notes"]


def test_a_shard_that_is_removed_between_its_listing_and_its_check_is_no_damage_unless_the_manifest_has_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = listed_shards(cache)
    monkeypatch.setattr("accel_distill.verify.listed_shards", lambda _: listed | {(0, 0, 1)})
    found = verify_cache(cache)
    assert (found["complete"], found["shards"], found["problems"]) == (True, 5, [])
    (cache / "shards" / LAST).unlink()
    assert [problem["file"] for problem in verify_cache(cache)["problems"]] == [f"shards/{LAST}"]


def test_a_shard_that_the_manifest_does_not_know_is_damage(cache: Path) -> None:
    record = make_cache(cache.parent / "long", make_rows([*LENGTHS, [4]]), lanes=2, samples_per_shard=3)
    name = shard_name(2, 1, 1)
    shutil.copy(record.path / "shards" / name, cache / "shards" / name)
    (problem,) = verify_cache(cache)["problems"]
    assert "it is not in manifest.json" in problem["what"]


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_broken_small_files_are_problems_and_moved_aside_by_repair(name: str, cache: Path) -> None:
    (cache / name).write_text("[1")
    (problem,) = verify_cache(cache)["problems"]
    assert (problem["file"], problem["exit_status"]) == (name, 6)
    assert main([str(cache), "--repair"]) == 0
    assert not (cache / "manifest.json").exists()
    assert verify_cache(cache)["ok"]


def test_nothing_is_renamed_without_repair_nor_where_nothing_is_wrong(cache: Path) -> None:
    before = sorted(os.listdir(cache / "shards"))
    assert main([str(cache), "--repair"]) == 0
    assert (cache / "manifest.json").exists()
    flipped(cache / "shards" / FIRST)
    assert main([str(cache)]) == 6
    assert sorted(os.listdir(cache / "shards")) == before and (cache / "manifest.json").exists()


def test_what_was_moved_aside_before_is_never_overwritten(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "a.h5").write_text(str(number))
        assert set_aside(tmp_path / "a.h5") == f"a.h5.bad{'' if number == 0 else number + 1}"
    (tmp_path / "a.h5").mkdir()
    assert set_aside(tmp_path / "a.h5") == "a.h5.bad4"
    (tmp_path / "a.h5").symlink_to("/nowhere")
    assert set_aside(tmp_path / "a.h5") == "a.h5.bad5"
    assert (tmp_path / "a.h5.bad5").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("a.h5.bad", "a.h5.bad2", "a.h5.bad3")] == ["0", "1", "2"]


def test_what_it_says_of_damage_and_of_a_repair(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped(cache / "shards" / FIRST)
    assert main([str(cache)]) == 6
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"shard {cache}/shards/{FIRST}: its data do not have the hash")
    assert said[-3] == f"{cache}: DAMAGED: see above; --repair moves aside what generate can make again"
    assert said[-2].startswith("4 of at most 5 shards are as published, with 10 samples")
    assert said[-1] == "1 problem"
    assert main([str(cache), "--repair"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"moved aside: shards/{FIRST} -> {FIRST}.bad" in said
    assert said[-3].startswith(
        f"{cache}: repaired: run the same generate command, which makes just what is missing now"
    )
    assert main([str(cache)]) == 0
    assert f"note: shards/{FIRST}.bad was moved aside by --repair: it is not read" in capsys.readouterr().out


def test_a_cache_without_shards_directory_is_one_sentence(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(cache / "shards")
    assert main([str(cache)]) == 6
    assert "shards: it cannot be listed (No such file or directory)" in capsys.readouterr().err


def damage_in_every_way(cache: Path) -> list[str]:
    """Damage five shards and the manifest, each in another way; return their names."""
    names = sorted(shard_files(cache))[:5]
    paths = [cache / "shards" / name for name in names]
    flipped(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    paths[2].write_bytes(paths[3].read_bytes())
    paths[3].unlink()
    os.mkfifo(paths[3])
    paths[4].unlink()
    paths[4].mkdir()
    return names


def test_repair_moves_damaged_shards_aside_and_generate_makes_just_them_again_byte_for_byte(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [story(n) for n in range(40)])
    config = run_config(make_teacher(tmp_path / "teacher"), data, tmp_path / "cache")
    generate(config)
    cache = tmp_path / "cache"
    shards, manifest = shard_files(cache), (cache / "manifest.json").read_bytes()
    assert verify_cache(cache, deep=True)["ok"] and len(shards) == 8
    names = damage_in_every_way(cache)
    kept = {name: (cache / "shards" / name).stat().st_mtime_ns for name in sorted(shards)[5:]}
    found = verify_cache(cache, repair=True)
    assert [problem["file"] for problem in found["problems"]] == [f"shards/{name}" for name in names]
    assert found["set_aside"] == [f"shards/{name} -> {name}.bad" for name in names]
    assert not (cache / "manifest.json").exists()
    assert sorted(os.listdir(cache / "shards")) == sorted([*kept, *(f"{name}.bad" for name in names)])
    assert verify_cache(cache, deep=True)["ok"]
    generate(config)
    assert {name: (cache / "shards" / name).read_bytes() for name in shards} == shards
    assert (cache / "manifest.json").read_bytes() == manifest
    assert {name: (cache / "shards" / name).stat().st_mtime_ns for name in kept} == kept
    assert all(os.path.lexists(cache / "shards" / f"{name}.bad") for name in names)


def test_it_needs_neither_torch_nor_transformers(cache: Path) -> None:
    code = f"import sys; from accel_distill.cli import main; status = main(['verify', {str(cache)!r}, '--deep']); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_a_line_says_how_far_it_is(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel_distill.verify.LINE_EVERY", 0.0)
    verify_cache(cache)
    assert "4 of 5 shards checked" in capsys.readouterr().err
