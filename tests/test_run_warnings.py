"""Each rule speaks, with its figures, where it should, and is silent about a run that is in order."""

import math
from pathlib import Path
from typing import Any

import pytest
from made_run import IDENTITY, evaluated, logged, make_run

from accel_distill.run_directory import read_run
from accel_distill.run_warnings import beside_baseline, not_comparable, setting_differences, warnings


def rising() -> list[dict[str, Any]]:
    return [{"step": step, "loss": 2.0 + 0.01 * (step % 2) + (0.2 if step > 40 else 0)} for step in range(1, 51)]


def overfitted() -> list[dict[str, Any]]:
    return [{"step": step, **evaluated(kl=kl, ce=3.0)} for step, kl in ((10, 2.0), (20, 1.5), (30, 1.75))]


CACHE = {"cache_id": "c" * 64, "identity": IDENTITY, "samples": 500, "positions": 9_990, "nonfinite": 0}
ONLY_TOP_K = {**IDENTITY, "layout": {"ranks_sha256": "f"}, "targets": {"method": "top_k", "parameter": 64}}


def test_a_run_in_order_has_no_warning(tmp_path: Path) -> None:
    assert warnings(read_run(make_run(tmp_path / "run"))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": {"max_steps": 400}}, "Training stopped at step 100 of 400."),
        ({"state": {"log_history": [{"step": 7, "loss": math.nan}]}}, "At step 7 loss is nan: not finite."),
        ({"state": {"log_history": rising()}}, "The training loss rises at the end: 2.2050 on the mean of the last"),
        ({"state": {"log_history": overfitted()}}, "lowest at step 20 (1.5000) and is 1.7500 at the end"),
        ({"results": {"eval_positions": 900}}, "Only 50 samples with 900 positions were evaluated"),
        ({"record": {"cache": {**CACHE, "complete": False}}}, "not complete: it had 500 of 500 samples"),
        ({"record": {"cache": {**CACHE, "identity": ONLY_TOP_K}}}, "so KD and KL are lower bounds"),
        ({"record": {"cache": {**CACHE, "nonfinite": 10}}}, "10 positions (0.10%) were left out of the cache"),
        ({"record": {"full_logits": "its head is odd"}}, "costs memory, because its head is odd."),
    ],
)
def test_a_rule_speaks_with_its_figures(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = warnings(read_run(make_run(tmp_path / "run", **changes)))
    assert [sentence for sentence in found if said in sentence], found
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in found)


def test_agreement_on_few_positions_is_known_to_so_many_points(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", results={"eval_positions": 400, "eval_top1_agreement": 0.5}))
    assert "known to 4.9 points either way" in " ".join(warnings(run))  # 1.96 * sqrt(0.25 / 400)


def test_a_run_without_an_evaluation_says_so(tmp_path: Path) -> None:
    log = [line for line in logged() if "loss" in line]
    path = make_run(tmp_path / "run", state={"log_history": log})
    (path / "all_results.json").write_text('{"train_runtime": 3.0}')
    assert "Nothing was held out and evaluated" in warnings(read_run(path))[0]


def test_the_cache_as_it_is_now_adds_drift_and_growth(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run"))
    found = {"samples": 900, "drift": [{"shards": 3, "numerics": {"device": "cuda"}}], "nonfinite": 0, "positions": 9}
    drift, growth = warnings(run, cache=found)
    assert drift == "3 shards were made with other numeric settings: device cuda."
    assert growth == "The cache now has 900 samples; the run was trained when it had 500."


def test_a_student_that_is_not_better_than_the_baseline_is_told_so(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", kl=1.0, ce=3.1, results={"eval_ece": 0.05}))
    baseline = read_run(make_run(tmp_path / "ce", kl=0.9, ce=3.0))
    assert beside_baseline(run, baseline) == [
        "The KL to the teacher is 1.0000 nats and not below the baseline's 0.9000.",
        "The cross-entropy is 3.1000 nats and not below the baseline's 3.0000.",
        "The student is calibrated worse than the baseline: its expected calibration error is 5.00%, the baseline's "
        "2.00%.",
    ]
    assert beside_baseline(baseline, run) == []
    short = read_run(make_run(tmp_path / "short", kl=2.0, ce=4.0, state={"epoch": 0.16}))
    assert beside_baseline(baseline, short) == ["The run trained for 2 epochs, the baseline for 0.16."]


def trained_on(**changes: Any) -> dict[str, Any]:
    data = {"cache_id": "c" * 64, "samples": 500, "eval_samples": 50, **changes}
    return {"stateful_callbacks": {"CheckpointRecord": {"args": data}}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": trained_on(eval_samples=20)}, "50 and 20 samples were held out"),
        ({"state": trained_on(samples=700)}, "the cache had 500 and 700 samples"),
        ({"results": {"eval_positions": 30_000}}, "other positions were held out (20,000 and 30,000)"),
        (
            {"record": {"cache": {**CACHE, "cache_id": "e" * 64, "identity": ONLY_TOP_K}}},
            "they were trained from different caches (targets.method differs)",
        ),
        (
            {"record": {"cache": None}, "state": {"stateful_callbacks": {}}, "settings": {"teacher": {"model": "b"}}},
            "teacher.model is 'org/teacher' and 'b'",
        ),
    ],
)
def test_runs_on_other_data_are_not_comparable(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    first, other = read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", **changes))
    assert not_comparable([first, other]) == [f"a and b: {why}."]
    assert not_comparable([first, first]) == []


def test_only_settings_that_differ_are_listed_and_not_where_runs_write_to(tmp_path: Path) -> None:
    loss = {"divergence": "forward_kl", "kd_weight": 0.0, "ce_weight": 1.0}
    cache = {"path": str(tmp_path / "no-cache")}
    first = read_run(make_run(tmp_path / "a"))
    other = read_run(make_run(tmp_path / "b", settings={"loss": loss, "cache": cache, "extra": {"key": {}}}))
    assert setting_differences([first, other]) == [
        ("loss.kd_weight", [1.0, 0.0]),
        ("loss.ce_weight", [0.0, 1.0]),
        ("extra.key", [None, {}]),
    ]
