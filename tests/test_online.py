"""Training with the teacher in the process: what a cache would have given, without the cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl

from accel_distill.config import RunConfig
from accel_distill.generate import generate
from accel_distill.train import train

VOCAB = len(make_tokenizer())
SAMPLES, HELD_OUT = 41, 9
SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LOGGED = ("loss", "kd", "ce", "kl", "teacher_ce", "grad_norm")
EVALUATED = ("loss", "ce", "kd", "kl", "teacher_ce", "top1_agreement", "ece", "positions")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, whose vocabulary is padded, and texts without empty ones but the last."""
    path = tmp_path_factory.mktemp("online")
    make_teacher(path / "teacher", vocab=VOCAB + 20)
    texts = [story(n) for n in range(SAMPLES + 10) if story(n)][:SAMPLES]
    write_jsonl(path / "texts.jsonl", texts)
    return path


def configured(run: Path, output_dir: Path, **changes: dict[str, Any]) -> RunConfig:
    """Return a short training run with an online teacher; `changes` are sections, whose keys replace these."""
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"mode": "online"},
        "dataset": {"max_samples": SAMPLES, "eval_samples": HELD_OUT},
        "student": {"config": SIZES},
        "training": {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
        },
    }
    merged = {name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
    return run_config(run / "teacher", run / "texts.jsonl", output_dir.parent / "cache", **merged)


def results(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "all_results.json").read_text())


def log_of(output_dir: Path) -> list[dict[str, float]]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [{name: line[name] for name in LOGGED} for line in state["log_history"] if "loss" in line]


@pytest.mark.parametrize("streaming", [False, True], ids=["at hand", "stream"])
@pytest.mark.parametrize("method", ["threshold", "random", "top_k"])
def test_an_online_teacher_gives_the_losses_metrics_and_weights_of_its_cache(
    run: Path, tmp_path: Path, method: str, streaming: bool
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "targets": {"method": method, "top_k": 8, "temperature": 1.5, "seed": 3},
        "loss": {"ce_weight": 0.3},
        "dataset": {"streaming": streaming, "max_samples": SAMPLES, "eval_samples": HELD_OUT},
        "training": {"num_train_epochs": 1},
    }
    cached = {"teacher": {"mode": "cached"}}
    generate(configured(run, tmp_path / "none", **changes | cached))
    metrics = {
        name: train(configured(run, tmp_path / name, **changes | mode))
        for name, mode in {"cached": cached, "online": {}}.items()
    }
    for name in EVALUATED:
        assert metrics["online"][f"eval_{name}"] == pytest.approx(metrics["cached"][f"eval_{name}"], rel=3e-5), name
    logs = [log_of(tmp_path / name) for name in metrics]
    assert len(logs[0]) == len(logs[1]) == (SAMPLES - HELD_OUT) // 4
    for ours, theirs in zip(*logs, strict=True):  # a cache rounds each sample's entropy to 1/256 nat
        assert ours == pytest.approx(theirs, rel=1e-5, abs=3e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in metrics]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_and_is_not_stopped(
    divergence: str, run: Path, tmp_path: Path
) -> None:
    teacher = make_teacher(tmp_path / "teacher", vocab=VOCAB)  # padded ids, which it never says, a student would
    shutil.copy(run / "texts.jsonl", tmp_path)
    student = {"config": None, "model": str(teacher)}
    sgd = {"optim": "sgd"}  # AdamW would make steps of rounding
    loss = {"divergence": divergence}
    dense = {"method": "dense"}
    metrics = train(configured(tmp_path, tmp_path / "out", targets=dense, loss=loss, student=student, training=sgd))
    assert abs(metrics["eval_kl"]) < 1e-6
    assert max(abs(line["kd"]) for line in log_of(tmp_path / "out")) < 1e-6
