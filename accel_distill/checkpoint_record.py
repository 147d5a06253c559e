"""What a checkpoint must say for training to go on from it: which data it went over, and how much of it a step took.

The one decision: the record is part of the Trainer's own `trainer_state.json`, as the state of a callback, so that it
is there whenever a checkpoint is. Another cache, another number of samples or another global batch would silently go on
over other samples than those that are left; so each is refused with both values.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.regular_file import MEBIBYTE, parse_json_object, read_regular

log = logging.getLogger("accel_distill.train")

LARGEST_STATE = 256 * MEBIBYTE  # bytes of a trainer_state.json: it holds the whole log


@dataclass(frozen=True)
class DataRecord:
    """What a step of training depends on, beside the model and the seed."""

    cache_id: str
    samples: int  # of the stream, in the shards that are trained on
    content_sha256: str  # of these shards
    eval_samples: int
    global_batch: int  # rows a step: per device, times accumulation, times processes
    packing: bool = False  # whether a row is several samples
    sampling: str = "random"  # training.train_sampling_strategy


class CheckpointRecord(TrainerCallback, ExportableState):
    """Puts a `DataRecord` into every checkpoint."""

    def __init__(self, **record: Any) -> None:
        """Take the fields of a `DataRecord`."""
        self.record = DataRecord(**record)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes."""
        return {"args": asdict(self.record), "attributes": {}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make room for the record in the state that came from a checkpoint of an older version."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


def check_resumable(checkpoint: Path, record: DataRecord) -> None:
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
    older = {"packing": False, "sampling": record.sampling if record.sampling == "sequential" else "random"}
    for name, now in asdict(record).items():
        if (then := before.get(name, older.get(name))) != now:
            raise _refused(name, then, now, checkpoint)


def _refused(name: str, then: object, now: object, checkpoint: Path) -> ConfigError | CacheMismatch:
    anew = "start anew with training.resume_from_checkpoint=null and another training.output_dir"
    if name == "global_batch":
        return ConfigError(
            f"training: a step takes {now} rows in this run (per_device_train_batch_size x "
            f"gradient_accumulation_steps x processes), and took {then} in {checkpoint}; set them so that it does, or "
            f"{anew}"
        )
    if name in ("packing", "sampling"):
        key = "packing" if name == "packing" else "train_sampling_strategy"
        return ConfigError(
            f"training.{key} is {str(now).lower()} in this run and {str(then).lower()} in {checkpoint}, so the epoch "
            f"would go on over other samples than those that are left; set it back, or {anew}"
        )
    if name == "eval_samples":
        return ConfigError(
            f"dataset.eval_samples is {now} in this run and {then} in {checkpoint}, so samples that were held out "
            f"would be trained on, or the other way round; set it back, or {anew}"
        )
    if name == "cache_id":
        return CacheMismatch(
            f"cache.path: it is the cache {now}, and in {checkpoint} it was {then}; set it back, or {anew}"
        )
    went_over, back = f"as {checkpoint} went over them", f"bring back a copy of the cache as it was, or {anew}"
    if name == "samples" and isinstance(now, int) and isinstance(then, int):
        how = "grown" if now > then else "shrunk"
        return CacheMismatch(f"cache.path: the cache has {how} from {then} samples, {went_over}, to {now}; {back}")
    return CacheMismatch(
        f"cache.path: the shards of the cache are not those that {checkpoint} went over ({name} {now}, and there "
        f"{then}); {back}"
    )
