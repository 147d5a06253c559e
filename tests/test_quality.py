"""The quality experiment: what all methods share, its figures against plain references, its tables, and resuming."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.lm_head import LMHead
from bench import quality
from bench.quality_methods import (
    ARMS,
    CE_ONLY,
    DENSE,
    RANDOM,
    THRESHOLDS,
    draw,
    examine,
    losses_of,
    sample_blocks,
    weigh,
)
from bench.quality_report import paired, paired_table, plot, table, verdict
from bench.quality_teacher import Lesson, TaughtText, TeacherPlan, _divided, read_corpora
from bench.quality_training import Schedule, Shape, block_order, fit, pack

VOCAB, BLOCKS, BLOCK = 300, 6, 9
TOP_12 = next(arm for arm in ARMS if arm.name == "top-12 renormalised")
TINY = Shape(hidden_size=8, intermediate_size=16, layers=1, heads=2)


@pytest.fixture
def text() -> TaughtText:
    """Return random blocks and a random teacher that is sure of some tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (BLOCKS, BLOCK), generator=generator)
    hidden = torch.randn(BLOCKS, BLOCK - 1, 8, generator=generator)
    linear = torch.nn.Linear(8, VOCAB, bias=False)
    torch.nn.init.normal_(linear.weight, generator=generator)
    return TaughtText(ids, hidden, LMHead(linear.requires_grad_(False)), VOCAB)


def made_run(method: str, seed: int, kl: float, **changes: Any) -> dict[str, Any]:
    run = {"method": method, "seed": seed, "kl": kl, "ce": kl + 3, "top1_agreement": 0.5, "ece": 0.01}
    sizes = {"ids_per_position": 10.0, "bytes_per_position": 12.0, "input_ids_bytes_per_position": 1.0}
    return {**run, **sizes, "seconds": 1.0, **changes}


def made_runs(kls: dict[str, list[float]], ids: dict[str, float]) -> list[dict[str, Any]]:
    """Return runs of seeds 0, 1, ... with these KLs."""
    return [
        made_run(name, seed, kl, ids_per_position=ids.get(name)) for name in kls for seed, kl in enumerate(kls[name])
    ]


def test_blocks_are_dealt_in_whole_epochs_and_the_seed_decides_their_order() -> None:
    schedule = Schedule(steps=7, batch=2, learning_rate=1e-3)
    order = block_order(6, schedule, seed=3)
    assert order.shape == (7, 2)
    assert order.flatten()[:6].sort().values.tolist() == order.flatten()[6:12].sort().values.tolist() == [*range(6)]
    assert order.equal(block_order(6, schedule, seed=3))
    assert not order.equal(block_order(6, schedule, seed=4))


def test_every_method_of_a_seed_starts_with_the_same_weights_and_sees_the_same_blocks(
    text: TaughtText, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 1: []}

    def spy(model: torch.nn.Module, losses: Any, *, order: Tensor, **rest: Any) -> None:
        weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        seen[seed].append((weights, order))
        fit(model, losses, order=order, **rest)  # type: ignore[arg-type]
        assert not torch.cat([weight.detach().flatten() for weight in model.parameters()]).equal(weights)

    monkeypatch.setattr(quality, "fit", spy)
    for seed in seen:
        for arm in ARMS:
            quality.run_arm(arm, tiny_plan(), made_lesson(text), seed=seed)
    assert len(seen[0]) == len(ARMS) == 8
    for first, *others in seen.values():
        assert all(weights.equal(first[0]) and order.equal(first[1]) for weights, order in others)
    assert not seen[0][0][0].equal(seen[1][0][0])
    assert not seen[0][0][1].equal(seen[1][0][1])


