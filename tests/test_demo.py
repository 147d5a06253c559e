"""The demo: its text, its tokenizer and teacher's blocks, its commands; and a quick run of it, as a user starts it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from accel_distill import demo
from accel_distill.cache import TeacherCache
from accel_distill.config import load_config
from accel_distill.demo_corpus import group_paragraphs, python_documents, source_texts, write_documents
from accel_distill.demo_teacher import VOCABULARY, pack, train_tokenizer
from accel_distill.errors import ConfigError, RunError
from accel_distill.run_file import to_yaml
from accel_distill.tokens import load_tokenizer

TINY = demo.Sizes(teacher_steps=1, samples=4, eval_samples=2, epochs=1)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return python_documents()


@pytest.fixture(scope="module")
def tokenizer(documents: list[str]):
    return train_tokenizer(documents[:1000])


def test_the_same_python_gives_the_same_documents_and_another_seed_another_order(documents: list[str]) -> None:
    assert python_documents() == documents
    other = python_documents(seed=1)
    assert other != documents and sorted(other) == sorted(documents)


def test_the_documents_are_many_and_short_and_none_is_blank(documents: list[str]) -> None:
    assert len(documents) > 1000
    assert all(text.strip() for text in documents)
    assert sorted(map(len, documents))[len(documents) // 2] < 500


def test_no_paragraph_is_in_two_documents(documents: list[str]) -> None:
    paragraphs = [part for text in documents for part in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) > len(documents)


def test_paragraphs_are_grouped_until_a_document_is_long_enough() -> None:
    a, b, c = "a" * 200, "b" * 50, "c" * 10
    assert list(group_paragraphs([a, b, c])) == [f"{a}\n\n{b}", c]
    assert list(group_paragraphs([])) == []


def test_modules_are_read_and_not_imported(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text('"""Loud."""\nraise SystemExit\ndef f():\n    """Quiet."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Skipped."""\n')
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'Second.', 'a': 'First.'}\n")
    before = set(sys.modules)
    assert list(source_texts(tmp_path)) == [["Loud.", "Quiet."], ["First."], ["Second."]]
    assert set(sys.modules) == before


def test_a_python_without_its_source_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"found 0 characters of documentation in .* needs 200,000"):
        python_documents(library=tmp_path)


def test_documents_are_written_one_a_line(tmp_path: Path) -> None:
    texts = ["one\ntwo", "naïve – café"]
    write_documents(tmp_path / "d.jsonl", texts)
    lines = (tmp_path / "d.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": text} for text in texts]


def test_any_text_comes_back_from_the_tokenizer_also_when_it_is_loaded_again(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for known in (tokenizer, load_tokenizer(tmp_path)):
        text = "  def f(x):\n\treturn 'naïve – 🙂 你好'  \n"
        ids = known(text)["input_ids"]
        assert ids[0] == known.bos_token_id and max(ids) < len(known) == VOCABULARY
        assert known.decode(ids[1:]) == text
        assert (known.pad_token, known.bos_token, known.eos_token) == ("<pad>", "<s>", "</s>")


def test_blocks_hold_the_documents_one_after_the_other_with_start_and_end(tokenizer) -> None:
    blocks = pack(["a b", "c"], tokenizer, block=4)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " b", "c"))
    assert [block["input_ids"] for block in blocks] == [[bos, *a, *b, eos]]  # [bos, *c, eos] is no whole block
    assert blocks[0]["labels"] == blocks[0]["input_ids"] and len(c) == 1
    with pytest.raises(RunError, match="the text has 3 tokens; expected at least one block of 4"):
        pack(["c"], tokenizer, block=4)


def test_the_held_out_documents_are_not_in_the_teachers_text(tmp_path: Path, monkeypatch) -> None:
    texts = [f"document {number}" for number in range(8)]
    seen: dict[str, list[str]] = {}
    ran: list[str] = []
    monkeypatch.setattr(demo, "python_documents", lambda: texts)
    monkeypatch.setattr(demo, "train_tokenizer", lambda text: seen.update(tokenizer=text) or text)
    monkeypatch.setattr(demo, "train_teacher", lambda text, tokenizer, **_: seen.update(teacher=text))
    monkeypatch.setattr(demo, "run_command", lambda command, environment: ran.append(str(command)))
    monkeypatch.setattr(demo, "report", lambda out: "")
    monkeypatch.setattr(demo, "write_report", lambda run, page, *, baseline: [])
    demo.demo(tmp_path, TINY)
    config = load_config(tmp_path / "run.yaml")
    assert seen["teacher"] == seen["tokenizer"] == texts[config.dataset.eval_samples :]
    assert config.dataset.eval_samples == 2 and config.dataset.data_files == [str(tmp_path / "documents.jsonl")]
    assert ["generate" in ran[0], *("kd_weight=0" in command for command in ran[1:])] == [True, False, True]


