"""What a run takes from its cache: tokenizer, samples, targets, and what its checkpoints say of them.

The one decision: what the cache knows (tokenizer, temperature, method, length) is taken from the cache and not from the
run file; what the run file says about its targets all the same must agree. The teacher is not needed, so a cache can be
taken to a machine that has never seen it.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from accel_distill.batch_targets import TargetsOf, cached_targets
from accel_distill.cache import TeacherCache
from accel_distill.checkpoint_record import DataRecord
from accel_distill.collator import CachedLogitCollator
from accel_distill.config import LossConfig, RunConfig
from accel_distill.errors import CacheMismatch, ConfigError, DamagedCache
from accel_distill.losses import Objective
from accel_distill.manifest import differences, read_plan
from accel_distill.packs import PackedCache
from accel_distill.padding import padding_report
from accel_distill.processes import World
from accel_distill.tokens import load_tokenizer, pad_token_id, tokenizer_identity
from accel_distill.training_arguments import is_grouped, is_packed

log = logging.getLogger("accel_distill.train")

PARAMETER_NAMES = {"threshold": "threshold", "top_k": "top_k", "random": "draws"}


class CachedData:
    """The cache of a run, as training wants it."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Open the cache; every process calls it. Raises what `_open` raises."""
        self._config = config
        self.cache = world.from_main(lambda: _open(config))
        self.cache.processes = world.world_size
        self.vocab_size, self.max_length = self.cache.vocab_size, self.cache.max_length
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.cache.tokenizer_path)
        self.objective = objective(config.loss, self.cache)
        self.collator = CachedLogitCollator(pad_token_id=pad_token_id(self.tokenizer))

    def record(self, *, global_batch: int) -> DataRecord:
        """Return what the run's checkpoints say of its data; `global_batch` samples are a step."""
        cache, eval_samples = self.cache, self._config.dataset.eval_samples
        training = self._config.training
        return DataRecord(
            cache.cache_id,
            cache.samples,
            cache.content_sha256,
            eval_samples,
            global_batch,
            packing=is_packed(training),
            sampling=str(training.get("train_sampling_strategy") or "random"),
        )

    def datasets(self, arguments: TrainingArguments) -> tuple[Any, Any]:
        """Return what to train on and what is held out, or None where nothing is."""
        training, held_out = split_items(self.cache, eval_samples=self._config.dataset.eval_samples)
        samples: Any = self.cache  # map-style, as torch's Dataset, which it does not inherit from
        is_plain = not is_packed(self._config.training)
        rows: Any = Subset(samples, training)
        if not is_plain:
            rows = PackedCache(self.cache, training, most=self.cache.max_length)
        if report := padding_report(rows, Subset(samples, training), arguments):
            log.info("%s", report)
        return rows, Subset(samples, held_out) if held_out else None

    def targets(self, world: World, arguments: TrainingArguments) -> TargetsOf:
        """Return what makes the targets of a batch."""
        return cached_targets


def _open(config: RunConfig) -> TeacherCache:
    """Open the cache and see that it is this run's, on rank 0: so that what is wrong is said once."""
    cache = TeacherCache(config.cache.path, allow_partial=config.cache.allow_partial)
    if not cache.complete:
        plan = read_plan(cache.path)
        planned = f"{plan['max_samples']:,}" if plan and plan["max_samples"] else "all"
        log.warning(
            "cache %s is not complete: training uses the %s of %s samples that are there now",
            cache.path,
            f"{cache.samples:,}",
            planned,
        )
    check_settings(config, cache)
    tokenizer = load_tokenizer(cache.tokenizer_path)
    if changed := differences(cache.identity["tokenizer"], tokenizer_identity(tokenizer)):
        raise DamagedCache(
            f"{cache.tokenizer_path}: it is not the tokenizer that the cache was made with ({changed[0]}); copy it "
            "from the teacher again"
        )
    if is_packed(config.training) or is_grouped(config.training):
        _ = cache.lengths  # read once, and handed to the other ranks with the cache
    return cache


def check_settings(config: RunConfig, cache: TeacherCache) -> None:
    """Raise CacheMismatch where the run file says anything of targets or text that is not so in the cache."""
    identity = cache.identity
    made: dict[str, dict[str, Any]] = {
        "targets": {
            "method": cache.method,
            PARAMETER_NAMES[cache.method]: cache.parameter,
            "temperature": cache.temperature,
            "seed": identity["targets"]["seed"],
        },
        "dataset": {
            **{name: identity["dataset"][name] for name in ("name", "config_name", "split", "text_column")},
            **identity["sequence"],
        },
    }
    for section, values in made.items():
        said = getattr(config, section)
        for name, value in values.items():
            found = getattr(said, name)
            same = found == value or (name == "name" and Path(found).name == value)  # a directory's path may change
            if name in said.model_fields_set and not same:
                raise CacheMismatch(
                    f"{section}.{name} is {found}, but the cache {cache.path} was made with {value}; leave it out "
                    "(training takes it from the cache), or generate a cache with it under another cache.path"
                )
    wanted = config.dataset.max_samples
    if wanted is not None and wanted < cache.samples:
        log.warning("dataset.max_samples is %s, but training uses the whole cache: %s samples", wanted, cache.samples)


def objective(loss: LossConfig, cache: TeacherCache) -> Objective:
    """Return section `loss` for the targets of the cache; raise ConfigError where these do not allow it."""
    try:
        return Objective(kind=cache.method, temperature=cache.temperature, **loss.model_dump())
    except ValueError as error:
        raise ConfigError(f"section loss: {error}") from error


def split_items(cache: TeacherCache, *, eval_samples: int) -> tuple[list[int], list[int]]:
    """Return the items to train on and the held-out ones, whose sample index is below `eval_samples`.

    An item without any target teaches nothing and is left out of training, which is said once.
    """
    is_held_out = cache.sample_indices < eval_samples
    training = np.flatnonzero(~is_held_out & cache.has_target).tolist()
    held_out = np.flatnonzero(is_held_out).tolist()
    if not training:
        raise ConfigError(
            f"cache {cache.path}: of its {len(cache):,} samples none is left to train on, with "
            f"dataset.eval_samples={eval_samples}; lower it, or generate more"
        )
    without = int((~is_held_out & ~cache.has_target).sum())
    log.info(
        "%s samples to train on (%s without a target left out), %s held out",
        *(f"{number:,}" for number in (len(training), without, len(held_out))),
    )
    return training, held_out
