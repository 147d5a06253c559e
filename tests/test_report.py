"""`accel-distill report`: a real run of a tiny teacher and student as one page, and all that may be missing of it."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl

from accel_distill import report as command
from accel_distill.config import RunConfig
from accel_distill.generate import generate
from accel_distill.report import main, report
from accel_distill.report_page import printable, visible
from accel_distill.run_directory import calibration_bins, read_run
from accel_distill.train import train

EVIL = "<script>alert(1)</script>"
SAMPLES, HELD_OUT = 60, 12
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")


def configured(path: Path, name: str, **changes: dict[str, object]) -> RunConfig:
    """Return a training run into `path / name`, evaluated twice."""
    sizes = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32}
    training = {"output_dir": str(path / name), "max_steps": 8, "logging_steps": 1, "learning_rate": 1e-2}
    training |= {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    sections: dict[str, dict[str, object]] = {
        "dataset": {"max_samples": SAMPLES, "eval_samples": HELD_OUT},
        "student": {"config": sizes | {"num_hidden_layers": 1, "num_attention_heads": 2}},
        "training": training,
    }
    return run_config(path / "teacher", path / "texts.jsonl", path / "cache", **(sections | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, its cache of texts that begin with a script, a distilled student and a baseline."""
    path = tmp_path_factory.mktemp("report")
    make_teacher(path / "teacher", vocab=len(make_tokenizer()))
    write_jsonl(path / "texts.jsonl", [f"{EVIL} {story(n)}" for n in range(SAMPLES)])
    generate(configured(path, "none"))
    train(configured(path, "distilled"))
    train(configured(path, "alone", loss={"kd_weight": 0.0, "ce_weight": 1.0}))
    return path


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    """The report of the distilled run beside its baseline."""
    assert main([str(made / "distilled"), "--baseline", str(made / "alone")]) == 0
    return made / "distilled" / "report.html"


