"""What a run file may say with the teacher in the training process (`teacher.mode: online`), and which commands it has.

The one decision: what cannot be meant is refused, and what is merely unused (section `cache`, say) is named once and
ignored: so `teacher.mode=online` turns a run file with a cache into one without it. It costs a line of the log.
"""

from collections.abc import Mapping
from typing import Any

from accel_distill.errors import ConfigError
from accel_distill.explain import WrongValue, mismatch

NO_CACHE_OF_DENSE = (
    "dense targets are all of the teacher's logits, which no cache holds; expected threshold, top_k or random, or "
    "teacher.mode=online"
)
ONE_PASS = (
    "a stream is trained on once, in its order, and not read again; set it to 1, with a larger dataset.max_samples for "
    "more steps, or take dataset.streaming=false, or a cache (teacher.mode=cached), for several epochs"
)
# What section `training` may not say of a stream: the values that it may, and why no other.
OF_A_STREAM: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_train_epochs": ((1,), ONE_PASS),
    "train_sampling_strategy": (("sequential",), "a stream is trained on in its order; leave it out"),
    "dataloader_drop_last": ((False,), "no sample of a stream is left out; leave it out"),
    "ignore_data_skip": ((False,), "a resumed run would train on the samples of before again; leave it out"),
}


def check_online(training: Mapping[str, Any], *, on_nonfinite: str, streaming: bool, long_documents: str) -> None:
    """Raise WrongValue for what a run with an online teacher cannot do."""
    if on_nonfinite == "skip":
        raise WrongValue(
            "teacher.on_nonfinite",
            "skip leaves positions out of a cache; with teacher.mode=online a loss that is not finite ends the run; "
            "expected stop",
        )
    if training.get("packing"):
        raise WrongValue("training.packing", "packs the samples of a cache; leave it out with teacher.mode=online")
    if training.get("train_sampling_strategy") not in (None, "random", "sequential"):
        raise WrongValue(
            "training.train_sampling_strategy",
            f"{mismatch(training['train_sampling_strategy'], 'random or sequential')}: the lengths of texts are known "
            "of a cache only, and teacher.mode is online",
        )
    if streaming:
        _check_stream(training, long_documents=long_documents)


def _check_stream(training: Mapping[str, Any], *, long_documents: str) -> None:
    if long_documents == "split":
        raise WrongValue(
            "dataset.long_documents",
            "split makes more samples than dataset.max_samples says, so the steps of a stream would not be known; "
            "expected truncate, or dataset.streaming=false",
        )
    for name, (allowed, reason) in OF_A_STREAM.items():
        if training.get(name) is not None and training[name] not in allowed:
            expected = " or ".join(str(value).lower() for value in allowed)
            raise WrongValue(f"training.{name}", f"{mismatch(training[name], expected)}: {reason}")


def refuse_without_cache(mode: str, command: str) -> None:
    """Raise ConfigError where a command that makes or measures a cache is given a run without one."""
    if mode == "online":
        raise ConfigError(
            f"teacher.mode is online: the teacher runs while the student trains, so there is no cache for {command}; "
            "run train, or set teacher.mode=cached and name a cache.path"
        )
