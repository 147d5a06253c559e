"""The command that trains a student: `accelerate launch -m accel_distill.train --config run.yaml`.

The one decision: where targets come from, a cache (cached_data.py) or a teacher in the process (online_data.py), is one
object with the same five answers; nothing here asks which of the two it is again. It costs that both are imported.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from accel_distill.adapters import add_adapters, check_same_adapters, merge_adapters, require_peft
from accel_distill.cached_data import CachedData
from accel_distill.checkpoint_record import CheckpointRecord, check_resumable, check_same_backend
from accel_distill.command_line import parse_arguments
from accel_distill.config import RunConfig, StudentConfig, load_config, resolved_yaml
from accel_distill.errors import ConfigError, RunError, exit_with
from accel_distill.online_data import OnlineData, one_pass
from accel_distill.processes import (
    World,
    check_backend,
    join_deepspeed,
    leave_processes,
    start_processes,
    whole_weights,
)
from accel_distill.progress import logged_above_bars
from accel_distill.publish import replace
from accel_distill.run_record import run_record, write_run_record
from accel_distill.stopping import end, stop_on_signals
from accel_distill.student import load_student
from accel_distill.trainer import DistillationTrainer
from accel_distill.training_arguments import default_report_to, library_arguments, sharded_by
from accel_distill.training_log import use_training_log

log = logging.getLogger("accel_distill.train")  # under -m this module is __main__

Data = CachedData | OnlineData


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        path, overrides = parse_arguments(argv, "accel_distill.train")
        with stop_on_signals():
            try:
                train(load_config(path, overrides))
            finally:
                leave_processes()
        return 0

    return exit_with(run)


def train(config: RunConfig) -> dict[str, Any]:
    """Train the student that `config` describes from its cache or online teacher; return the final metrics.

    `training.output_dir` then holds the student and its tokenizer, `all_results.json` with the metrics,
    `trainer_state.json` with the log and `run.yaml`. Raises the RunErrors of errors.py. Every rank of the run
    calls it.
    """
    student = config.student
    if student is None:
        raise ConfigError("student: is missing; training needs student.model or student.config")
    _refuse_unlaunched(config.training)
    if student.lora is not None:
        require_peft()
    world = start_processes()
    world.set_up_logging()
    data: Data = OnlineData(config, world) if config.teacher.mode == "online" else CachedData(config, world)
    arguments = training_arguments(one_pass(config), has_gpu=torch.cuda.is_available())
    record = data.record(global_batch=samples_of_a_step(arguments, world_size=world.world_size))
    if checkpoint := arguments.resume_from_checkpoint:
        world.from_main(lambda: check_resumable(Path(checkpoint), record))
        log.info("going on from %s", checkpoint)
    if arguments.deepspeed_plugin is not None:
        join_deepspeed()
    trainer = _make_trainer(data, student, arguments, world)
    if checkpoint:
        world.from_main(lambda: check_same_adapters(Path(checkpoint), trainer.model))
        how = {"distributed_type": trainer.accelerator.distributed_type.value, "world_size": world.world_size}
        on_each_node = arguments.save_on_each_node
        world.from_main(lambda: check_same_backend(Path(checkpoint), **how, on_each_node=on_each_node))
    in_checkpoints = CheckpointRecord(**asdict(record))
    trainer.add_callback(in_checkpoints)
    use_training_log(trainer)
    distributed_type = trainer.accelerator.distributed_type.value
    check_backend(os.environ, distributed_type=distributed_type)
    if world.is_main:
        output_dir = Path(arguments.output_dir)
        replace(resolved_yaml(config).encode(), output_dir / "run.yaml", scratch=output_dir)
        how = {"world_size": world.world_size, "distributed_type": distributed_type}
        write_run_record(output_dir, run_record(trainer.model, data.cache, full_logits=trainer.full_logits, **how))
    metrics = _run(trainer, in_checkpoints) | {"world_size": world.world_size, "distributed_type": distributed_type}
    if student.lora is not None and student.lora.merge:
        world.from_main(lambda: _merge(student, data, arguments))
    trainer.save_metrics("all", metrics, combined=False)  # all_results.json, without what an older run left
    if world.is_main:
        what = "adapters are" if student.lora is not None and not student.lora.merge else "student is"
        print(summary(metrics, output_dir=arguments.output_dir, what=what), flush=True)
    trainer.accelerator.end_training()
    return metrics


def _refuse_unlaunched(training: dict[str, Any]) -> None:
    """Raise ConfigError where section `training` asks for DeepSpeed or FSDP and no launcher started this process."""
    backend = sharded_by(training)
    if backend and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"training.{backend} needs a launcher, also for one process: torchrun --nproc_per_node N -m "
            "accel_distill.train ..., or launch/train.sh N with an ACCELERATE_CONFIG of configs/accelerate/ instead of "
            "the key"
        )


def training_arguments(values: dict[str, Any], *, has_gpu: bool) -> TrainingArguments:
    """Return section `training` as TrainingArguments, with what this trainer needs; refuse a contrary value."""
    forced = {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "average_tokens_across_devices": True,
        "batch_eval_metrics": False,
        "eval_do_concat_batches": True,
        "use_cpu": not has_gpu,
    }
    for name, value in forced.items():
        if values.get(name, value) != value:
            raise ConfigError(
                f"training.{name}: is {values[name]}, and has to be {value} here; leave it out, it is set"
            )
    defaults = {
        "report_to": default_report_to(),
        "disable_tqdm": not sys.stderr.isatty(),  # a bar would fill a log file
        "ddp_find_unused_parameters": False,  # a causal language model uses all it has; looking costs time
    }
    values = library_arguments(values) | {"resume_from_checkpoint": _checkpoint(values)}
    try:
        arguments = TrainingArguments(**{**defaults, **values, **forced})
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"section training: {' '.join(str(error).split())}") from error
    loading = arguments.accelerator_config
    if loading.dispatch_batches or loading.split_batches or not loading.even_batches:
        raise ConfigError(
            "training.accelerator_config: dispatch_batches cannot be true (a batch's flat targets cannot be cut), nor "
            "split_batches (per_device_train_batch_size is of one process here), nor even_batches false (processes "
            "would wait for each other's missing batches); leave them out"
        )
    return arguments


def samples_of_a_step(arguments: TrainingArguments, *, world_size: int) -> int:
    """Return the global batch: samples per device, times accumulation, times processes."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world_size


