"""`accel-distill audit`: the teacher that made a cache is recognised, another one and shifted targets show at once."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_teacher, run_config, story, write_jsonl
from torch import Tensor
from transformers import dynamic_module_utils

from accel_distill.audit import MOST_IMPOSSIBLE, audit, choose, finding, main, start_of
from accel_distill.cache import TeacherCache
from accel_distill.codec import Method
from accel_distill.config import RunConfig, load_config, resolved_yaml
from accel_distill.errors import ConfigError
from accel_distill.generate import generate
from accel_distill.recomputed import IMPOSSIBLE, identical_positions, impossible_ids, moved_mass
from accel_distill.targets import SparseTargets
from accel_distill.teacher import Teacher

METHODS: dict[str, dict[str, Any]] = {
    "threshold": {"method": "threshold", "threshold": 0.05},
    "top_k": {"method": "top_k", "top_k": 16, "temperature": 2.0},
    "random": {"method": "random", "draws": 30, "temperature": 0.7},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit")
    make_teacher(path / "teacher")
    make_teacher(path / "other", seed=1)
    write_jsonl(path / "data.jsonl", [story(n) for n in range(40)])
    return path


@pytest.fixture(scope="module")
def cache(place: Path) -> Path:
    generate(run_config(place / "teacher", place / "data.jsonl", place / "cache"))
    return place / "cache"


def found(cache: Path, *overrides: str, samples: int = 12) -> dict[str, Any]:
    return audit(TeacherCache(cache), load_config(cache / "run.yaml", overrides), samples=samples, seed=0)


@pytest.mark.parametrize("long_documents", ["truncate", "split"])
@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_that_made_a_cache_makes_the_same_integers_again(
    method: str, long_documents: str, place: Path, tmp_path: Path
) -> None:
    dataset = {"long_documents": long_documents, "max_length": 10}
    generate(run_config(place / "teacher", place / "data.jsonl", tmp_path, targets=METHODS[method], dataset=dataset))
    figures = found(tmp_path, samples=1000)
    cached = TeacherCache(tmp_path)
    assert figures["samples"] == cached.has_target.sum() > 20
    assert figures["positions"] == sum(len(sample.targets) for sample in cached) > 100
    assert figures["identical_positions"] > 0.99
    assert figures["moved_mass"] < 0.005
    assert figures["top1_agreement"] > 0.999
    assert figures["logprob_difference"] < 2e-3 and figures["entropy_difference"] < 2e-3  # 1/256 nat a row
    assert abs(figures["kl"]) < 5 * figures["kl_standard_error"] + 2e-3
    assert (figures["impossible_ids"], figures["changed"], figures["finding"]) == (0, [], None)


def test_ids_that_top_k_keeps_are_not_too_improbable_however_sure_the_teacher_is(place: Path, tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher", spread=1.0)
    targets = {"method": "top_k", "top_k": 64, "temperature": 0.3}
    generate(run_config(tmp_path / "teacher", place / "data.jsonl", tmp_path / "cache", targets=targets))
    weights = torch.cat([sample.targets.entries()[2] for sample in TeacherCache(tmp_path / "cache")])
    assert (weights < IMPOSSIBLE).float().mean() > 10 * MOST_IMPOSSIBLE
    figures = found(tmp_path / "cache")
    assert (figures["impossible_ids"], figures["finding"]) == (0, None)


@pytest.mark.parametrize(
    ("method", "values", "count"),
    [
        ("top_k", [0, 4259], 1),  # 1/8, in steps of 1/2048 nat
        ("top_k", [0, 61440], 0),  # exp(-30), as it is
        ("threshold", [3, 1], 1),
        ("random", [3, 1], 1),
        ("random", [4, 0], 0),
    ],
)
def test_an_id_that_the_teacher_gives_no_chance_is_impossible_where_it_was_drawn_or_is_stored_as_probable(
    method: Method, values: list[int], count: int
) -> None:
    numbers = ([2], [0, 1], values, [0], [], [])
    arrays = (torch.tensor(array, dtype=torch.int64) for array in numbers)
    target = SparseTargets(method, {"top_k": 2, "threshold": 0.5, "random": 4}[method], *arrays)
    assert impossible_ids(torch.tensor([[0.0, -30.0, -30.0]]), target, temperature=1.0) == count


def test_the_command_says_so_and_returns_0(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(cache), "--samples", "5"]) == 0
    said = capsys.readouterr()
    assert "compared         5 samples" in said.out and "none: these targets are this teacher's" in said.out
    assert "error" not in said.err
    assert main([str(cache), "--samples", "5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["chosen"]) == figures["samples"] == 5


def test_another_teacher_is_exit_status_6_and_one_sentence(
    place: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cache), f"teacher.model={place / 'other'}"]) == 6
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the teacher is not the one that it was made from: teacher.files[" in error


def test_other_numbers_show_where_the_files_are_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a library that computes something else from the same weights."""
    real = Teacher.__init__

    def changed(self: Teacher, model: Any, **settings: Any) -> None:
        real(self, model, **settings)
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)

    monkeypatch.setattr(Teacher, "__init__", changed)
    figures = found(cache)
    assert figures["changed"] == [] and "the teacher says something else now" in figures["finding"]


