"""Plots as SVG: what is drawn, that colours are the page's, and that they stand in a page together."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from accel_distill.charts import WIDTH, Line, calibration, curves, histogram

STEPS = [10, 20, 30, 40]


def some_curves(title: str = "KL") -> str:
    lines = [Line("floor", [0, 40], [1.0, 1.0]), Line("train", STEPS, [4.0, 3.0, 2.5, 2.2])]
    lines.append(Line("eval", [20, 40], [3.1, 2.3], run=1))
    return curves(title, lines, unit="nats", positions=(STEPS, [1000, 2000, 3000, 4000]))


def some_plots() -> list[str]:
    bins = [(10, 0.1, 0.2), (0, 0.0, 0.0), (30, 0.8, 0.7)]
    return [some_curves(), calibration("ECE", [bins, bins]), histogram("ids", [0, 1, 2, 3], [5, 9, 1], mean=1.2)]


def test_a_bin_of_few_positions_is_a_dot_beside_the_curve_and_not_a_part_of_it() -> None:
    many = [(100, 0.1, 0.2), (100, 0.5, 0.5), (100, 0.9, 0.8)]
    alone = calibration("ECE", [many])
    beside = calibration("ECE", [[many[0], (3, 0.5, 0.0), many[2]]])
    points = [re.findall(r'<path d="(M [^"]*)"', svg) for svg in (alone, beside)]
    longest = [max(path.count("L") for path in paths if "z" not in path and "C" not in path) for paths in points]
    assert longest == [2, 1]
    assert calibration("ECE", [[(3, 0.5, 0.0)]])  # no curve at all


@pytest.mark.parametrize("svg", some_plots())
def test_a_plot_is_one_labelled_element_in_the_colours_and_font_of_the_page(svg: str) -> None:
    root = ET.fromstring(svg)
    assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label")
    assert [float(size) for size in (root.get("viewBox") or "").split()][2] == WIDTH * 72
    assert "width" not in root.attrib and "height" not in root.attrib  # it fills its column
    assert {"--ink", "--faint", "--grid", "--run-0"} & set(re.findall(r"var\((--[\w-]+)\)", svg)) >= {
        "--faint",
        "--grid",
    }
    assert not re.search(r"#[0-9a-f]{6}\b|black|DejaVu|https?:|<style", svg)


def test_ids_are_not_shared_by_the_plots_of_a_page() -> None:
    ids = [name for svg in some_plots() for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 3
    for svg in some_plots():
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert used and used <= set(re.findall(r' id="([^"]+)"', svg))


def test_the_same_figures_give_the_same_bytes() -> None:
    assert some_plots() == some_plots()
    assert some_curves() != some_curves("CE")


def test_ticks_say_the_steps_and_how_many_positions_had_been_seen() -> None:
    texts = re.findall(r">([^<>\n]+)</text>", some_curves())
    assert {"40", "4 k", "20", "2 k", "step, and positions seen"} <= set(texts)
    alone = re.findall(r">([^<>\n]+)</text>", curves("x", [Line("train", STEPS, [1, 2, 3, 4])], unit="count"))
    assert "40" in alone and "step" in alone and "4 k" not in alone


def test_small_values_keep_their_digits() -> None:
    texts = re.findall(r">([^<>\n]+)</text>", curves("lr", [Line("train", STEPS, [0, 1e-4, 2e-4, 0])], unit="rate"))
    assert "0.0001" in texts


def test_the_first_steps_do_not_flatten_the_rest() -> None:
    values = [1000.0, *(1 + 1 / n for n in range(1, 200))]
    svg = curves("loss", [Line("train", list(range(1, 201)), values)], unit="nats")
    ticks = [float(text) for text in re.findall(r">(\d+\.\d+)</text>", svg)]
    assert ticks and max(ticks) < 3


@pytest.mark.parametrize("values", [[math.nan] * 4, [math.inf, 1.0, 2.0, math.nan], [0.0] * 4, [5.0, 5.0, 5.0, 5.0]])
def test_odd_values_are_no_crash(values: list[float]) -> None:
    svg = curves("odd", [Line("train", STEPS, values), Line("eval", [40], values[:1])], unit="nats")
    assert ET.fromstring(svg).tag == "svg"


def test_a_title_is_escaped() -> None:
    assert ET.fromstring(some_curves('<b>"&')).get("aria-label") == '<b>"&'
