"""Two ranks that share one teacher: `torchrun ... divided_run.py DIRECTORY`, with a teacher and data in it.

For each backend it makes the caches of all cases in `DIRECTORY/BACKEND-CASE`, and writes beside them what each rank
holds of the teacher.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import run_config
from torch import nn

from accel_distill import generate as command
from accel_distill.config import RunConfig
from accel_distill.divided import held_bytes
from accel_distill.processes import World, leave_processes
from accel_distill.stopping import end
from accel_distill.teacher import Teacher

BACKENDS = ("fsdp", "zero3")
# Samples and lanes of a case; shards have 4. Of 2 ranks one has none; one has two; both have four.
CASES = {"one-shard": (3, 1), "three-shards": (11, 1), "eight-shards": (30, 2)}
TEACHERS = {"one-shard": "tied", "three-shards": "plain", "eight-shards": "experts"}


def case_config(directory: Path, case: str, parallelism: str) -> RunConfig:
    """Return the run of a case; the cache of `replicate` is made by the test."""
    samples, lanes = CASES[case]
    return run_config(
        directory / TEACHERS[case],
        directory / "data.jsonl",
        directory / f"{parallelism}-{case}",
        teacher={"parallelism": parallelism},
        dataset={"max_samples": samples, "eval_samples": 0},
        cache={"lanes": lanes},
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what this rank holds of a model, and what its weights really are: libraries fall back silently."""
    from torch.distributed.tensor import DTensor

    base = list(model.base_model.parameters())
    return {
        "held_bytes": held_bytes(model),
        "parameters": len(base),
        "sharded": sum(isinstance(p, DTensor) for p in base),
        "divided": sum(hasattr(p, "ds_id") and p.numel() == 0 for p in base),
        "head": list(model.get_output_embeddings().weight.shape),
    }


def main(directory: Path) -> None:
    """Make all caches in one process group, and describe the teachers that made them."""
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    World.leave = lambda self: None  # type: ignore[method-assign]  # the next run needs the process group
    teachers: list[Teacher] = []
    load = command.load_teacher
    command.load_teacher = lambda *args, **named: teachers.append(load(*args, **named)) or teachers[-1]  # type: ignore
    for backend in BACKENDS:
        for case in CASES:
            command.generate(case_config(directory, case, backend))
            record = describe(teachers.pop().model)  # outside a forward, after the last one
            (directory / f"{backend}-{case}-{os.environ['RANK']}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_processes()
    end(0)
