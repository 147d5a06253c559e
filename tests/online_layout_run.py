"""Training with an online teacher that must end alike whatever the layout; the students and samples of `layout_run.py`.

`test_online_layouts.py` makes the runs of one process itself. Run by torchrun, this file makes those of a group of
layouts with two processes: `online_layout_run.py DIRECTORY ddp+zero | fsdp2`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from layout_run import (
    EVALUATED,
    LENGTHS,
    OPTIMIZERS,
    STEPS,
    Layout,
    backend_settings,
    describe,
    prepare_fsdp2,
    student_path,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from trainer_run import VOCAB
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from accel_distill.config import TeacherConfig
from accel_distill.losses import Objective
from accel_distill.online_targets import OnlineTargets
from accel_distill.processes import join_deepspeed, leave_processes, whole_weights
from accel_distill.stopping import end
from accel_distill.teacher import Sampling, load_teacher
from accel_distill.text_collator import TextCollator
from accel_distill.text_rows import TextRow
from accel_distill.tokens import TokenSequence
from accel_distill.trainer import DistillationTrainer

ONE = Layout("one", 8, 1)
CASES: dict[str, tuple[Sampling | None, Objective]] = {
    # not jsd: AdamW makes of its rounding, accumulated 4 times by one process alone, 1e-5 of the largest weight
    "dense": (None, Objective(0.7, 0.3, 2.0, "dense")),
    "threshold": (Sampling("threshold", 0.06, 1.5, 3), Objective(0.7, 0.3, 1.5, "threshold")),
}
# (layout of the student, case, how the teacher is placed)
TWO = {
    "ddp+zero": [
        (Layout("ddp", 4, 1), "dense", "replicate"),
        (Layout("ddp", 2, 2), "threshold", "replicate"),
        (Layout("ddp", 4, 1), "dense", "fsdp"),
        (Layout("zero3", 4, 1), "dense", "replicate"),
        (Layout("zero3", 4, 1), "dense", "zero3"),
    ],
    "fsdp2": [(Layout("fsdp2", 4, 1), "dense", "replicate"), (Layout("fsdp2", 2, 2), "dense", "fsdp")],
}


def run_name(layout: Layout, case: str, parallelism: str) -> str:
    """Return the name of a run's directory."""
    return f"{layout.name}-{case}-{parallelism}"


def make_rows() -> list[TextRow]:
    """Return the 40 rows, ragged, in the order of the steps; in one step one of two processes has no target."""
    generator = np.random.default_rng(7)
    return [TextRow(TokenSequence(n, 0, generator.integers(VOCAB, size=length))) for n, length in enumerate(LENGTHS)]


def train(directory: Path, layout: Layout, case: str, parallelism: str) -> None:
    """Train, save the student, and what happened beside it."""
    output = directory / run_name(layout, case, parallelism)
    settings: dict[str, Any] = OPTIMIZERS["adamw"] | backend_settings(layout.backend, directory)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=layout.batch,
        gradient_accumulation_steps=layout.accumulation,
        max_steps=STEPS,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=True,
        **settings,
    )
    if layout.backend.startswith("zero"):
        join_deepspeed()
    student = AutoModelForCausalLM.from_pretrained(student_path(directory, "adamw"))
    sampling, objective = CASES[case]
    config = TeacherConfig(model=str(directory / "teacher"), dtype="float32", head_chunk=7, parallelism=parallelism)
    with whole_weights(arguments):
        teacher = load_teacher(config, device=torch.device("cpu"), valid_ids=VOCAB, world_size=arguments.world_size)
    seen: list[list[int]] = []

    def collate(rows: list[TextRow]) -> dict[str, Tensor]:
        seen.append([row.sequence.sample_index for row in rows])
        return TextCollator(pad_token_id=0)(rows)

    trainer = DistillationTrainer(
        student,
        arguments,
        objective=objective,
        targets_of=OnlineTargets(teacher, sampling),
        data_collator=collate,
        train_dataset=make_rows(),
    )
    trainer.train()
    trainer.save_model()
    base = list(teacher.model.base_model.parameters())
    record = {
        "backend": describe(trainer.model_wrapped, trainer.accelerator.distributed_type.value),
        "teacher": {
            "parameters": len(base),
            "sharded": sum(isinstance(weight, DTensor) for weight in base),
            "divided": sum(hasattr(weight, "ds_id") and weight.numel() == 0 for weight in base),
        },
        "world_size": trainer.args.world_size,
        "log": list(trainer.state.log_history),
        "batches": gather_object([seen[:]]),
        "metrics": trainer.evaluate(make_rows()[:EVALUATED]),
    }
    if trainer.args.process_index == 0:
        (output / "record.json").write_text(json.dumps(record))


def main(directory: Path, group: str) -> None:
    """Make all runs of a group, in one process group."""
    torch.set_num_threads(1)
    if group == "fsdp2":
        prepare_fsdp2()
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # the teacher is whole all the same
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    for run in TWO[group]:
        train(directory, *run)
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave_processes()
    end(0)