def test_a_run_repeated_gives_the_same_figures(text: TaughtText) -> None:
    first, second = (quality.run_arm(THRESHOLDS[0], tiny_plan(), made_lesson(text), seed=5) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["kl"] > 0.1


def test_a_block_has_one_draw_whatever_else_is_drawn_with_it_and_in_whatever_batch(text: TaughtText) -> None:
    arm = THRESHOLDS[0]
    whole = draw(arm, text, torch.arange(BLOCKS), seed=1, at_once=4)
    alone = draw(arm, text, torch.tensor([5]), seed=1, at_once=1)
    again, single = whole.entries(torch.tensor([2, 5])), alone.entries(torch.tensor([5]))
    start = int(again[0][BLOCK - 1])
    assert (again[0][BLOCK - 1 :] - start).equal(single[0])
    assert again[1][start:].equal(single[1]) and again[2][start:].equal(single[2])
    other = draw(arm, text, torch.tensor([5]), seed=2, at_once=1).entries(torch.tensor([5]))
    assert not (other[1].shape == single[1].shape and other[1].equal(single[1]))


def test_renormalised_top_12_is_the_teacher_cut_to_its_12_largest_and_scaled_to_1(text: TaughtText) -> None:
    rows = torch.tensor([1, 4])
    logits = torch.randn(2 * (BLOCK - 1), VOCAB, generator=torch.Generator().manual_seed(2))
    found = losses_of(TOP_12, text, draw(TOP_12, text, rows, seed=0, at_once=1))(logits, rows)
    probabilities = text.teacher_logits(rows).double().softmax(-1)
    largest, ids = probabilities.topk(12)
    weights = torch.zeros_like(probabilities).scatter_(1, ids, largest / largest.sum(-1, keepdim=True))
    expected = (torch.xlogy(weights, weights) - weights * logits.double().log_softmax(-1)).sum(-1)
    assert largest.sum(-1).max() < 0.95  # so that renormalising matters
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)  # the cache's steps of 1/2048 nat


@pytest.mark.parametrize("arm", [RANDOM, THRESHOLDS[0]], ids=lambda arm: arm.name)
def test_the_gradient_of_a_drawn_target_has_the_dense_gradient_as_its_mean(arm: Any, text: TaughtText) -> None:
    rows, draws = torch.tensor([3]), 80
    logits = torch.zeros(BLOCK - 1, VOCAB, requires_grad=True)
    gradients = []
    for targets in (None, *(draw(arm, text, rows, seed=seed, at_once=1) for seed in range(draws))):
        losses = losses_of(DENSE if targets is None else arm, text, targets)
        (gradient,) = torch.autograd.grad(losses(logits, rows).sum(), logits)
        gradients.append(gradient)
    dense, drawn = gradients[0], torch.stack(gradients[1:])
    error, expected_error = (drawn.mean(0) - dense).square().sum(), drawn.var(dim=0).sum() / draws
    assert expected_error > 0
    assert error < 2 * expected_error  # a sum over 2,400 entries of their squared error: close to its expectation


def test_ids_per_position_are_counted_and_bytes_are_those_of_a_shard(text: TaughtText) -> None:
    size = weigh(RANDOM, text, at_once=4)
    targets = sample_blocks(RANDOM, text, torch.arange(BLOCKS), seed=0)
    drawn = sum(len(set(ids)) for ids in _ids_by_position(targets.entries()))
    assert size["ids_per_position"] == drawn / (BLOCKS * (BLOCK - 1))
    assert size["bytes_per_position"] * BLOCKS * (BLOCK - 1) > 4096  # a tiny text: mostly header
    assert size["input_ids_bytes_per_position"] > 0
    assert set(weigh(DENSE, text, at_once=4).values()) == {None}


def _ids_by_position(entries: tuple[Tensor, Tensor, Tensor]) -> Iterator[list[int]]:
    offsets, ids, _ = entries
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        yield ids[start:stop].tolist()


