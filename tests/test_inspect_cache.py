"""`accel-distill inspect` on a real small cache: the figures are those of the files."""

import json
import shutil
import subprocess
import sys

import pytest
from tiny import make_teacher, run_config, story, write_jsonl

from accel_distill.cache import TeacherCache
from accel_distill.generate import generate
from accel_distill.inspect_cache import inspect_cache, main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect")
    data = write_jsonl(path / "data.jsonl", [story(n) for n in range(40)])
    generate(run_config(make_teacher(path / "teacher"), data, path / "cache"))
    return path / "cache"


def test_the_figures_are_those_of_the_files_and_of_the_samples(cache):
    found, samples = inspect_cache(cache), list(TeacherCache(cache))
    assert found["complete"] and found["samples"] == len(samples) == 30
    assert found["positions"] == sum(len(sample.targets) for sample in samples) > 0
    assert found["tokens"] == sum(len(sample.input_ids) for sample in samples)
    assert found["shards"] == len(list((cache / "shards").iterdir())) == 8
    assert found["bytes"] == sum(path.stat().st_size for path in (cache / "shards").iterdir())
    assert found["bytes_per_position"] == found["bytes"] / found["positions"]
    ids = sum(len(sample.targets.entries()[1]) for sample in samples)
    assert found["ids_per_position"] == ids / found["positions"]
    assert (found["method"], found["vocab_size"], found["lanes"]) == ("threshold", 320, 2)
    assert found["identity"] == TeacherCache(cache).identity


def test_json_and_text_are_printed_without_torch(cache):
    code = f"import sys; from accel_distill.cli import main; main(['inspect', {str(cache)!r}, '--json']); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["complete"] is True


def test_the_text_says_what_the_cache_is(cache, capsys):
    assert main([str(cache)]) == 0
    text = capsys.readouterr().out
    assert "(complete)" in text and "threshold 0.05" in text and "30 (" in text


def test_an_incomplete_cache_is_shown_as_what_it_is(cache, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    (copy / "manifest.json").unlink()
    (copy / "shards" / "shard-000000-001-4.h5").unlink()
    found = inspect_cache(copy)
    assert not found["complete"] and found["shards"] == 7 and found["samples"] == 26
    assert main([str(copy)]) == 0
    assert "NOT complete" in capsys.readouterr().out


def test_what_is_no_cache_is_one_sentence_and_exit_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "is not a directory" in errors[0] and "no cache.json" in errors[1]


def test_a_complete_cache_without_one_of_its_shards_is_damaged(cache, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    (copy / "shards" / "shard-000001-001-4.h5").unlink()
    assert main([str(copy)]) == 6
    assert "1 of 8 shards are gone (the first: group 1, lane 1)" in capsys.readouterr().err
