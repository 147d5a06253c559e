"""`accel-distill compare`: several runs in one table and one page, and what makes them incomparable."""

import json
import re
from pathlib import Path

import pytest
from made_run import logged, make_run

from accel_distill.compare import main
from accel_distill.run_curves import plots
from accel_distill.run_directory import read_run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Three runs: distilled, with cross-entropy alone, and one of the same name elsewhere."""
    loss = {"divergence": "forward_kl", "kd_weight": 0.0, "ce_weight": 1.0}
    cache = {"path": str(tmp_path / "no-cache")}
    first = make_run(tmp_path / "kd", kl=1.0, ce=3.0)
    second = make_run(tmp_path / "ce", kl=1.2, ce=2.9, settings={"loss": loss})
    third = make_run(tmp_path / "old" / "kd", kl=1.1, ce=3.2, settings={"cache": cache})
    return [str(path) for path in (first, second, third)]


def test_the_table_marks_the_best_and_lists_what_differs(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main([*runs, "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    name = f"{tmp_path.name}/kd"
    assert lines[0] == "50 samples held out, 20,000 positions; * is the best"
    assert lines[1].split() == ["run", "CE", "KL", "agreement", "ECE", "seconds", "steps"]
    assert lines[2].split() == [name, "3.0000", "1.0000*", "50.00%", "2.00%", "90", "100"]
    assert lines[3].split() == ["ce", "2.9000*", "1.2000", "50.00%", "2.00%", "90", "100"]
    assert lines[4].split()[0] == "old/kd"
    assert f"loss.kd_weight: 1.0 ({name}), 0.0 (ce), 1.0 (old/kd)" in lines
    assert lines[-1] == f"page: {page}"
    assert not any(line.startswith("not comparable") for line in lines)


def test_json_is_for_programs(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*runs[:2], "--json", "--output", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["kd", "ce"]
    assert found["runs"][1]["eval_ce"] == 2.9 and found["runs"][1]["steps"] == 100
    assert found["differences"] == {
        "loss.kd_weight": {"kd": 1.0, "ce": 0.0},
        "loss.ce_weight": {"kd": 0.0, "ce": 1.0},
    }
    assert found["warnings"] == [] and found["page"] == str(tmp_path / "page.html")


def test_the_page_has_the_runs_in_one_plot_each_with_a_colour_of_its_own(runs: list[str], tmp_path: Path) -> None:
    assert main([*runs, "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    for title in ("KL to the teacher", "Cross-entropy"):
        (svg,) = re.findall(rf'<svg [^>]*aria-label="{title}.*?</svg>', text, re.DOTALL)
        assert {"--run-0", "--run-1", "--run-2"} == set(re.findall(r"--run-\d", svg))
    assert text.count('class="number best"') == 2
    assert not re.search(r"https?://|<script", text)


def test_runs_on_other_held_out_samples_are_said_not_to_be_comparable(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"cache_id": "c" * 64, "samples": 500, "eval_samples": 20}
    other = make_run(tmp_path / "other", state={"stateful_callbacks": {"CheckpointRecord": {"args": data}}})
    assert main([runs[0], str(other), "--output", str(tmp_path / "page.html")]) == 0
    sentence = "kd and other: 50 and 20 samples were held out."
    assert f"not comparable: {sentence}" in capsys.readouterr().out
    assert sentence in (tmp_path / "page.html").read_text()


def test_the_best_is_one_of_those_that_were_evaluated_on_the_same(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"eval_samples": 8, "eval_positions": 300, "eval_ece": 0.0001}
    few = make_run(tmp_path / "few", results=results)
    assert main([*runs, str(few), "--output", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "0.01%" in printed and "0.01%*" not in printed
    name = f"{tmp_path.name}/kd"
    said = f"50 samples held out, 20,000 positions ({name}, ce, old/kd); 8 samples held out, 300 positions (few)"
    assert f"{said}; * is the best" in printed and said in (tmp_path / "page.html").read_text()


def test_names_and_settings_are_escaped(tmp_path: Path) -> None:
    evil = make_run(tmp_path / "<img src=x>", settings={"training": {"run_name": "<script>alert(1)</script>"}})
    plain = make_run(tmp_path / "plain")
    assert main([str(evil), str(plain), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<img" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;img src=x&gt;" in text


def test_runs_whose_steps_cover_other_numbers_of_positions_share_an_axis_of_positions(tmp_path: Path) -> None:
    wide = [{**line, "positions": 4000} if "positions" in line else line for line in logged()]
    same = [read_run(make_run(tmp_path / name)) for name in ("a", "b")]
    other = read_run(make_run(tmp_path / "c", state={"log_history": wide}))
    assert {plot.svg.count("positions seen</text>") for plot in plots([same[0], other])} == {1}
    assert all(", over positions" in plot.svg for plot in plots([same[0], other]))
    assert all(", over steps" in plot.svg for plot in plots(same))


def test_a_run_that_was_evaluated_once_is_a_point_beside_the_curves_of_others(tmp_path: Path) -> None:
    ends = [line for line in logged() if "eval_ece" not in line] + [line for line in logged() if "eval_ece" in line][
        -1:
    ]
    often = read_run(make_run(tmp_path / "often"))
    once = read_run(make_run(tmp_path / "once", state={"log_history": ends}))
    titles = [plot.title for plot in plots([often, once])]
    assert {"Top-1 agreement", "Expected calibration error"} <= set(titles)
    (agreement,) = (plot for plot in plots([often, once]) if plot.title == "Top-1 agreement")
    assert "var(--run-0)" in agreement.svg and "var(--run-1)" in agreement.svg
    assert "Top-1 agreement" not in [plot.title for plot in plots([once])]


def test_one_run_is_refused(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(runs[:1]) == 2
    assert capsys.readouterr().err == (
        "error: found 1 run, expected two or more; `accel-distill report RUN` shows one\n"
    )
    assert main([runs[0], "nowhere"]) == 2
    assert "run nowhere: it is not a directory" in capsys.readouterr().err