@pytest.mark.parametrize(("by", "words"), [(-1, "position before"), (1, "next position")])
def test_targets_that_are_shifted_by_one_position_show_at_once(
    by: int, words: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "read", shifted(Teacher.read, by=by))
        generate(run_config(place / "teacher", place / "data.jsonl", tmp_path / "cache"))
    sentence = found(tmp_path / "cache")["finding"]
    assert f"its targets are shifted by one position: the teacher's top id is that of the {words}" in sentence
    assert main([str(tmp_path / "cache")]) == 6


def shifted(forward: Callable[..., Any], *, by: int) -> Callable[..., Any]:
    """Return a forward whose logits are those of the position `by` further on."""

    def wrong(self: Teacher, ids: Tensor, mask: Tensor, wanted: Tensor) -> Callable[[slice], Tensor]:
        logits_of, count = forward(self, ids, mask, wanted), int(wanted.sum())
        return lambda part: logits_of((torch.arange(count)[part] + by).clamp(0, count - 1))  # type: ignore[arg-type]

    return wrong


FINE = {
    "top1_agreement": 0.99,
    "top1_agreement_before": 0.1,
    "top1_agreement_after": 0.1,
    "impossible_ids": 0,
    "ids": 10_000,
    "kl": 0.001,
    "kl_standard_error": 0.002,
    "logprob_difference": 0.001,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"top1_agreement": 0.97, "kl": -0.01}, None),
        ({"impossible_ids": 10}, None),
        ({"impossible_ids": 11}, "11 of 10,000 ids should not be there"),
        ({"top1_agreement": 0.89}, "the teacher says something else now"),
        ({"kl": 0.04}, "KL 0.0400"),
        ({"kl": -0.04}, "KL -0.0400"),
        ({"kl": float("nan")}, "KL nan"),
        ({"logprob_difference": 0.021}, "log-probabilities differ by 0.0210"),
        ({"top1_agreement": 0.2, "top1_agreement_after": 0.9}, "shifted by one position"),
    ],
)
def test_what_is_found_is_one_sentence(changes: dict[str, float], words: str | None) -> None:
    said = finding({**FINE, **changes}, changes=[])
    assert said is None if words is None else words in (said or "")


def test_samples_are_spread_over_the_cache_and_depend_on_the_seed_alone(cache: Path) -> None:
    opened = TeacherCache(cache)
    chosen = choose(opened, samples=9, seed=1)
    assert chosen == choose(opened, samples=9, seed=1) != choose(opened, samples=9, seed=2)
    with_target = opened.has_target.nonzero()[0]
    assert [
        min(part) <= item <= max(part) for item, part in zip(chosen, torch.tensor(with_target).chunk(9), strict=True)
    ]
    assert len(set(chosen)) == 9 and chosen == sorted(chosen) and opened.has_target[chosen].all()
    assert sorted(choose(opened, samples=1000, seed=0)) == with_target.tolist()


def test_the_piece_of_a_split_document_starts_where_it_was_cut(place: Path, tmp_path: Path) -> None:
    dataset = {"long_documents": "split", "max_length": 8}
    generate(run_config(place / "teacher", place / "data.jsonl", tmp_path, dataset=dataset))
    opened = TeacherCache(tmp_path)
    ends: dict[int, int] = {}
    for item in range(len(opened)):
        sample = opened[item]
        start = start_of(opened, item)
        assert start == ends.get(sample.sample_index, 0)
        ends[sample.sample_index] = start + max(len(sample.input_ids) - 1, 0)
    assert max(ends.values()) > 8