def test_the_examination_agrees_with_a_plain_reference(text: TaughtText) -> None:
    student = TINY.model(vocab_size=VOCAB, block=BLOCK, seed=0)
    found = examine(student, text, at_once=4)
    ce, kl, agreed, bins = [], [], [], {}
    for row in range(BLOCKS):
        q = student(text.ids[row : row + 1]).logits[0, :-1].double().log_softmax(-1).detach().numpy()
        p = text.teacher_logits(torch.tensor([row])).double().log_softmax(-1).numpy()
        for at in range(BLOCK - 1):
            label = int(text.ids[row, at + 1])
            ce.append(-q[at, label])
            kl.append(float((np.exp(p[at]) * (p[at] - q[at])).sum()))
            agreed.append(p[at].argmax() == q[at].argmax())
            confidence = float(np.exp(q[at].max()))
            bins.setdefault(int(confidence * 15), []).append(confidence - (q[at].argmax() == label))
    assert len(ce) == 48
    error = sum(abs(sum(values)) for values in bins.values()) / len(ce)
    expected = {"ce": np.mean(ce), "kl": np.mean(kl), "top1_agreement": np.mean(agreed), "ece": error}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_student_that_is_the_teacher_has_kl_zero() -> None:
    teacher = TINY.model(vocab_size=VOCAB, block=BLOCK, seed=0)
    ids = torch.randint(0, VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(0))
    hidden = teacher.base_model(input_ids=ids)[0][:, :-1].detach()
    found = examine(teacher, TaughtText(ids, hidden, LMHead(teacher.lm_head), VOCAB), at_once=2)
    assert abs(found["kl"]) < 1e-6 and found["top1_agreement"] == 1


def test_dense_training_lowers_the_kl_to_the_teacher(text: TaughtText) -> None:
    plan = replace(tiny_plan(), schedule=Schedule(steps=60, batch=3, learning_rate=3e-2))
    before = examine(TINY.model(vocab_size=VOCAB, block=BLOCK, seed=0), text, at_once=6)["kl"]
    assert quality.run_arm(DENSE, plan, made_lesson(text), seed=0)["kl"] < 0.7 * before


def test_a_text_with_no_start_of_its_own_ends_with_its_end_in_the_blocks() -> None:
    class Words:
        bos_token_id, eos_token_id = 0, 1

        def __init__(self, starts: list[int]) -> None:
            self.starts = starts

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            return {"input_ids": [self.starts + [len(word) for word in text.split()] for text in texts]}

    texts = ["aa bbb", "cccc"]
    assert pack(texts, Words([0]), block=2).tolist() == [[0, 2], [3, 0]]  # type: ignore[arg-type]
    assert pack(texts, Words([]), block=2).tolist() == [[2, 3], [1, 4]]  # type: ignore[arg-type]


def test_every_twentieth_document_is_held_out() -> None:
    train, held_out = _divided([str(i) for i in range(45)])
    assert held_out == ["0", "20", "40"] and len(train) == 42


def test_differences_are_taken_within_a_seed() -> None:
    runs = made_runs({DENSE.name: [1.0, 2.0, 3.0], RANDOM.name: [1.1, 2.1, 3.4]}, {RANDOM.name: 20.0})
    assert "+0.2000 (+0.1000 .. +0.4000)" in paired_table(runs)
    assert "2.2000 (1.1000 .. 3.4000)" in table(runs)
    assert [(a["seed"], b["kl"]) for a, b in paired(runs[1:], RANDOM.name, DENSE.name)] == [(1, 2.0), (2, 3.0)]


def test_the_table_has_a_line_for_each_method_in_order_and_a_dash_where_nothing_is_stored() -> None:
    kls = {THRESHOLDS[0].name: [1.5], CE_ONLY.name: [2.0], DENSE.name: [1.0]}
    runs = made_runs(kls, {THRESHOLDS[0].name: 10.0})
    for run in runs[1:]:
        run["bytes_per_position"] = None
    header, *lines = table(runs).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["CE only", "dense KD", "threshold 0.06"]
    assert lines[0].split()[3:5] == ["-", "-"] and lines[2].split()[3:5] == ["10.00", "12.00"]
    assert "KL to teacher" in header


