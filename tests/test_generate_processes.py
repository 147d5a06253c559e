"""`generate` as it is launched: two real processes, the launcher's silent fallback, `python -m`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_teacher, run_config, shard_files, write_jsonl
from transformers import AutoModelForCausalLM

from accel_distill.cache import TeacherCache
from accel_distill.codec import weight_scale
from accel_distill.config import RunConfig, resolved_yaml
from accel_distill.generate import generate
from accel_distill.tokens import load_tokenizer

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]
SAMPLES = 60


def real_run(shared_data: Path, cache: Path) -> RunConfig:
    """A run with a real teacher on real text."""
    return run_config(
        shared_data / "models" / "stories260K",
        shared_data / "text" / "tinystories_train.jsonl",
        cache,
        teacher={"tokens_per_batch": 2048, "head_chunk": 256},
        dataset={"max_samples": SAMPLES, "max_length": 128, "eval_samples": 8},
        targets={"threshold": 0.03},
        cache={"samples_per_shard": 8, "lanes": None},
    )


@pytest.fixture(scope="module")
def launched(
    shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A cache made by two processes, and what they said."""
    place = tmp_path_factory.mktemp("launched")
    (place / "run.yaml").write_text(resolved_yaml(real_run(shared_data, place / "cache")))
    done = subprocess.run(
        [*LAUNCH, "--multi_gpu", "--num_processes", "2", "-m", "accel_distill.generate", "--config", "run.yaml"],
        cwd=place,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "cache", done


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(
    launched: tuple[Path, subprocess.CompletedProcess[str]], shared_data: Path, tmp_path: Path
) -> None:
    config = real_run(shared_data, tmp_path / "cache")
    generate(config.model_copy(update={"cache": config.cache.model_copy(update={"lanes": 2})}))
    cache, _ = launched
    assert len(shard_files(cache)) == 8
    assert shard_files(cache) == shard_files(tmp_path / "cache")
    for name in ("cache.json", "ranks.bin", "manifest.json"):
        assert (cache / name).read_bytes() == (tmp_path / "cache" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_say_each_thing_once(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    cache, done = launched
    assert done.stdout == ""
    first, *last = done.stderr.splitlines()
    assert first == f"2 processes on cpu: opening {cache}"
    said = [
        r"60 of 60 samples \(100%\) in .*",
        r"complete: .*",
        r"  60 samples \(to the sample cap\): .*",
        r"  [\d,]+ tokens, [\d,]+ positions .*",
        r"  8 shards, .*",
    ]
    for line, expected in zip(last, said, strict=True):
        assert re.fullmatch(expected, line)
    logs = sorted((cache / "logs").iterdir())
    assert [len(log.read_text().splitlines()) for log in logs] == [4, 4]  # each process made its half


@pytest.mark.slow
@torch.no_grad()
def test_a_real_cache_agrees_with_its_tokenizer_and_its_teacher(
    launched: tuple[Path, subprocess.CompletedProcess[str]], shared_data: Path
) -> None:
    cache, positions = TeacherCache(launched[0]), 0
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    model = AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K", dtype=torch.float32)
    lines = (shared_data / "text" / "tinystories_train.jsonl").read_text().splitlines()[:SAMPLES]
    texts = [json.loads(line)["text"] for line in lines]
    assert [sample.sample_index for sample in cache] == list(range(SAMPLES))
    for sample, text in zip(cache, texts, strict=True):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert sample.input_ids.tolist() == ids[:128]
        probs = model(input_ids=sample.input_ids[None]).logits[0, :-1].double().softmax(-1)
        weights = sample.targets.to_dense(cache.vocab_size)
        large = probs >= 0.03 + 1e-4
        step = 1 / weight_scale("threshold", 0.03)
        assert ((weights - probs).abs()[large] <= step + 1e-5).all()
        assert ((weights - step)[~large] <= 0.06).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)), rtol=0, atol=1e-6)
        positions += len(weights)
    assert positions > 5000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run file for a tiny teacher and good data."""
    place = tmp_path_factory.mktemp("small")
    data = write_jsonl(place / "data.jsonl", ["a text", "another"])
    config = run_config(make_teacher(place / "teacher"), data, place / "cache", dataset={"eval_samples": 0})
    (place / "run.yaml").write_text(resolved_yaml(config))
    return place


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the launcher starts what it is asked for")
def test_a_launcher_that_silently_starts_one_process_for_two_is_refused(small: Path) -> None:
    done = subprocess.run(
        [*LAUNCH, "--num_processes", "2", "-m", "accel_distill.generate", "--config", "run.yaml"],
        cwd=small,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "asked for several processes, but there is no GPU" in said[0]
    assert not (small / "cache").exists()


def test_python_m_says_one_sentence_and_exits_with_its_status(small: Path) -> None:
    write_jsonl(small / "chat.jsonl", [[{"role": "user", "content": "hi"}]])
    arguments = ["--config", "run.yaml", f"dataset.data_files={small}/chat.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "accel_distill.generate", *arguments],
        cwd=small,
        capture_output=True,
        text=True,
        timeout=300,
    )
    *opening, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert error == "error: dataset.text_column: 'text' holds a list (a chat?) at sample 0, expected text"
    assert opening == [f"1 process on cpu: opening {small}/cache"]
    assert not (small / "cache").exists()