@pytest.mark.parametrize("sizes", [demo.FULL, demo.QUICK])
def test_the_run_file_and_the_baselines_overrides_are_valid(sizes: demo.Sizes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(demo.run_file(tmp_path, sizes)))
    _, distil, baseline = demo.commands(tmp_path, gpus=0)
    ours = load_config(tmp_path / "run.yaml")
    other = load_config(tmp_path / "run.yaml", baseline.words[len(distil.words) :])
    assert (ours.loss.kd_weight, ours.loss.ce_weight) == (1, 0)
    assert (other.loss.kd_weight, other.loss.ce_weight) == (0, 1)
    assert {**ours.training, "output_dir": ""} == {**other.training, "output_dir": ""}
    assert ours.training["output_dir"] != other.training["output_dir"]


@pytest.mark.parametrize(("gpus", "processes", "on_cpu"), [(0, 2, True), (1, 1, False), (2, 2, False), (8, 2, False)])
def test_two_processes_generate_but_on_a_single_gpu(gpus: int, processes: int, on_cpu: bool) -> None:
    generate, *_ = demo.commands(Path("out"), gpus=gpus)
    assert f"--num_processes {processes}" in str(generate)
    assert ("--multi_gpu" in generate.words) == (processes == 2)
    assert ("ACCELERATE_USE_CPU" in generate.variables) == on_cpu


@pytest.mark.parametrize(
    ("program", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_failing_command_ends_the_demo_with_its_exit_status(program: str, status: int, capsys) -> None:
    command = demo.Command((Path(sys.executable).name, "-c", program), {"A": "b"})
    with pytest.raises(RunError, match="A=b python.* ended with exit status") as caught:
        demo.run_command(command, demo.command_environment({}))
    assert caught.value.exit_status == status
    assert capsys.readouterr().out.startswith("$ A=b python")


def test_a_program_that_is_not_installed_is_named() -> None:
    with pytest.raises(RunError, match="no-such-program is not installed beside"):
        demo.run_command(demo.Command(("no-such-program",), {}), demo.command_environment({}))


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert [str(demo.new_directory(None)) for _ in range(3)] == ["demo-run", "demo-run-2", "demo-run-3"]
    assert demo.new_directory(Path("demo-run")) == Path("demo-run")  # empty
    (tmp_path / "demo-run" / "file").touch()
    with pytest.raises(ConfigError, match="--out demo-run: there are files in it"):
        demo.new_directory(Path("demo-run"))
    assert demo.main(["--out", "demo-run/file/below"]) == 2
    assert "error: --out demo-run/file/below: cannot be made: Not a directory\n" == capsys.readouterr().err


def test_what_is_said_of_the_figures_follows_them() -> None:
    lines = demo.comparison({"eval_ce": 4.0, "eval_kl": 1.5}, {"eval_ce": 4.5, "eval_kl": 1.0})
    assert lines == [
        "The distilled student's cross-entropy is 0.5000 nats lower than the baseline's.",
        "The distilled student's KL to the teacher is 0.5000 nats higher than the baseline's.",
    ]


@pytest.mark.slow
def test_a_quick_demo_goes_the_whole_way_and_prints_what_the_commands_measured(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "accel_distill", "demo", "--quick", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"^\[(\d)/6\]", run.stdout, re.MULTILINE) == list("123456")
    assert len(re.findall(r"^\$ ", run.stdout, re.MULTILINE)) == 3
    assert (
        "2 processes on cpu" in run.stderr or "2 processes on cuda" in run.stderr or "1 process on cuda" in run.stderr
    )
    out = tmp_path / "out"
    assert len(TeacherCache(out / "cache")) == demo.QUICK.samples
    distilled, alone = (json.loads((out / name / "all_results.json").read_text()) for name in ("student", "baseline"))
    assert distilled["eval_samples"] == demo.QUICK.eval_samples and distilled["eval_teacher_ce"] > 0
    assert distilled["train_samples"] == alone["train_samples"] == demo.QUICK.samples - demo.QUICK.eval_samples
    page = (out / "student" / "report.html").read_text()
    assert "accel-distill report out/student --baseline out/baseline" in run.stdout
    assert "out/student/report.html" in run.stdout and page.count('<p class="context">') == 10
    assert f"{distilled['eval_kl']:.4f}" in page and f"{alone['eval_kl']:.4f}" in page
    table = run.stdout[run.stdout.index("documents held out") :]
    for shown in (
        rf"cross-entropy, nats +{distilled['eval_ce']:.4f} +{alone['eval_ce']:.4f} +{distilled['eval_teacher_ce']:.4f}",
        rf"KL\(.*\), nats +{distilled['eval_kl']:.4f} +{alone['eval_kl']:.4f}",
        rf"top-1 agreement +{distilled['eval_top1_agreement']:.2%} +{alone['eval_top1_agreement']:.2%}",
        rf"calibration error +{distilled['eval_ece']:.2%} +{alone['eval_ece']:.2%}",
    ):
        assert re.search(shown, table), (shown, table)
    for folder in ("teacher", "student", "baseline"):
        assert (out / folder / "model.safetensors").exists()