@pytest.mark.parametrize(
    ("threshold_kls", "said"),
    [([1.01, 1.03], "YES: threshold 0.03."), ([1.09, 1.2], "NO, none of them.")],
)
def test_the_verdict_follows_the_figures(threshold_kls: list[float], said: str) -> None:
    kls = {DENSE.name: [1.0, 1.0], RANDOM.name: [1.02, 1.05], "threshold 0.03": threshold_kls, "threshold 0.02": [1, 1]}
    ids = {RANDOM.name: 20.0, "threshold 0.03": 19.0, "threshold 0.02": 40.0}
    answer = verdict(made_runs(kls, ids))
    for key in ("KL", "CE"):
        assert f"in {key}, on the mean? {said}" in answer
    assert "threshold 0.02" not in answer  # it has more ids
    assert ("nearer in 2 of 2 seeds" if said.startswith("YES") else "nearer in 0 of 2 seeds") in answer


def test_there_is_no_verdict_without_random() -> None:
    assert verdict(made_runs({DENSE.name: [1.0]}, {})).startswith("No verdict")


def test_the_plot_is_a_png_with_every_method(tmp_path: Path) -> None:
    ids = {arm.name: 10.0 for arm in ARMS if arm.method}
    runs = made_runs({arm.name: [1.0 + at / 10, 1.1 + at / 10] for at, arm in enumerate(ARMS)}, ids)
    for run in runs:
        run["bytes_per_position"] = run["ids_per_position"] and 12.0
    plot(runs, tmp_path / "q.png", title="made up")
    assert (tmp_path / "q.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_finished_runs_are_not_repeated_and_those_of_other_settings_are_refused(
    text: TaughtText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int]] = []

    def run_arm(arm: Any, plan: Any, lesson: Any, *, seed: int) -> dict[str, Any]:
        if len(calls) == 11:
            raise KeyboardInterrupt
        calls.append((arm.name, seed))
        return made_run(arm.name, seed, 1.0 + len(calls))

    monkeypatch.setattr(quality, "run_arm", run_arm)
    monkeypatch.setattr(quality, "prepare", lambda *args, **kwargs: made_lesson(text))
    path = tmp_path / "q.json"
    places: dict[str, Any] = {"data": tmp_path, "work": tmp_path, "json_path": path, "plot_path": None}
    with pytest.raises(KeyboardInterrupt):
        quality.experiment(tiny_plan(), seeds=range(2), **places)
    assert len(json.loads(path.read_text())["runs"]) == 11
    interrupted, calls = calls, []
    runs = quality.experiment(tiny_plan(), seeds=range(2), **places)
    assert len(interrupted) == 11 and len(calls) == 5 and not set(calls) & set(interrupted)
    assert [(run["method"], run["seed"]) for run in runs] == [(arm.name, seed) for seed in (0, 1) for arm in ARMS]
    assert json.loads(path.read_text())["runs"] == runs
    assert table(runs) in capsys.readouterr().out
    other = replace(tiny_plan(), schedule=Schedule(steps=9, batch=2, learning_rate=1e-2))
    with pytest.raises(CacheMismatch, match=r"q\.json: .*schedule = .*'steps': 3"):
        quality.experiment(other, seeds=range(2), **places)


