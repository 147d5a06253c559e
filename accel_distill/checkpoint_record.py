"""What a checkpoint must say for training to go on from it: which data it went over, and how much of it a step took.

The one decision: the record is part of the Trainer's own `trainer_state.json`, as the state of a callback, so that it
is there whenever a checkpoint is. Another cache, another number of samples or another global batch would silently go on
over other samples than those that are left; so each is refused with both values.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.figures import number_of
from accel_distill.manifest import differences
from accel_distill.regular_file import MEBIBYTE, parse_json_object, read_regular

log = logging.getLogger("accel_distill.train")

ANEW = "start anew with training.resume_from_checkpoint=null and another training.output_dir"
LARGEST_STATE = 256 * MEBIBYTE  # bytes of a trainer_state.json: it holds the whole log


@dataclass(frozen=True)
class DataRecord:
    """What a step of training from a cache depends on, beside the model and the seed."""

    cache_id: str
    samples: int  # of the stream, in the shards that are trained on
    content_sha256: str  # of these shards
    eval_samples: int
    global_batch: int  # rows a step: per device, times accumulation, times processes
    packing: bool = False  # whether a row is several samples
    sampling: str = "random"  # training.train_sampling_strategy


@dataclass(frozen=True)
class OnlineRecord:
    """What a step of training with an online teacher depends on, beside the model and the seed."""

    made_from: dict[str, Any]  # what identifies teacher, tokenizer, dataset, sequences and targets
    samples: int | None  # of the stream, at most
    eval_samples: int
    global_batch: int


class CheckpointRecord(TrainerCallback, ExportableState):
    """Puts a `DataRecord` or an `OnlineRecord` into every checkpoint, and how long training took until then."""

    def __init__(self, **record: Any) -> None:
        """Take the fields of a record."""
        self.record = record
        self.seconds_before = 0.0  # that training took until the checkpoint from which it went on
        self._begun = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes."""
        seconds = self.seconds_before + time.monotonic() - self._begun
        return {"args": self.record, "attributes": {"seconds": seconds}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the time so far; make room for the record in a checkpoint's state of an older version."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and state.global_step:
            self.seconds_before = float(saved.get("attributes", {}).get("seconds", 0.0))
        self._begun = time.monotonic()
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


def check_resumable(checkpoint: Path, record: DataRecord | OnlineRecord) -> None:
    """Raise CacheMismatch, or ConfigError for another batch, where a checkpoint was made from other data."""
    try:
        state = parse_json_object(read_regular(checkpoint / "trainer_state.json", limit=LARGEST_STATE))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"training.resume_from_checkpoint: {checkpoint / 'trainer_state.json'} cannot be read ({reason}); name "
            "another checkpoint"
        ) from error
    callbacks = state.get("stateful_callbacks")
    saved = callbacks.get(CheckpointRecord.__name__) if isinstance(callbacks, dict) else None
    before = saved.get("args") if isinstance(saved, dict) else None
    if not isinstance(before, dict):
        log.warning(
            "%s does not say what it was trained on (an older version made it): whether cache and batch are the same "
            "is not known",
            checkpoint,
        )
        return
    was_online, is_online = "made_from" in before, isinstance(record, OnlineRecord)
    if was_online != is_online:
        mode, before_mode = (("cached", "online")[online] for online in (is_online, was_online))
        raise ConfigError(
            f"teacher.mode is {mode} in this run and was {before_mode} in {checkpoint}; set it back, or {ANEW}"
        )
    sampling = getattr(record, "sampling", "random")
    older = {"packing": False, "sampling": sampling if sampling == "sequential" else "random"}
    for name, now in vars(record).items():
        if (then := before.get(name, older.get(name))) != now:
            raise _refused(name, then, now, checkpoint, is_online=is_online)


def check_same_backend(checkpoint: Path, *, distributed_type: str, world_size: int, on_each_node: bool = False) -> None:
    """Raise ConfigError where this run cannot read the optimizer's state that a checkpoint holds.

    With `on_each_node` (training.save_on_each_node) a node has the parts of its own processes only: not counted.
    Without DeepSpeed the Trainer would pass over what DeepSpeed has saved, and begin with an optimizer of no memory.
    """
    divided = list(checkpoint.glob("global_step*/*_optim_states.pt"))
    is_deepspeed = distributed_type == "DEEPSPEED"
    if is_deepspeed == bool(divided) and (not divided or on_each_node or len(divided) == world_size):
        return
    made = f"by {number_of(len(divided), 'process')} with DeepSpeed" if divided else "without DeepSpeed"
    now = f"{number_of(world_size, 'process')} with{'' if is_deepspeed else 'out'} it"
    raise ConfigError(
        f"training.resume_from_checkpoint: {checkpoint} was saved {made}, and the state of its optimizer cannot be "
        f"read by {now}; go on as it was begun, or begin anew from its weights with student.model"
    )


def _refused(name: str, then: Any, now: Any, checkpoint: Path, *, is_online: bool) -> ConfigError | CacheMismatch:
    if name == "global_batch":
        return ConfigError(
            f"training: a step takes {now} rows in this run (per_device_train_batch_size x "
            f"gradient_accumulation_steps x processes), and took {then} in {checkpoint}; set them so that it does, or "
            f"{ANEW}"
        )
    if name in ("packing", "sampling"):
        key = "packing" if name == "packing" else "train_sampling_strategy"
        return ConfigError(
            f"training.{key} is {str(now).lower()} in this run and {str(then).lower()} in {checkpoint}, so the epoch "
            f"would go on over other samples than those that are left; set it back, or {ANEW}"
        )
    if name == "eval_samples":
        return ConfigError(
            f"dataset.eval_samples is {now} in this run and {then} in {checkpoint}, so samples that were held out "
            f"would be trained on, or the other way round; set it back, or {ANEW}"
        )
    if name == "made_from":
        changed = differences(then, now, where=str(checkpoint))[0]
        return CacheMismatch(f"training goes on with other data than before: {changed}; set it back, or {ANEW}")
    if name == "samples" and is_online:
        return ConfigError(
            f"dataset.max_samples is {now} in this run and was {then} in {checkpoint}, so the steps to come would be "
            f"others; set it back, or {ANEW}"
        )
    if name == "cache_id":
        return CacheMismatch(
            f"cache.path: it is the cache {now}, and in {checkpoint} it was {then}; set it back, or {ANEW}"
        )
    went_over, back = f"as {checkpoint} went over them", f"bring back a copy of the cache as it was, or {ANEW}"
    if name == "samples" and isinstance(now, int) and isinstance(then, int):
        how = "grown" if now > then else "shrunk"
        return CacheMismatch(f"cache.path: the cache has {how} from {then} samples, {went_over}, to {now}; {back}")
    return CacheMismatch(
        f"cache.path: the shards of the cache are not those that {checkpoint} went over ({name} {now}, and there "
        f"{then}); {back}"
    )