class Page(HTMLParser):
    """Collects the tags of a page, the text outside of style, and what is named by attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_has_the_figures_that_training_wrote(made: Path, page: Path) -> None:
    shown = Page(page.read_text())
    for name in ("distilled", "alone"):
        results = json.loads((made / name / "all_results.json").read_text())
        for figure in (f"{results['eval_kl']:.4f}", f"{results['eval_ce']:.4f}", f"{results['eval_ece']:.2%}"):
            assert figure in shown.text
    assert f"{results['eval_teacher_ce']:.4f}" in shown.text
    record = json.loads((made / "distilled" / "run_record.json").read_text())
    assert record["versions"]["torch"] in shown.text and f"{record['student']['parameters']:,}" in shown.text
    assert "threshold 0.05" in shown.text and record["cache"]["cache_id"][:16] in shown.text
    assert "8 steps" in shown.text and "48 samples" in shown.text


def test_the_page_has_every_plot_ten_positions_and_the_cache(page: Path) -> None:
    text = page.read_text()
    labels = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^":,;]+)', text)
    assert labels == [
        "KL to the teacher",
        "Cross-entropy",
        "Top-1 agreement",
        "Expected calibration error",
        "Learning rate",
        "Positions per second",
        "Peak memory",
        "Calibration",
        "Histogram of head ids a position",
        "Histogram of tail ids a position",
        "Histogram of mass of the head",
        "Histogram of entropy",
        "Histogram of tokens a sample",
    ]
    assert text.count('<p class="context">') == 10
    assert text.count("<caption>teacher</caption>") == text.count("<caption>student</caption>") == 10
    assert "bytes a position" in Page(text).text.lower()


def test_the_page_loads_nothing_and_runs_nothing(page: Path) -> None:
    text = page.read_text()
    shown = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(shown.tags)
    targets = [value for name, value in shown.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert targets and all(value and value.startswith("#") for value in targets)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not [name for name, _ in shown.attributes if name.startswith("on")]


def test_what_a_text_says_is_shown_and_not_run(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text.lower()
    assert EVIL in Page(text).text  # as text, in the context of a position
    assert visible(" <b>\n") == '<span class="space">·</span>&lt;b&gt;<span class="space">↵</span>'


def test_the_same_run_gives_the_same_page(made: Path, page: Path, tmp_path: Path) -> None:
    report(made / "distilled", tmp_path / "again.html", baseline=made / "alone")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_the_summary_names_the_figures_and_the_page(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    flags = ["--no-samples", "--baseline", str(made / "alone"), "--output", str(page)]
    assert main([str(made / "distilled"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads((made / "distilled" / "all_results.json").read_text())
    assert lines[0].startswith("12 samples held out") and lines[1].split() == ["distilled", "alone", "teacher"]
    assert f"{results['eval_kl']:.4f}" in lines[3] and all(len(line) < 80 for line in lines[:7])
    assert lines[-1] == f"report: {page}"
    assert any(line.startswith("note: Only 12 samples") for line in lines)
    text = Page(page.read_text()).text
    assert "Not shown: --no-samples was given." in text


def test_a_report_without_samples_needs_no_torch(made: Path, tmp_path: Path) -> None:
    arguments = ["report", str(made / "distilled"), "--no-samples", "--output", str(tmp_path / "page.html")]
    program = f"import sys; from accel_distill.cli import main; status = main({arguments!r}); "
    program += "print([name for name in ('torch', 'transformers') if name in sys.modules]); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_the_bins_that_training_keeps_give_its_calibration_error(made: Path) -> None:
    run = read_run(made / "distilled")
    bins = calibration_bins(run)
    counted = sum(count for count, _, _ in bins)
    assert len(bins) == 15 and counted == run.number("eval_positions")
    error = sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / counted
    assert error == pytest.approx(run.number("eval_ece"), rel=1e-6)
    assert error > 0


def without(made: Path, path: Path, *names: str) -> Path:
    """Return a copy of the distilled run that lacks some files, with no cache beside it."""
    shutil.copytree(made / "distilled", path)
    for name in names:
        (path / name).unlink()
    return path


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["run_record.json", "model.safetensors"], "There is no run_record.json (an older version trained the run)"),
        (["all_results.json", "model.safetensors"], "cannot be loaded"),
        (["run.yaml"], "the run file names no cache."),
        (
            ["run_record.json", "all_results.json", "run.yaml", "model.safetensors", "config.json"],
            "There is no run.yaml",
        ),
    ],
)
def test_a_run_that_lacks_a_file_still_gives_a_report(made: Path, tmp_path: Path, names: list[str], said: str) -> None:
    path = without(made, tmp_path / "run", *names)
    report(path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert said in Page(text).text
    assert 'aria-label="KL to the teacher' in text


def test_a_cache_that_is_gone_moved_or_another_one_is_said(made: Path, tmp_path: Path) -> None:
    gone = make_run(tmp_path / "gone")
    report(gone, tmp_path / "gone.html")
    text = Page((tmp_path / "gone.html").read_text()).text
    assert (
        "no-cache: it is not a directory" in text
        and "or say where it is with --cache." in text
        and "Not shown: no cache to read them from" in text
    )
    report(gone, tmp_path / "other.html", cache=made / "cache")
    assert "is another one than that the run was trained from." in Page((tmp_path / "other.html").read_text()).text
    moved = tmp_path / "moved"
    shutil.copytree(made / "cache", moved)
    run = without(made, tmp_path / "run")
    settings = (run / "run.yaml").read_text().replace(str(made / "cache"), str(tmp_path / "nowhere"))
    (run / "run.yaml").write_text(settings)
    report(run, tmp_path / "moved.html", cache=moved)
    assert (tmp_path / "moved.html").read_text().count('<p class="context">') == 10


def test_a_damaged_cache_is_said_and_the_rest_is_shown(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text("{")
    report(made / "distilled", tmp_path / "page.html", cache=tmp_path / "cache")
    assert "cache.json" in Page((tmp_path / "page.html").read_text()).text


def test_a_run_without_a_cache_section_is_no_crash(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", record={"cache": None}, state={"stateful_callbacks": {}}, settings={"cache": None})
    lines = report(run, tmp_path / "page.html")
    assert "the run file names no cache." in Page((tmp_path / "page.html").read_text()).text
    assert lines[-1] == f"report: {tmp_path / 'page.html'}"


def test_a_run_with_an_online_teacher_shows_no_cache_that_its_run_file_happens_to_name(
    made: Path, tmp_path: Path
) -> None:
    settings = {"teacher": {"model": "org/teacher", "mode": "online"}, "cache": {"path": str(made / "cache")}}
    run = make_run(tmp_path / "run", record={"cache": None}, state={"stateful_callbacks": {}}, settings=settings)
    lines = report(run, tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert text.count("the teacher was online (teacher.mode), so the run has no cache.") == 2
    assert "The cache now has" not in text and not any("cache now has" in line for line in lines)


def test_control_characters_are_shown_as_signs() -> None:
    assert visible("a\x00\x1b[0m\x85\u202e\x7f") == "a␀␛[0m\ufffd\ufffd␡"
    assert printable("one\ntwo\t\x08 🎉 שלום") == "one\ntwo\t␈ 🎉 שלום"


@pytest.mark.parametrize("gpus", [["H100"], 5, [None]])
def test_facts_of_an_unexpected_kind_are_left_out(tmp_path: Path, gpus: Any) -> None:
    targets = {"method": "threshold", "parameter": None}
    record = {"machine": {"gpus": gpus}, "cache": {"cache_id": "c" * 64, "identity": {"targets": targets}}}
    report(make_run(tmp_path / "run", record=record), tmp_path / "page.html")
    assert "threshold" in Page((tmp_path / "page.html").read_text()).text


def test_positions_that_were_not_logged_to_the_last_step_are_said_to_end_earlier(tmp_path: Path) -> None:
    report(make_run(tmp_path / "run", state={"global_step": 103}), tmp_path / "page.html")
    assert "20,000 up to step 100" in Page((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: None, "it is not a directory"),
        (lambda path: path.mkdir(), "it holds no trainer_state.json"),
        (lambda path: (make_run(path) / "trainer_state.json").write_text("?"), "it cannot be read (it is not JSON"),
    ],
)
def test_what_is_no_run_is_one_sentence_and_exit_status_2(
    tmp_path: Path, prepare, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_place_that_no_file_can_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    for output in (tmp_path, tmp_path / "no" / "where.html"):
        assert main([str(run), "--no-samples", "--output", str(output)]) == 2
        assert f"--output {output}: it is no file in a directory" in capsys.readouterr().err


def test_open_shows_the_page_or_says_that_no_browser_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(command.webbrowser, "open", lambda url: bool(opened.append(url)))
    assert main([str(run), "--no-samples", "--open"]) == 0
    assert opened == [(run / "report.html").resolve().as_uri()]
    assert "no browser could be started here" in capsys.readouterr().err


MEASURE = """<!doctype html><body><iframe id="page" style="border:0;width:WIDTHpx;height:900px" src="SOURCE"></iframe>
<script>
window.addEventListener("load", () => {
  const inside = document.getElementById("page").contentWindow, page = inside.document;
  const found = {
    width: page.documentElement.clientWidth,
    wanted: page.documentElement.scrollWidth,
    plots: [...page.querySelectorAll("svg")].map(svg => [svg.getBoundingClientRect().width,
                                                         svg.getBoundingClientRect().height]),
    inks: [...new Set([...page.querySelectorAll("svg text")].map(text => getComputedStyle(text).fill))],
    positions: page.querySelectorAll(".positions > li").length,
    loaded: inside.performance.getEntriesByType("resource").map(entry => entry.name),
    text: page.body.innerText,
  };
  document.body.innerHTML = "";
  document.body.append("FOUND" + JSON.stringify(found) + "END");
});
</script>"""


def measured(page: Path, folder: Path, *, width: int, dark: bool) -> dict:
    """Return what Chromium makes of a page in a frame of `width` pixels."""
    assert CHROMIUM is not None
    around = folder / "around.html"
    around.write_text(MEASURE.replace("WIDTH", str(width)).replace("SOURCE", page.resolve().as_uri()))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --hide-scrollbars --disable-dev-shm-usage "
    flags += "--allow-file-access-from-files "
    flags += f"--blink-settings=preferredColorScheme={0 if dark else 1} --window-size=1400,1000 --dump-dom"
    command_line = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", around.as_uri()]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300)
    found = re.search(r"FOUND(.*)END", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    words = Page(f"<p>{found[1]}</p>").words  # &lt; and the like, read as they were written
    return json.loads("".join(words))


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_chromium_shows_the_plots_the_figures_and_the_positions_and_loads_nothing_else(
    made: Path, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    found = measured(page, tmp_path, width=width, dark=dark)
    assert found["width"] == found["wanted"] == width  # nothing is wider than the window
    assert len(found["plots"]) == 13
    assert all(200 < wide <= width and 80 < high < 700 for wide, high in found["plots"]), found["plots"]
    assert found["positions"] == 10 and found["loaded"] == []
    results = json.loads((made / "distilled" / "all_results.json").read_text())
    assert f"{results['eval_ece']:.2%}" in found["text"] and EVIL in found["text"]
    assert found["inks"] == ["rgb(163, 172, 184)" if dark else "rgb(89, 97, 107)"]  # --faint of the scheme


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb, as WCAG defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_and_curves_stand_out_from_the_ground_in_light_and_dark() -> None:
    template = (Path(command.__file__).parent / "page.html").read_text()
    schemes = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))

        def contrast(one: str, other: str, of: dict[str, str] = colours) -> float:
            high, low = sorted((luminance(of[one]), luminance(of[other])), reverse=True)
            return (high + 0.05) / (low + 0.05)

        for ink, ground in [("ink", "paper"), ("faint", "paper"), ("accent", "paper"), ("ink", "raised")]:
            assert contrast(ink, ground) >= 4.5, (ink, ground)
        for ink, ground in [("warn", "warn-paper"), ("ink", "warn-paper"), ("ink", "bar"), ("ink", "true")]:
            assert contrast(ink, ground) >= 4.5, (ink, ground)
        for number in range(8):
            assert contrast(f"run-{number}", "paper") >= 4.5
        assert contrast("floor", "paper") >= 3
