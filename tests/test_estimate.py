"""`accel-distill estimate`: what it says beforehand, and what the run then takes."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_teacher, make_tokenizer, run_config, write_jsonl

from accel_distill import estimate as command
from accel_distill.config import RunConfig
from accel_distill.errors import NotFinite
from accel_distill.estimate import estimate, main
from accel_distill.estimate_table import as_text
from accel_distill.generate import generate
from accel_distill.inspect_cache import inspect_cache
from accel_distill.length_sample import LengthSample
from accel_distill.probe import _encoder, padding, part_of
from accel_distill.run_file import to_yaml
from accel_distill.stream import OpenShard
from accel_distill.targets import concatenate
from accel_distill.teacher import Teacher, load_teacher

CHOICE = random.Random(0)
LEXICON = ["".join(CHOICE.choices("abcdefghijklmnopqrstuvwxyz", k=CHOICE.randint(1, 5))) for _ in range(2000)]
TEXTS = [" ".join(CHOICE.choices(LEXICON, k=CHOICE.randint(1, 30))) for _ in range(500)]  # no two are alike
MAX_LENGTH = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimate")
    make_teacher(path / "teacher", spread=0.6)
    write_jsonl(path / "data.jsonl", TEXTS)
    return path


@pytest.fixture
def config(place: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function from changes to a run with a cache of its own."""
    sections = {
        "dataset": {"max_samples": 500, "max_length": MAX_LENGTH},
        "cache": {"samples_per_shard": 50, "lanes": 2},
        "teacher": {"tokens_per_batch": 1024},
    }

    def run(**changes: dict[str, Any]) -> RunConfig:
        merged = {name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
        return run_config(place / "teacher", place / "data.jsonl", tmp_path / "cache", **merged)

    return run


def all_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def check_against_the_run(found: dict[str, Any], config: RunConfig) -> None:
    """Make the cache, and compare."""
    generate(config)
    total, true = found["total_bytes"], all_bytes(config.cache.path)
    assert total["low"] <= true <= total["high"]
    all_counted = found["counted_samples"] == found["samples"]
    assert total["mid"] == pytest.approx(true, rel=0.05 if all_counted else 0.1)
    assert total["high"] / total["low"] < 1.5  # an interval that says something
    made = inspect_cache(config.cache.path)
    assert (found["samples"], found["shards"]) == (made["samples"], made["shards"])
    assert found["bytes_per_position"] == pytest.approx(made["bytes_per_position"], rel=0.05)
    if all_counted:
        assert (found["tokens"], found["positions"]) == (made["tokens"], made["positions"])
    assert found["tokens"] == pytest.approx(made["tokens"], rel=0.1)


@pytest.mark.parametrize(
    "targets",
    [{"threshold": 0.05}, {"method": "random", "draws": 20}, {"method": "top_k", "top_k": 8}],
    ids=["threshold", "random", "top_k"],
)
def test_the_true_size_is_inside_the_interval_and_near_its_middle(
    targets: dict[str, Any], config: Callable[..., RunConfig]
) -> None:
    run = config(targets=targets)
    found = estimate(run, probe=64, processes=1)
    assert (found["verdict"], found["counted_samples"], found["probed_samples"]) == ("fits", 500, 64)
    check_against_the_run(found, run)


def test_a_part_of_the_lengths_tells_the_size_within_its_interval(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "COUNTED", 200)
    run = config()
    found = estimate(run, probe=40, processes=2)
    length = found["tokens_per_sample"]
    assert length["low"] < length["mid"] < length["high"]
    assert (found["counted_samples"], found["read_samples"], found["probed_samples"]) == (200, 500, 40)
    check_against_the_run(found, run)


def test_the_other_targets_are_what_a_run_with_them_would_say(config: Callable[..., RunConfig]) -> None:
    found = {
        (one["method"], one["parameter"]): one for one in estimate(config(), probe=64, processes=1)["alternatives"]
    }
    assert list(found) == [("threshold", 0.06), ("threshold", 0.03), ("threshold", 0.02), ("random", 50), ("top_k", 64)]
    for targets in ({"threshold": 0.02}, {"method": "top_k", "top_k": 64}):
        run = config(targets=targets)
        own = estimate(run, probe=64, processes=1)
        other = found[run.targets.method, run.targets.parameter]
        assert other["total_bytes"]["mid"] == pytest.approx(own["total_bytes"]["mid"], rel=0.05)
        same = next(one for one in own["alternatives"] if one["parameter"] == run.targets.parameter)
        assert same["total_bytes"] == own["total_bytes"]


@pytest.mark.slow
def test_a_real_teacher_on_real_text(shared_data: Path, tmp_path: Path) -> None:
    dataset = {"max_samples": 200, "max_length": 512}
    data = shared_data / "text" / "tinystories_valid.jsonl"
    sections: dict[str, Any] = {"dataset": dataset, "cache": {"samples_per_shard": 100}, "targets": {"threshold": 0.03}}
    sections["teacher"] = {"tokens_per_batch": 16_384, "head_chunk": 256}
    run = run_config(shared_data / "models" / "stories260K", data, tmp_path / "cache", **sections)
    found = estimate(run, probe=32, processes=1)
    check_against_the_run(found, run)
    assert 7 < found["bytes_per_position"] < 14


def test_without_a_teacher_the_size_is_inside_a_wide_interval(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_probe", None)
    run = config()
    found = estimate(run, probe=None, processes=1)
    assert found["seconds"] is None and found["probed_samples"] == 0
    assert any("--positions-per-second" in sentence for sentence in found["assumptions"])
    timed = estimate(run, probe=None, processes=1, positions_per_second=100.0)
    assert timed["seconds"]["mid"] == pytest.approx(found["positions"] / 100, rel=0.05)
    generate(run)
    assert found["total_bytes"]["low"] < all_bytes(run.cache.path) < found["total_bytes"]["high"]


def test_a_run_that_does_not_fit_has_status_3_and_the_largest_that_does_fits(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config(cache={"max_bytes": "200KB"}).model_dump(mode="json")))
    arguments = ["--config", str(path), "--no-teacher", "--json"]
    assert main(arguments) == 3
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert {"samples", "tokens", "bytes_per_position", "total_bytes", "seconds", "free_bytes", "verdict"} <= set(found)
    assert found["verdict"] == "does not fit" and "there is room for 200 kB" in said.err
    largest = found["largest_max_samples"]
    assert 20 < largest < 500
    # the lengths of other samples are taken for those of the first ones, so a little less fits for certain
    assert main([*arguments, f"dataset.max_samples={int(0.9 * largest)}"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "fits"


def test_a_cache_that_is_there_needs_no_more_room(config: Callable[..., RunConfig]) -> None:
    run = config(dataset={"max_samples": 100})
    generate(run)
    full = {"max_bytes": all_bytes(run.cache.path) + 1000}
    found = estimate(config(dataset={"max_samples": 100}, cache=full), probe=8, processes=1)
    assert found["cache_bytes_now"] == all_bytes(run.cache.path)
    assert found["verdict"] in ("fits", "tight") or found["total_bytes"]["mid"] > found["max_bytes"]
    larger = estimate(config(dataset={"max_samples": 500}, cache=full), probe=8, processes=1)
    assert larger["verdict"] == "does not fit" and "raise cache.max_bytes" in larger["advice"]
    less = estimate(config(dataset={"max_samples": 500}, cache={"max_bytes": "100KB"}), probe=8, processes=1)
    assert less["verdict"] == "does not fit" and less["largest_max_samples"] is None  # a cache does not shrink
    assert "bytes and time are those of the whole cache, also of what is there already" in larger["assumptions"]


def test_texts_that_are_all_empty_have_no_bytes_per_position(place: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [""] * 40)
    run = run_config(place / "teacher", data, tmp_path / "cache")
    found = estimate(run, probe=8, processes=1)
    assert (found["positions"], found["bytes_per_position"]) == (0, None)
    assert "40" not in as_text(found).splitlines()[1]  # max_samples is 30
    generate(run)
    assert found["total_bytes"]["mid"] == pytest.approx(all_bytes(run.cache.path), rel=0.05)


def test_logits_that_are_not_finite_are_found_before_the_run(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Teacher.read

    def spoiled(self: Teacher, *inputs: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        logits_of = forward(self, *inputs)
        return lambda part: logits_of(part) * float("nan")

    monkeypatch.setattr(Teacher, "read", spoiled)
    with pytest.raises(NotFinite, match="in a shard of 8 samples of the estimate, numbered from 0: .* not finite"):
        estimate(config(), probe=8, processes=1)


def test_the_table_says_what_json_says(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config().model_dump(mode="json")))
    assert main(["--config", str(path), "--probe", "8", "--processes", "2", "cache.max_bytes=9GB"]) == 0
    printed = capsys.readouterr().out
    for words in ("samples   500, of ", "measured  8 samples, ", "cache.max_bytes 9.00 GB", "with 2 processes"):
        assert words in printed
    assert "\nverdict   fits\n" in printed
    assert printed.count("\n  threshold ") == 3 and "\n  top_k 64 " in printed
    assert "assumed: 2 processes on the " in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config FILE is missing"),
        (["--config", "run.yaml", "--probe", "0"], "--probe 0: expected more than 0"),
        (["--config", "run.yaml", "--processes", "-1"], "--processes -1: expected more than 0"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_part_of_a_shard_is_the_shard_of_these_samples(config: Callable[..., RunConfig]) -> None:
    run = config(dataset={"long_documents": "split"})
    teacher = load_teacher(run.teacher, device=torch.device("cpu"), valid_ids=300)
    encoder = _encoder(run, "top_k", 4, teacher, make_tokenizer(), np.ones(320, np.int64))  # no sampling, so no seeds
    maker = encoder.maker
    texts = [*TEXTS[:12], ""]
    content = maker.compute(OpenShard(0, 0, texts))
    assert len(content.rows) > len(texts)  # some document is split
    wanted = [1, 4, 7, 12]
    part = part_of(content, wanted)
    alone = maker.compute(OpenShard(0, 0, [texts[n] for n in wanted]))
    assert part.shard == alone.shard and len(part.rows) == len(alone.rows)
    for mine, theirs in zip(part.rows, alone.rows, strict=True):
        assert mine.ids.tolist() == theirs.ids.tolist() and wanted[theirs.sample_index] == mine.sample_index
    assert torch.equal(part.targets.head_ids, alone.targets.head_ids) and len(part.targets) > 50
    np.testing.assert_allclose(part.entropy, alone.entropy, atol=1e-4)
    assert len(part_of(content, []).targets) == 0


def test_positions_left_out_stay_left_out_of_a_part(config: Callable[..., RunConfig]) -> None:
    run = config()
    teacher = load_teacher(run.teacher, device=torch.device("cpu"), valid_ids=300)
    encoder = _encoder(run, "top_k", 4, teacher, make_tokenizer(), np.ones(320, np.int64))
    content = encoder.maker.compute(OpenShard(0, 0, TEXTS[:4]))
    counts = [max(len(row.ids) - 1, 0) for row in content.rows]
    assert min(counts[:3]) > 3
    kept = content.targets.position_slice(0, counts[0]), content.targets.position_slice(counts[0] + 2, sum(counts))
    fewer = dataclasses.replace(content, targets=concatenate(kept), left_out={1: np.array([0, 1])})
    part = part_of(fewer, [1, 2])
    assert len(part.targets) == counts[1] - 2 + counts[2] and part.left_out[0].tolist() == [0, 1]
    whole = part_of(content, [1, 2])
    assert torch.equal(part.targets.head_ids, whole.targets.head_ids[2 * 4 :])  # four ids a position
    assert encoder.encode(part).columns < encoder.encode(whole).columns


def test_padding_is_that_of_full_batches() -> None:
    # 8 rows of 3 to 10 tokens in batches of at most 20 padded tokens: 3 4 5 | 6 7 | 8 9 | 10
    rows = [[10], [3], [4], [9], [5], [8], [7], [6]]
    lengths = LengthSample([""] * 8, rows, np.zeros(1), 8, 8, 0.0, 0.0)
    assert padding(lengths, samples_per_shard=8, tokens_per_batch=20) == (15 + 14 + 18 + 10) / (52 - 8)
    assert padding(lengths, samples_per_shard=2, tokens_per_batch=20) == 20 / 11  # 10 and 3 in one batch