def test_an_incomplete_cache_can_be_audited_and_one_without_run_file_needs_one(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    (copy / "manifest.json").unlink()
    assert main([str(copy), "--samples", "3"]) == 0
    run_file = (copy / "run.yaml").rename(tmp_path / "run.yaml")
    assert main([str(copy)]) == 2
    assert "run.yaml is not there, and says which teacher; name a run file with --config" in capsys.readouterr().err
    assert main([str(copy), "--samples", "3", "--config", str(run_file)]) == 0


def with_code(cache: Path, path: Path, *, model_type: str) -> Path:
    """Copy a cache, and let it bring a teacher with code, which its run file trusts."""
    shutil.copytree(cache, path)
    config = load_config(path / "run.yaml")
    teacher = shutil.copytree(config.teacher.model, path / "t")
    settings = json.loads((teacher / "config.json").read_text())
    settings |= {"model_type": model_type, "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}
    (teacher / "config.json").write_text(json.dumps(settings))
    (teacher / "configuration_evil.py").write_text(
        "from transformers import LlamaConfig\n"
        f"open({str(path / 'marker')!r}, 'w').close()\n"
        f"class EvilConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
    )
    own = config.teacher.model_copy(update={"model": str(teacher), "trust_remote_code": True})
    (path / "run.yaml").write_text(resolved_yaml(config.model_copy(update={"teacher": own})))
    return path


@pytest.mark.parametrize(
    ("model_type", "status", "words", "asked"),
    [
        ("llama", 6, "its teacher.trust_remote_code is ignored", ["teacher.trust_remote_code=true"]),
        (
            "evil",
            2,
            "brings code of its own, which does not run unasked; if you trust it, say",
            ["--config", "own.yaml"],
        ),
    ],
)
def test_code_that_a_cache_brings_runs_only_where_the_command_line_or_a_run_file_of_ones_own_says_so(
    model_type: str,
    status: int,
    words: str,
    asked: list[str],
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = with_code(cache, tmp_path / "cache", model_type=model_type)
    marker = path / "marker"
    shutil.copy(path / "run.yaml", tmp_path / "own.yaml")
    monkeypatch.chdir(tmp_path)
    for overrides in ([], ["teacher.trust_remote_code=false"]):
        assert main([str(path), "--samples", "2", *overrides]) == status  # another config.json, or none without code
        assert not marker.exists()
    assert words in caplog.text + capsys.readouterr().err
    main([str(path), "--samples", "2", *asked])
    assert marker.exists()


def test_code_beside_the_tokenizer_of_a_cache_does_not_run(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(cache, tmp_path / "cache")
    settings = json.loads((path / "tokenizer" / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "tokenizer" / "tokenization_evil.py").write_text(f"open({str(path / 'marker')!r}, 'w').close()\n")
    assert main([str(path), "--samples", "2"]) == 2
    assert "no tokenizer can be loaded" in capsys.readouterr().err
    assert not (path / "marker").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--samples", "0"], 2, "--samples 0: expected at least 1"),
        (["--samples", "many"], 2, "invalid int value"),
        (["teacher.model=/nowhere/model"], 2, "/nowhere/model is not a directory here"),
        (["teacher.modell=x"], 2, "did you mean 'model'"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], status: int, words: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cache), *arguments]) == status
    assert words in capsys.readouterr().err
    assert main([str(cache.parent / "nowhere")]) == 2


def test_a_teacher_of_another_width_is_refused(place: Path, cache: Path, tmp_path: Path) -> None:
    make_teacher(tmp_path / "wide", vocab=400)
    config: RunConfig = load_config(cache / "run.yaml", [f"teacher.model={tmp_path / 'wide'}"])
    assert "wide" in resolved_yaml(config)
    with pytest.raises(ConfigError, match="has an output layer of 400 ids, and the cache's teacher has 320"):
        audit(TeacherCache(cache), config, samples=2, seed=0)


def targets(
    counts: list[int], ids: list[int], values: list[int], tails: list[int], tail_ids: list[int]
) -> SparseTargets:
    arrays = (torch.tensor(numbers, dtype=torch.int64) for numbers in (counts, ids, values, tails, tail_ids, []))
    return SparseTargets("threshold", 0.5, *arrays)


def test_targets_are_compared_integer_by_integer_and_mass_by_mass() -> None:
    """Three positions of weights in quarters (M = 4): the second has another tail id, the third another weight."""
    first = targets([1, 1, 1], [5, 6, 7], [4, 3, 3], [0, 1, 1], [8, 9])
    second = targets([1, 1, 1], [5, 6, 7], [4, 3, 2], [0, 1, 1], [1, 9])
    assert first.scale == 4
    assert identical_positions(first, first) == 3 and moved_mass(first, first) == 0
    assert identical_positions(first, second) == 1
    assert moved_mass(first, second) == pytest.approx(0.25 + 0.25)