def _checkpoint(values: dict[str, Any]) -> str | None:
    """Return the checkpoint to go on from; `true` means the last one of output_dir."""
    wanted, output_dir = values.get("resume_from_checkpoint"), str(values.get("output_dir", "trainer_output"))
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if wanted is True:
        if last is None:
            raise ConfigError(
                f"training.resume_from_checkpoint is true, but {output_dir} holds no checkpoint; leave it out to begin"
            )
        return last
    if isinstance(wanted, str) and not Path(wanted).is_dir():
        raise ConfigError(f"training.resume_from_checkpoint: there is no directory {wanted}")
    if not wanted and last:
        log.warning("%s is there, but training starts anew; to go on: training.resume_from_checkpoint=true", last)
    return wanted or None


def summary(metrics: dict[str, Any], *, output_dir: str, what: str) -> str:
    """Return the final metrics as a small table for people; `what` says what is in `output_dir`."""
    lines = []
    if "eval_positions" in metrics:
        lines = [
            f"held out: {metrics['eval_samples']:,} samples, {metrics['eval_positions']:,} positions",
            f"{'':28}{'student':>10}{'teacher':>10}",
            f"{'cross-entropy, nats':28}{metrics['eval_ce']:10.4f}{metrics['eval_teacher_ce']:10.4f}",
            f"{'KL(teacher || student)':28}{metrics['eval_kl']:10.4f}",
            f"{'top-1 agreement':28}{metrics['eval_top1_agreement']:10.2%}",
            f"{'expected calibration error':28}{metrics['eval_ece']:10.2%}",
        ]
    epochs = f"{metrics['epoch']:.4g} epoch{'s' if metrics['epoch'] != 1 else ''}"
    trained = f"{epochs} of {metrics['train_samples']:,} samples, {metrics['train_runtime']:.0f} s"
    if before := metrics["train_runtime_before"]:
        trained += f" ({before:.0f} s of them before the checkpoint)"
    return "\n".join([*lines, f"trained for {trained}; the {what} in {output_dir}"])


