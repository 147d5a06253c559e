"""Reading what training left: all of it, some of it, and what is no run."""

import json
import math
from pathlib import Path

import pytest
from made_run import POSITIONS, make_run

from accel_distill.errors import ConfigError
from accel_distill.run_directory import calibration_bins, number, read_run, section, unique_names


def test_a_run_says_its_figures_its_curves_and_what_it_was_trained_on(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", kl=1.25))
    assert (run.name, run.step, run.missing) == ("run", 100, ())
    assert run.number("eval_kl") == 1.25 and run.number("train_runtime") == 90
    steps, values = run.series("eval_kl")
    assert steps == [20, 40, 60, 80, 100] and values == sorted(values, reverse=True)
    assert run.positions_seen == (list(range(5, 101, 5)), [POSITIONS * n for n in range(1, 21)])
    assert run.cache_id == "c" * 64 and run.trained_on["eval_samples"] == 50
    assert run.identity["targets"]["parameter"] == 0.03


def test_of_two_values_at_one_step_the_last_counts(tmp_path: Path) -> None:
    log = [{"step": 1, "kl": 3.0}, {"step": 2, "kl": 2.0}, {"step": 2, "kl": 1.5}, {"step": 3, "kl": "?"}, {"kl": 9.0}]
    run = read_run(make_run(tmp_path / "run", state={"log_history": log}))
    assert run.series("kl") == ([1, 2], [3.0, 1.5])


def test_a_run_of_an_older_version_is_read_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", results={"eval_kl": 7.0})
    for name in ("run_record.json", "all_results.json", "run.yaml"):
        (path / name).unlink()
    run = read_run(path)
    assert run.number("eval_kl") == pytest.approx(1.0, abs=0.1)  # the log's last one
    assert (run.settings, run.record, calibration_bins(run)) == ({}, {}, [])
    assert run.cache_id == "c" * 64  # the checkpoints' record has it too
    assert [name for name in ("run_record", "all_results", "run.yaml") if any(name in s for s in run.missing)] == [
        "run_record",
        "all_results",
        "run.yaml",
    ]


def test_a_run_that_has_not_ended_is_read_from_its_last_checkpoint(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    state = (path / "trainer_state.json").read_text()
    (path / "trainer_state.json").unlink()
    for step in (9, 10):
        (path / f"checkpoint-{step}").mkdir()
        (path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    (path / "checkpoint-10" / "trainer_state.json").write_text(state)
    run = read_run(path)
    assert run.step == 100
    assert "last checkpoint, at step 10." in run.missing[0]


def test_bins_that_are_not_three_lists_of_one_length_are_not_known(tmp_path: Path) -> None:
    assert calibration_bins(read_run(make_run(tmp_path / "a"))) == [(10_000, 0.2, 0.25), (0, 0, 0), (10_000, 0.9, 0.85)]
    wrong = {"positions": [1, 2], "confidence": [0.5], "accuracy": [0.5, 0.1]}
    others = [{"positions": [5], "confidence": [0.5], "accuracy": [value]} for value in (None, "0.5")]
    for number_, bins in enumerate((wrong, [], {"positions": [0], "confidence": [0.0], "accuracy": [0.0]}, *others)):
        run = read_run(make_run(tmp_path / str(number_), results={"eval_calibration": bins}))
        assert calibration_bins(run) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("trainer_state.json", "{", "trainer_state.json: it cannot be read (it is not JSON"),
        ("trainer_state.json", "[]", "it holds list, expected an object"),
        ("trainer_state.json", '{"log_history": [1]}', "its 'log_history' is no list of objects"),
        ("trainer_state.json", "{}", "its 'log_history' is no list of objects"),
        ("all_results.json", "<html>", "all_results.json: it cannot be read (it is a web page"),
        ("run_record.json", "nothing", "run_record.json: it cannot be read (it is not JSON"),
        ("run.yaml", "a: [", "run.yaml, line"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = make_run(tmp_path / "run")
    (path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_run(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: it is not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="it holds no trainer_state.json"):
        read_run(tmp_path)


def test_names_are_as_short_as_they_can_be_and_never_the_same() -> None:
    paths = [Path("/a/one/run"), Path("/b/one/run"), Path("/b/two"), Path("/b/two")]
    assert unique_names(paths) == ["a/one/run", "b/one/run", "two", "two (2)"]
    assert unique_names([Path("/x/kd"), Path("/x/ce")]) == ["kd", "ce"]


def test_values_of_another_kind_are_no_numbers_and_no_sections() -> None:
    values = {"a": {"b": 3}, "flag": True, "text": "5", "nan": math.nan}
    assert section(values, "a") == {"b": 3} and section(values, "a", "b") == {} == section(values, "no", "where")
    assert number(section(values, "a"), "b") == 3
    assert number(values, "flag") is None and number(values, "text") is None and number(values, "none") is None
    assert math.isnan(number(values, "nan") or 0)
