"""A stream is trained on to its ragged end by two processes, and gone on with in its middle by two and by one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl

from accel_distill.config import RunConfig, resolved_yaml
from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.train import train

SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
STREAM, HELD_OUT, STEPS, SAVED = 40, 4, 5, 2  # 36 samples to train on, 8 a step: the last step has 4, all of one rank


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, a stream that is shorter than its cap, and a run of 2 processes over it."""
    path = tmp_path_factory.mktemp("stream")
    make_teacher(path / "teacher", vocab=len(make_tokenizer()))
    write_jsonl(path / "texts.jsonl", [story(n) for n in range(STREAM)])
    launched(configured(path, path / "whole"), path)
    return path


def configured(run: Path, output_dir: Path, /, **changes: dict[str, Any]) -> RunConfig:
    training = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": SAVED,
        "logging_steps": 1,
        "dataloader_num_workers": 1,
    }
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"mode": "online"},
        "dataset": {"max_samples": 1000, "eval_samples": HELD_OUT},
        "targets": {"method": "dense"},
        "loss": {"divergence": "jsd"},
        "student": {"config": SIZES},
        "training": training,
    }
    merged = {name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
    values = run_config(run / "teacher", run / "texts.jsonl", run / "none", **merged).model_dump(exclude={"cache"})
    values["targets"] = {name: values["targets"][name] for name in ("method", "temperature", "seed")}
    return RunConfig.model_validate(values)


def launched(config: RunConfig, path: Path) -> None:
    """Run the command on two processes."""
    (path / "run.yaml").write_text(resolved_yaml(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "accel_distill.train", "--config", str(path / "run.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"the stream ended after {STREAM - HELD_OUT} of {1000 - HELD_OUT} samples to train on" in done.stderr


def largest_difference(run: Path, one: str, other: str) -> float:
    """The largest difference of a weight, by the largest weight."""
    left, right = (load_file(run / name / "model.safetensors") for name in (one, other))
    largest = max(float(weight.abs().max()) for weight in left.values())
    return max(float((left[name] - right[name]).abs().max()) for name in left) / largest


def test_two_processes_end_with_the_stream_and_say_how_much_of_it_there_was(run: Path) -> None:
    metrics = json.loads((run / "whole" / "all_results.json").read_text())
    assert metrics["train_samples"] == STREAM - HELD_OUT and metrics["world_size"] == 2
    state = json.loads((run / "whole" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    assert [line["step"] for line in state["log_history"] if "loss" in line] == list(range(1, STEPS + 1))
    assert all(line["kd"] > 0 for line in state["log_history"] if "loss" in line)


def test_two_processes_go_on_exactly(run: Path) -> None:
    checkpoint = f"whole/checkpoint-{SAVED}"
    assert largest_difference(run, "whole", checkpoint) > 1e-3
    resumed = {"resume_from_checkpoint": str(run / checkpoint)}
    launched(configured(run, run / "two", training=resumed), run)
    assert largest_difference(run, "whole", "two") == 0


def test_one_process_goes_on_with_the_same_samples_in_each_step(run: Path) -> None:
    checkpoint = str(run / "whole" / f"checkpoint-{SAVED}")
    resumed = {"resume_from_checkpoint": checkpoint, "gradient_accumulation_steps": 2, "dataloader_num_workers": 0}
    train(configured(run, run / "one", training=resumed))
    assert largest_difference(run, "whole", "one") < 1e-5


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"dataset": {"max_samples": 999}}, ConfigError, "dataset.max_samples is 999 in this run and was 1000"),
        ({"dataset": {"eval_samples": 5}}, ConfigError, "dataset.eval_samples is 5 in this run and 4"),
        ({"training": {"per_device_train_batch_size": 5}}, ConfigError, "a step takes 5 rows"),
        ({"dataset": {"max_length": 16}}, CacheMismatch, "sequence.max_length is 32 in .* and 16 in this run"),
        ({"targets": {"temperature": 2.0}}, CacheMismatch, "targets.temperature is 1.0 in .* and 2.0 in this run"),
        ({"targets": {"method": "top_k"}}, CacheMismatch, "targets.method is 'dense' in .* and 'top_k' in this run"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_run_of_other_data_is_not_gone_on_with(
    run: Path, changes: dict[str, dict[str, Any]], error: type[Exception], sentence: str
) -> None:
    resumed = {
        "per_device_train_batch_size": 8,
        "resume_from_checkpoint": str(run / "whole" / f"checkpoint-{SAVED}"),
    }
    changes = changes | {"training": resumed | changes.get("training", {})}
    with pytest.raises(error, match=sentence) as raised:
        train(configured(run, run / "other", **changes))
    assert "\n" not in str(raised.value)


def test_another_text_is_refused(run: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [story(n + 1) for n in range(STREAM)])
    (tmp_path / "teacher").symlink_to(run / "teacher")
    resumed = {
        "per_device_train_batch_size": 8,
        "resume_from_checkpoint": str(run / "whole" / f"checkpoint-{SAVED}"),
    }
    with pytest.raises(CacheMismatch, match=r"dataset.source.files\[0\] is"):
        train(configured(tmp_path, run / "other", training=resumed))