def _make_trainer(
    data: Data, student: StudentConfig, arguments: TrainingArguments, world: World
) -> DistillationTrainer:
    # from scratch: the same weights whatever the backend; pretrained: divided while they are read
    with whole_weights(arguments) if student.model is None else nullcontext():
        model: Any = load_student(student, data.tokenizer, **_sizes(data, arguments))
    if student.lora is not None and student.model is not None:
        model = add_adapters(model, student.lora, name=student.model, revision=student.revision, seed=arguments.seed)
    training, held_out = data.datasets(arguments)
    _check_evaluation(arguments, held_out)
    targets_of = data.targets(world, arguments)
    _make_directory(arguments.output_dir)
    return DistillationTrainer(
        model,
        arguments,
        objective=data.objective,
        targets_of=targets_of,
        data_collator=data.collator,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=data.tokenizer,
    )


def _sizes(data: Data, arguments: TrainingArguments) -> dict[str, Any]:
    """Return what `load_student` wants to know beside the student's section and the tokenizer."""
    return {"vocab_size": data.vocab_size, "max_length": data.max_length, "seed": arguments.seed}


def _merge(student: StudentConfig, data: Data, arguments: TrainingArguments) -> None:
    """Save the whole student with its adapters merged in, in their stead."""
    with whole_weights(arguments):
        merge_adapters(
            Path(arguments.output_dir), load=lambda: load_student(student, data.tokenizer, **_sizes(data, arguments))
        )


def _run(trainer: DistillationTrainer, in_checkpoints: CheckpointRecord) -> dict[str, Any]:
    """Train, save the student, evaluate it; return what was measured, the time with that before a checkpoint."""
    try:
        with nullcontext() if trainer.args.disable_tqdm else logged_above_bars():
            return _trained(trainer, in_checkpoints)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        said = str(error).partition(". ")[0]
        raise RunError(
            f"a process that reads for training ended ({said}), most often for want of memory; go on from the last "
            "checkpoint with training.resume_from_checkpoint=true; with training.dataloader_num_workers=0 there is no "
            "such process"
        ) from error


def _trained(trainer: DistillationTrainer, in_checkpoints: CheckpointRecord) -> dict[str, Any]:
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    held_out, rows = trainer.eval_dataset or (), len(trainer.train_dataset)
    counts = {"train_samples": trainer.train_samples, "eval_samples": len(held_out)}
    metrics = {**result.metrics, "epoch": trainer.state.epoch, **counts}
    metrics["train_samples_per_second"] *= trainer.train_samples / rows  # the Trainer takes a row for a sample
    metrics["train_runtime"] += in_checkpoints.seconds_before
    metrics["train_runtime_before"] = in_checkpoints.seconds_before
    if held_out:
        metrics |= _last_evaluation(trainer) or trainer.evaluate()
        metrics["eval_calibration"] = trainer.calibration
    trainer.save_state()
    return metrics


def _last_evaluation(trainer: DistillationTrainer) -> dict[str, Any]:
    """Return what the Trainer has just measured of the weights that are saved; nothing where it has not."""
    state = trainer.state
    if trainer.args.load_best_model_at_end:
        return {}
    entries = (entry for entry in reversed(state.log_history) if "eval_positions" in entry)
    last = next(entries, {"step": None})
    return {name: value for name, value in last.items() if name != "step"} if last["step"] == state.global_step else {}


def _check_evaluation(arguments: TrainingArguments, held_out: Any) -> None:
    if not held_out and arguments.eval_strategy != "no":
        raise ConfigError(
            f"training.eval_strategy is {arguments.eval_strategy.value}, but no sample is held out; set it to "
            "'no', or dataset.eval_samples above 0"
        )


def _make_directory(path: str) -> None:
    """Make the output directory, before the Trainer does, with a sentence where it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"training.output_dir: {path} cannot be made: {error.strerror}") from error


if __name__ == "__main__":
    end(main())