def test_the_small_real_teacher_is_read_and_teaches(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = read_corpora(("stories",), data=shared_data)
    monkeypatch.setattr("bench.quality_teacher.read_corpora", lambda *_, **__: (documents[0][:40], documents[1][:5]))
    small = Schedule(steps=2, batch=1, learning_rate=1e-3)
    monkeypatch.setitem(quality.PRESETS, "cpu", replace(quality.PRESETS["cpu"], schedule=small))
    monkeypatch.setattr(quality, "ARMS", (CE_ONLY, THRESHOLDS[0]))
    words = ["--teacher", "stories260K", "--seeds", "1", "--data", str(shared_data), "--work", str(tmp_path)]
    assert quality.main([*words, "--json", str(tmp_path / "q.json"), "--plot", str(tmp_path / "q.png")]) == 0
    printed = capsys.readouterr().out
    assert "Teacher: 260,032 parameters, vocabulary 512" in printed
    runs = json.loads((tmp_path / "q.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["CE only", "threshold 0.06"]
    assert 1 < runs[1]["ids_per_position"] < 12  # at most 1 / 0.06 heads, and the teacher is sure of most words
    assert (tmp_path / "q.png").stat().st_size > 1000


def test_the_gpu_preset_runs_at_another_size_and_keeps_its_teacher(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = quality.PRESETS["gpu"]
    teacher = replace(preset.teacher, shape=TINY, schedule=Schedule(steps=1, batch=2, learning_rate=1e-3))
    schedule = Schedule(steps=2, batch=3, learning_rate=1e-3)
    plan = replace(preset, teacher=teacher, student=TINY, schedule=schedule, block=32, blocks_at_once=2)
    monkeypatch.setattr("bench.quality_teacher.read_corpora", few_documents)
    monkeypatch.setattr(quality, "ARMS", (DENSE, RANDOM))
    places: dict[str, Any] = {"data": shared_data, "work": tmp_path, "json_path": None, "plot_path": None}
    first = quality.experiment(plan, seeds=[0], **places)
    weights = sorted(tmp_path.glob("teacher-*/model.safetensors"))
    written = weights[0].stat().st_mtime_ns
    second = quality.experiment(plan, seeds=[0], **places)
    assert len(weights) == 1 and weights[0].stat().st_mtime_ns == written
    assert [{**run, "seconds": 0} for run in first] == [{**run, "seconds": 0} for run in second]
    assert first[1]["ids_per_position"] > 20  # nearly flat over 50,257 ids


def few_documents(names: tuple[str, ...], *, data: Path) -> tuple[list[str], list[str]]:
    """Stand for the corpora of the preset, of which it must name the three."""
    assert names == ("books", "stories", "python")
    documents = [f"In the year {1800 + n} a ship of {n} men went out to sea and was not seen again." for n in range(20)]
    return documents[:16], documents[16:]


def test_all_corpora_are_read(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.quality_teacher.python_documents", lambda: ["def"] * 40)
    train, held_out = read_corpora(("books", "stories", "python"), data=shared_data)
    assert len(train) == 3592 - 180 + 2115 + 38 and len(held_out) == 180 + 200 + 2


def test_data_that_are_not_there_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quality.main(["--data", str(tmp_path)]) == ConfigError.exit_status
    assert "tinystories_train.jsonl is not there; name the directory of the data with --data" in capsys.readouterr().err


def test_an_unfinished_teacher_is_not_taken_for_one(text: TaughtText, tmp_path: Path) -> None:
    from bench import quality_teacher

    plan = TeacherPlan(("stories",), None, None, TINY, Schedule(steps=1, batch=1, learning_rate=1e-3))
    arguments: dict[str, Any] = {"data": tmp_path, "work": tmp_path, "vocab_size": VOCAB, "at_once": 1}
    quality_teacher._teacher(plan, text.ids, device=torch.device("cpu"), **arguments)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / f"{path.name}.half")
    quality_teacher._teacher(plan, text.ids, device=torch.device("cpu"), **arguments)
    assert path.is_dir()


def made_lesson(text: TaughtText) -> Any:
    return Lesson(text, text, 1, "identity")


def tiny_plan() -> quality.Plan:
    """Return a plan that takes a moment."""
    teacher = TeacherPlan(("stories",), None, "models/none")
    return quality.Plan(teacher, TINY, Schedule(steps=3, batch=2, learning_rate=1e-2), BLOCK, blocks_at_once=2)
