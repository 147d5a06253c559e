"""Run directories as training leaves them, written without training."""

import json
import math
from pathlib import Path
from typing import Any

from accel_distill.run_file import to_yaml

STEPS, EVERY, POSITIONS = 100, 5, 1000  # steps in all, between two lines of the log, positions in each of these
IDENTITY = {
    "teacher": {"dtype": "bfloat16", "vocab_size": 320, "name": "org/teacher"},
    "dataset": {"name": "org/text", "config_name": None, "split": "train", "text_column": "text"},
    "targets": {"method": "threshold", "parameter": 0.03, "temperature": 1.0, "seed": 0},
    "sequence": {"max_length": 32, "long_documents": "truncate", "append_eos": True},
}


def logged(*, kl: float = 1.0, ce: float = 3.0) -> list[dict[str, Any]]:
    """Return a log that falls towards `kl` and `ce`, with an evaluation every 20 steps."""
    lines: list[dict[str, Any]] = []
    for step in range(EVERY, STEPS + 1, EVERY):
        above = 3 * math.exp(-step / 25)
        train = {"loss": kl + above, "kd": kl + above, "kl": kl + above, "ce": ce + above, "teacher_ce": 2.0}
        speed = {
            "positions": POSITIONS,
            "positions_per_second": 5000.0,
            "peak_memory_bytes": 6e8,
            "learning_rate": 1e-3,
        }
        lines.append({"step": step, **train, **speed})
        if step % 20 == 0:
            lines.append({"step": step, **evaluated(kl=kl + above, ce=ce + above)})
    return lines


def evaluated(*, kl: float, ce: float, ece: float = 0.02) -> dict[str, Any]:
    """Return what an evaluation logs."""
    figures = {"loss": kl, "kd": kl, "kl": kl, "ce": ce, "teacher_ce": 2.0, "ece": ece, "top1_agreement": 0.5}
    return {f"eval_{name}": value for name, value in {**figures, "positions": 20_000}.items()}


def make_run(path: Path, *, kl: float = 1.0, ce: float = 3.0, **changes: dict[str, Any]) -> Path:
    """Write a run of four files; `changes` (state, results, settings, record) replace keys of theirs."""
    path.mkdir(parents=True)
    data = {"cache_id": "c" * 64, "content_sha256": "d" * 64, "samples": 500, "eval_samples": 50, "global_batch": 8}
    state = {
        "global_step": STEPS,
        "max_steps": STEPS,
        "epoch": 2.0,
        "log_history": logged(kl=kl, ce=ce),
        "stateful_callbacks": {"CheckpointRecord": {"args": data, "attributes": {}}},
    }
    bins = {"positions": [10_000, 0, 10_000], "confidence": [0.2, 0.0, 0.9], "accuracy": [0.25, 0.0, 0.85]}
    results = {**evaluated(kl=kl, ce=ce), "eval_samples": 50, "train_samples": 450, "train_runtime": 90.0}
    settings = {
        "teacher": {"model": "org/teacher"},
        "dataset": {"name": "org/text", "eval_samples": 50, "max_samples": 500},
        "cache": {"path": str(path.parent / "no-cache")},
        "student": {"model": None, "config": {"model_type": "llama", "hidden_size": 16}},
        "loss": {"divergence": "forward_kl", "kd_weight": 1.0, "ce_weight": 0.0},
        "training": {"output_dir": str(path), "learning_rate": 1e-3, "num_train_epochs": 2},
    }
    cache = {"cache_id": "c" * 64, "identity": IDENTITY, "complete": True, "samples": 500, "positions": 9000}
    record = {
        "started": "2026-01-02T03:04:05Z",
        "versions": {"accel_distill": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "Some CPU", "cores": 8, "memory_bytes": 16e9, "gpus": [], "system": "Linux"},
        "world_size": 2,
        "distributed_type": "MULTI_CPU",
        "student": {"class": "LlamaForCausalLM", "parameters": 4096, "trained_parameters": 4096},
        "cache": {**cache, "bytes": 100_000, "nonfinite": 0},
        "full_logits": None,
    }
    (path / "trainer_state.json").write_text(json.dumps(state | changes.get("state", {})))
    (path / "all_results.json").write_text(
        json.dumps({**results, "eval_calibration": bins} | changes.get("results", {}))
    )
    (path / "run.yaml").write_text(to_yaml(settings | changes.get("settings", {})))
    (path / "run_record.json").write_text(json.dumps(record | changes.get("record", {})))
    return path
