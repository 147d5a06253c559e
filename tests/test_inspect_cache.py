"""`accel-distill inspect` on a real small cache: the figures are those of the files."""

import json
import os
import re
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
    assert "of its 8 shards 1 cannot be found, the first is shard-000001-001-4.h5" in capsys.readouterr().err


def test_a_damaged_shard_is_an_error_instead_of_figures(cache, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    shard = copy / "shards" / "shard-000001-001-4.h5"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main([str(copy)]) == 6
    said = capsys.readouterr()
    assert "shard-000001-001-4.h5" in said.err and said.out == ""


def test_the_distributions_are_those_of_the_samples(cache):
    found, samples = inspect_cache(cache)["distributions"], list(TeacherCache(cache))
    heads = [count for sample in samples for count in sample.targets.head_count.tolist()]
    tails = [count for sample in samples for count in sample.targets.tail_count.tolist()]
    scale = samples[0].targets.scale
    mass = sum(int(sample.targets.head_values.sum()) for sample in samples) / scale / len(heads)
    entropies = [sample.teacher_entropy / len(sample.targets) for sample in samples if len(sample.targets)]
    assert found["of_shards"] == 8
    assert found["head_ids"]["mean"] == pytest.approx(sum(heads) / len(heads))
    assert found["tail_ids"]["mean"] == pytest.approx(sum(tails) / len(tails)) and sum(tails) > 0
    assert found["head_mass"]["mean"] == pytest.approx(mass) and 0 < mass < 1
    assert found["entropy"]["mean"] == pytest.approx(sum(entropies) / len(entropies))
    assert found["tokens"]["mean"] == pytest.approx(sum(len(sample.input_ids) for sample in samples) / 30)
    for name in ("head_ids", "tail_ids", "head_mass"):
        assert sum(found[name]["counts"]) == len(heads)
    assert found["head_ids"]["edges"][-1] == max(heads)


def test_the_bytes_of_the_columns_and_what_files_take_beside_them_are_all_bytes(cache):
    found = inspect_cache(cache)
    assert set(found["bytes_by_column"]) > {"head_ids", "head_ids_bits", "input_ids", "row_tokens"}
    rest = found["bytes"] - sum(found["bytes_by_column"].values())
    assert 8 * 4096 < rest < 8 * 20_000  # headers and HDF5's own bookkeeping in 8 shards


def test_the_text_shows_histograms_also_where_the_terminal_has_no_block_characters(cache):
    def run(encoding):
        code = f"from accel_distill.cli import main; raise SystemExit(main(['inspect', {str(cache)!r}]))"
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment).stdout

    text = run("utf-8").decode()
    assert "█" in text and re.search(r"mass of the head +0\.\d\d  [ ▁▂▃▄▅▆▇█]{12}  0 to 1", text)
    assert re.search(r"bytes a position: ids \d+\.\d\d, weights \d+\.\d\d, input_ids \d+\.\d\d, all else \d+", text)
    assert "#" in run("ascii").decode("ascii")
