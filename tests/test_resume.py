"""Training goes on in the middle of its second epoch, on two processes and on one, as if it had never stopped.

Also with packed rows, and with steps of samples of about equal length.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl

from accel_distill.cache import TeacherCache
from accel_distill.cached_data import split_items
from accel_distill.config import RunConfig, resolved_yaml
from accel_distill.generate import generate
from accel_distill.packs import PackedCache
from accel_distill.train import train

SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
STEPS, SAVED = 8, 6  # 4 steps are an epoch of 32 samples; the run is saved in the middle of the second


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a complete cache of 36 samples in 9 shards, and a run of 2 processes from it."""
    path = tmp_path_factory.mktemp("resume")
    make_teacher(path / "teacher", vocab=len(make_tokenizer()))
    texts = [story(n) for n in range(60) if story(n)][:36]
    write_jsonl(path / "texts.jsonl", texts)
    generate(configured(path, path / "none"))
    launched(configured(path, path / "whole"), path)
    return path


def configured(run: Path, output_dir: Path, **training: Any) -> RunConfig:
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "save_steps": SAVED,
    }
    return run_config(
        run / "teacher",
        run / "texts.jsonl",
        run / "cache",
        dataset={"max_samples": 36, "eval_samples": 4},
        student={"config": SIZES},
        training=settings | training,
    )


def launched(config: RunConfig, path: Path) -> None:
    """Run the command on two processes."""
    (path / "run.yaml").write_text(resolved_yaml(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "accel_distill.train", "--config", str(path / "run.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def largest_difference(run: Path, one: str, other: str) -> float:
    """The largest difference of a weight, by the largest weight."""
    left, right = (load_file(run / name / "model.safetensors") for name in (one, other))
    largest = max(float(weight.abs().max()) for weight in left.values())
    return max(float((left[name] - right[name]).abs().max()) for name in left) / largest


def test_two_processes_go_on_exactly(run: Path) -> None:
    checkpoint = f"whole/checkpoint-{SAVED}"
    assert (run / "whole" / f"checkpoint-{STEPS}").is_dir()
    assert largest_difference(run, "whole", checkpoint) > 1e-3
    launched(configured(run, run / "two", resume_from_checkpoint=str(run / checkpoint)), run)
    assert largest_difference(run, "whole", "two") == 0


def test_one_process_goes_on_with_the_same_samples_in_each_step(run: Path) -> None:
    checkpoint = str(run / "whole" / f"checkpoint-{SAVED}")
    train(configured(run, run / "one", resume_from_checkpoint=checkpoint, gradient_accumulation_steps=2))
    assert largest_difference(run, "whole", "one") < 1e-5


class Batches(NamedTuple):
    """How a run makes batches of 68 short samples, and what then is the middle of its second epoch."""

    training: dict[str, Any]
    held_out: int
    rows: int  # of an epoch: whole steps of 8, or a last one would differ between one process and two
    saved: int  # a step


PACKED = Batches({"packing": True}, held_out=8, rows=32, saved=6)
GROUPED = Batches({"train_sampling_strategy": "group_by_length"}, held_out=4, rows=64, saved=11)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a cache of 68 samples of 3 to 32 tokens, in shards of 8."""
    path = tmp_path_factory.mktemp("short")
    make_teacher(path / "teacher", vocab=len(make_tokenizer()))
    texts = [" ".join(story(n).split()[: 2 + 5 * n % 11]) for n in range(90) if story(n)][:68]
    write_jsonl(path / "texts.jsonl", texts)
    generate(batched(path, path / "none", PACKED))
    return path


def batched(run: Path, output_dir: Path, batches: Batches, **training: Any) -> RunConfig:
    settings = {"output_dir": str(output_dir), "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    settings |= {"num_train_epochs": 2, "save_steps": batches.saved} | batches.training
    return run_config(
        run / "teacher",
        run / "texts.jsonl",
        run / "cache",
        dataset={"max_samples": 68, "eval_samples": batches.held_out},
        cache={"path": run / "cache", "samples_per_shard": 8},
        student={"config": SIZES},
        training=settings | training,
    )


@pytest.mark.parametrize("batches", [PACKED, GROUPED], ids=["packed", "grouped"])
def test_packed_and_grouped_training_goes_on_exactly_on_one_process_and_on_two(short: Path, batches: Batches) -> None:
    cache = TeacherCache(short / "cache")
    items, _ = split_items(cache, eval_samples=batches.held_out)
    packs = PackedCache(cache, items, most=cache.max_length)
    assert batches.rows == (len(packs) if batches.training == PACKED.training else len(items))
    assert batches.rows / 8 < batches.saved < batches.rows / 4
    name = "packed" if batches is PACKED else "grouped"
    train(batched(short, short / f"{name}-whole", batches))
    saved = {"resume_from_checkpoint": str(short / f"{name}-whole" / f"checkpoint-{batches.saved}")}
    assert largest_difference(short, f"{name}-whole", f"{name}-whole/checkpoint-{batches.saved}") > 1e-3
    train(batched(short, short / f"{name}-same", batches, **saved))
    assert largest_difference(short, f"{name}-whole", f"{name}-same") == 0
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train(batched(short, short / f"{name}-halves", batches, **saved, **workers, **halves))
    assert largest_difference(short, f"{name}-whole", f"{name}-halves") < 1e-5
    launched(batched(short, short / f"{name}-two", batches, **saved, per_device_train_batch_size=4), short)
    assert largest_difference(short, f"{name}-whole", f"{name}-two") < 1e-5
