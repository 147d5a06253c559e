"""What a run with an online teacher takes from its dataset and its teacher, and what its checkpoints say of them.

The one decision: nothing is stored, so a run is told apart from another by what it is made from: hashes of the
teacher's files or its commit, and so of the dataset, which rank 0 finds and every rank then names. It costs reading the
files of a local teacher and dataset once when a run begins.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainingArguments

from accel_distill.batch_targets import TargetsOf
from accel_distill.checkpoint_record import OnlineRecord
from accel_distill.config import RunConfig
from accel_distill.divided import check_parallelism
from accel_distill.errors import ConfigError
from accel_distill.identity import check_length, dataset_identity, pinned, teacher_identity
from accel_distill.losses import Objective
from accel_distill.noted_stream import NotedStream
from accel_distill.online_targets import OnlineTargets
from accel_distill.processes import World, whole_weights
from accel_distill.stream import TextStream
from accel_distill.teacher import Sampling, load_teacher, load_teacher_config
from accel_distill.text_collator import TextCollator
from accel_distill.text_rows import MapRows, StreamRows, Texts
from accel_distill.tokens import SequenceRule, load_tokenizer, pad_token_id, tokenizer_identity

log = logging.getLogger("accel_distill.train")


class OnlineData:
    """The dataset and the teacher of a run, as training wants them."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Open the dataset and find what identifies it and the teacher; every process calls it.

        Raises ConfigError for a dataset, teacher or tokenizer that is not there or does not fit, and for a
        `teacher.parallelism` that so many processes cannot have.
        """
        self._made_from, self._pieces = world.from_main(lambda: _look(config, world_size=world.world_size))
        dataset, teacher = self._made_from["dataset"], self._made_from["teacher"]
        self._config = config = pinned(config, teacher=teacher, source=dataset["source"])
        self.cache = None  # of a run with one: for the record of what a run was trained on
        self.vocab_size, self.max_length = teacher["vocab_size"], config.dataset.max_length
        self.tokenizer: PreTrainedTokenizerBase = _tokenizer(config)
        self._texts = _texts(config, self.tokenizer, vocab_size=self.vocab_size)
        targets = config.targets
        self.objective = Objective(kind=targets.method, temperature=targets.temperature, **config.loss.model_dump())
        self.collator = TextCollator(pad_token_id=pad_token_id(self.tokenizer))

    def record(self, *, global_batch: int) -> OnlineRecord:
        """Return what the run's checkpoints say of its data; `global_batch` samples are a step."""
        dataset = self._config.dataset
        return OnlineRecord(self._made_from, dataset.max_samples, dataset.eval_samples, global_batch)

    def datasets(self, arguments: TrainingArguments) -> tuple[Any, Any]:
        """Return what to train on and what is held out, or None where nothing is."""
        dataset = self._config.dataset
        held_out = self._texts.first_rows(dataset.eval_samples) or None
        if dataset.streaming:
            return self._stream_rows(arguments), held_out
        stop = _samples(self._config, self._texts.stream)
        training = MapRows(self._texts, first=dataset.eval_samples, stop=stop, pieces=self._pieces)
        log.info("%s samples to train on, %s held out", f"{training.samples:,}", f"{dataset.eval_samples:,}")
        return training, held_out

    def _stream_rows(self, arguments: TrainingArguments) -> StreamRows:
        dataset = self._config.dataset
        assert dataset.max_samples is not None
        multiple = arguments.per_device_train_batch_size * arguments.world_size
        stream = NotedStream(
            self._texts.stream.read,
            Path(str(arguments.output_dir)),
            source=self._made_from["dataset"]["source"],
            is_writer=arguments.process_index == 0,
        )
        rows = StreamRows(self._texts, stream, first=dataset.eval_samples, stop=dataset.max_samples, multiple=multiple)
        steps = -(-len(rows) // multiple // arguments.gradient_accumulation_steps)
        if arguments.max_steps > steps:
            raise ConfigError(
                f"training.max_steps is {arguments.max_steps:,}, but dataset.max_samples leaves {rows.samples:,} "
                f"samples to train on, which are {steps:,} steps, and a stream is read once; lower it, or raise "
                "dataset.max_samples"
            )
        log.info("at most %s samples to train on, %s held out", f"{rows.samples:,}", f"{dataset.eval_samples:,}")
        return rows

    def targets(self, world: World, arguments: TrainingArguments) -> TargetsOf:
        """Load the teacher, as `teacher.parallelism` says, and return what makes the targets of a batch."""
        targets, valid_ids = self._config.targets, self._made_from["tokenizer"]["size"]
        with whole_weights(arguments):
            teacher = load_teacher(
                self._config.teacher, device=world.device, valid_ids=valid_ids, world_size=world.world_size
            )
        if teacher.vocab_size != self.vocab_size:
            raise ConfigError(
                f"teacher.model: {self._config.teacher.model} has an output layer of {teacher.vocab_size} ids, but its "
                f"config says vocab_size {self.vocab_size}"
            )
        if targets.method == "dense":
            return OnlineTargets(teacher, None)
        sampling = Sampling(targets.sampled, float(targets.parameter), targets.temperature, targets.seed)
        return OnlineTargets(teacher, sampling)


def one_pass(config: RunConfig) -> dict[str, Any]:
    """Return section `training`; of a stream that an online teacher reads, with the one epoch that it has."""
    once = config.teacher.mode == "online" and config.dataset.streaming
    return {**config.training, "num_train_epochs": 1} if once else config.training


def _look(config: RunConfig, *, world_size: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return what the run is made from and, where documents are split, their pieces; for rank 0."""
    check_parallelism(config.teacher.parallelism, world_size=world_size)
    for unused in _unused_keys(config):
        log.warning("%s", unused)
    model = load_teacher_config(config.teacher)
    check_length(config, model.get_text_config())
    tokenizer = _tokenizer(config)
    texts = _texts(config, tokenizer, vocab_size=model.get_text_config().vocab_size)
    targets, eval_samples = config.targets, config.dataset.eval_samples
    kept = {"method", "temperature"} if targets.method == "dense" else {"method", "parameter", "temperature", "seed"}
    made_from = {
        "teacher": teacher_identity(config.teacher, model),
        "tokenizer": tokenizer_identity(tokenizer),
        "dataset": dataset_identity(config, texts.stream),
        "sequence": asdict(SequenceRule.of(config.dataset)),
        "targets": {name: getattr(targets, name) for name in sorted(kept)},
    }
    samples = _samples(config, texts.stream)
    if samples <= eval_samples:
        raise ConfigError(
            f"dataset {config.dataset.name}: of its {samples:,} samples none is left to train on, with "
            f"dataset.eval_samples={eval_samples}; lower it"
        )
    split = config.dataset.long_documents == "split"
    return made_from, texts.count_pieces(eval_samples, samples) if split else None


def _samples(config: RunConfig, stream: TextStream) -> int:
    """Return how many samples there are, with those held out; of a stream how many there may be."""
    return min(count for count in (config.dataset.max_samples, stream.length) if count is not None)


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    teacher = config.teacher
    return load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)


def _texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> Texts:
    rule = SequenceRule.of(config.dataset)
    return Texts(TextStream(config.dataset), rule=rule, tokenizer=tokenizer, vocab_size=vocab_size)


def _unused_keys(config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each thing in a run file that an online teacher has no use for."""
    if config.cache is not None:
        yield "section cache is not used: teacher.mode is online"
    if "tokens_per_batch" in config.teacher.model_fields_set:
        yield "teacher.tokens_per_batch is not used: a batch of an online teacher is the student's"
    if config.targets.method == "dense":
        for name in sorted(config.targets.model_fields_set - {"method", "temperature"}):
            yield f"targets.{name} is not used: targets.method is dense"
