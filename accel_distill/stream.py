"""The text stream: a dataset opened, its texts in order, and its walk, cut into the shards that this rank makes.

The one decision: we count and deal ourselves, on the unsplit stream, before any filter. It costs that every rank reads
the whole stream; it buys the same samples for any number of ranks (the datasets library's own splits change the set of
samples with the number of ranks or of files).
"""

import hashlib
import itertools
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_distill.deal import Dealer, Layout
from accel_distill.errors import TO_GO_ON, CacheMismatch, ConfigError, DiskGuard, RunError
from accel_distill.publish import DISK_ERRORS
from accel_distill.reading import START, Mark, Reading, is_transient
from accel_distill.text_hash import Text, TextHash

if TYPE_CHECKING:
    import datasets

    from accel_distill.config import DatasetConfig

log = logging.getLogger(__name__)

LONGEST_REASON = 400  # characters of another library's message
COMMIT = re.compile(r"^hf://[^@]+@([0-9a-f]{40})/")


class TextStream:
    """The texts of a dataset's split in stream order; iterating starts at the first one each time."""

    def __init__(self, config: "DatasetConfig") -> None:
        """Open the dataset; raise ConfigError for a dataset, split, file or column that is not there."""
        self._config = config
        _check_data_files(config)
        builder = _builder(config)
        self._files, self._fallback = _files(builder.config.data_files or {}, config), builder.hash
        self._dataset: Any = _open(config, self._files, reader=builder.name)
        self.length = None if config.streaming else len(self._dataset)  # samples, where known
        self._first = self._dataset.state_dict() if config.streaming else None

    @cached_property
    def source(self) -> dict[str, Any]:
        """What identifies the text: no absolute path, but for local files their content, which takes reading them."""
        return _identity_of(self._files, fallback=self._fallback)

    @property
    def local_bytes(self) -> int | None:
        """The bytes of the split's files; None where not all are on this machine."""
        paths = [Path(file) for file in self._files]
        return sum(path.stat().st_size for path in paths) if paths and all(path.is_file() for path in paths) else None

    def __iter__(self) -> Iterator[Text]:
        """Yield the text of each sample; None where it has none."""
        return self.read()

    def read(self, start: Mark = START, *, tell: Callable[[str], None] = log.warning) -> Reading:
        """Read the texts from a sample on, one reading at a time; `tell` hears where the network failed."""
        return Reading(self._texts, state=self._state, name=self._config.name, start=start, tell=tell)

    def texts_at(self, indices: Sequence[int]) -> Iterator[Text]:
        """Yield the texts of some samples of a dataset that is not streamed."""
        for index, row in zip(indices, self._dataset.select(indices), strict=True):
            yield _text(row, self._config.text_column, index=index)

    def _texts(self, start: Mark) -> Iterator[Text]:
        """Open the dataset at a mark, once."""
        config, count, dataset = self._config, start.at, self._dataset
        try:
            if not config.streaming:
                dataset = dataset.select(range(start.at, len(dataset)))
            else:
                dataset.load_state_dict(start.state if start.at else self._first)
            for count, row in enumerate(_unsplit(dataset), start=start.at + 1):
                yield _text(row, config.text_column, index=count - 1)
        except _dataset_errors() as error:
            if is_transient(error):
                raise
            raise _refusal(f"dataset {config.name}: reading sample {count} failed", error) from error

    def _state(self) -> Any:
        """Return where the reading is, as the datasets library says it."""
        return self._dataset.state_dict() if self._config.streaming else None


def is_pinned(source: Mapping[str, Any]) -> bool:
    """Whether a `source` pins the content: a commit, or the hash of each file; and not a name or a fingerprint."""
    files = source.get("files")
    return "commit" in source or (isinstance(files, list) and all(isinstance(file, list) for file in files))


@dataclass(frozen=True)
class OpenShard:
    """The texts of one shard that is to be made."""

    group: int
    lane: int
    texts: list[Text]


class Walk:
    """One pass over the stream: yields the shards of this rank, and checks the texts of those that are there."""

    def __init__(
        self,
        texts: Iterator[Text],
        *,
        layout: Layout,
        max_samples: int | None,
        committed: Mapping[tuple[int, int], tuple[int, str]],
        rank: int,
        world_size: int,
        first_group: int = 0,
    ) -> None:
        """`committed`: (group, lane) to the number of samples and the hash of the texts of the shard that is there.

        `texts` begin with the first sample of `first_group`; every group before it is committed.
        """
        self._texts, self._layout, self._max_samples = texts, layout, max_samples
        self._committed = committed
        counts = {place: samples for place, (samples, _) in committed.items()}
        self._dealer = Dealer(layout, counts, rank=rank, world_size=world_size)
        self._first_group = first_group
        self.total = (
            first_group * layout.group_samples
        )  # samples seen, or passed over; at the end, those of the whole stream
        self.stream_end: str | None = None  # "cap" or "exhausted", known at the end

    def __iter__(self) -> Iterator[OpenShard]:
        """Yield this rank's shards, each once its last sample has come."""
        for group in itertools.count(self._first_group):
            kept, hashes = self._read_group(group)
            self._check_committed(group, hashes)
            for lane in self._dealer.deal(group, self.total):
                yield OpenShard(group, lane, kept.pop(lane))
            if self.stream_end is not None:
                break
        self._check_end()

    def _read_group(self, group: int) -> tuple[dict[int, list[Text]], dict[int, "TextHash"]]:
        """Read on to the group's last sample; return the kept texts and the hashes of committed lanes."""
        lanes = range(self._layout.lanes)
        kept: dict[int, list[Text]] = {lane: [] for lane in self._dealer.lanes_to_keep(group)}
        hashes = {lane: TextHash(self._committed[group, lane][0]) for lane in lanes if (group, lane) in self._committed}
        end = (group + 1) * self._layout.group_samples
        while self.total < end:
            if self.total == self._max_samples:
                self.stream_end = "cap"
                break
            try:
                text = next(self._texts)
            except StopIteration:
                self.stream_end = "exhausted"
                break
            lane = self.total % self._layout.lanes
            self.total += 1
            if lane in kept:
                kept[lane].append(text)
            if lane in hashes:
                hashes[lane].add(text)
        return kept, hashes

    def _check_committed(self, group: int, hashes: Mapping[int, "TextHash"]) -> None:
        for lane, texts in hashes.items():
            samples, expected = self._committed[group, lane]
            if texts.hexdigest() != expected:
                first = self._layout.first_sample(group, lane)
                last = first + (samples - 1) * self._layout.lanes
                raise CacheMismatch(
                    f"the stream changed: samples {first} to {last} (lane {lane}, every {self._layout.lanes}) are not "
                    "the texts that the cache was made from; use the same dataset revision, or another cache.path"
                )

    def _check_end(self) -> None:
        last = max(self._committed, default=(0, 0))
        if self._layout.samples_in(*last, self.total) < self._committed.get(last, (0, ""))[0]:
            raise CacheMismatch(
                f"the stream changed: it ended after {self.total} samples, but the cache has a shard that starts at "
                f"sample {self._layout.first_sample(*last)}; use the same dataset revision, or another cache.path"
            )


def _check_data_files(config: "DatasetConfig") -> None:
    """Raise ConfigError for a local path or glob without a file: the library takes that for an empty dataset."""
    for pattern in config.missing_files():
        raise ConfigError(f"dataset.data_files: there is no file {pattern} (seen from {Path.cwd()})")


def _builder(config: "DatasetConfig") -> "datasets.DatasetBuilder":
    import datasets

    try:
        return datasets.load_dataset_builder(
            config.name, config.config_name, data_files=config.data_files, revision=config.revision
        )
    except _dataset_errors() as error:
        raise _refusal(f"dataset.name: {config.name} cannot be opened", error) from error


def _files(found: Mapping[str, Any], config: "DatasetConfig") -> list[str]:
    """Return the files of the split, in the order in which they are read; none where they are not known."""
    splits = [part.partition("[")[0].strip() for part in config.split.split("+")]  # train[:10%]+test
    files = [str(file) for split in splits for file in found.get(split, [])]
    if config.shuffle_files is not None:
        if not files or splits != [config.split]:
            raise ConfigError(
                f"dataset.shuffle_files: {config.shuffle_files}, but the files of {config.name} ({config.split}) are "
                f"not known; the splits with files are {sorted(found)}; use one of them whole, or shuffle_files=null"
            )
        random.Random(config.shuffle_files).shuffle(files)
    return files


def _identity_of(files: Sequence[str], *, fallback: str | None) -> dict[str, Any]:
    commits = {match[1] for match in map(COMMIT.match, files) if match}
    if commits:
        names = "\n".join(COMMIT.sub("", file) for file in files)  # in the order in which they are read
        listed = hashlib.sha256(names.encode()).hexdigest()
        return {"commit": ",".join(sorted(commits)), "files": len(files), "files_sha256": listed}
    local = [Path(file) for file in files]
    if not files or not all(path.is_file() for path in local):
        return {"fingerprint": fallback, "files": files if all("://" in file for file in files) else len(files)}
    return {"files": [[path.name, path.stat().st_size, file_sha256(path)] for path in local]}


def _open(
    config: "DatasetConfig", files: Sequence[str], *, reader: str
) -> "datasets.Dataset | datasets.IterableDataset":
    """Open the split and look at its first sample; `reader` reads `files` where they are not in the usual order."""
    import datasets

    source: dict[str, Any] = {"path": config.name, "name": config.config_name, "data_files": config.data_files}
    source["revision"] = config.revision
    if config.shuffle_files is not None:
        source = {"path": reader, "data_files": {config.split: list(files)}}
    try:
        dataset = datasets.load_dataset(**source, split=config.split, streaming=config.streaming)
        first = next(iter(dataset), None)
    except _dataset_errors() as error:
        raise _refusal(f"dataset {config.name} ({config.split})", error) from error
    if first is None:
        raise ConfigError(f"dataset {config.name} ({config.split}) is empty: there is no sample to run the teacher on")
    columns = sorted(first)
    if config.text_column not in first:
        raise ConfigError(f"dataset.text_column: {config.text_column!r} is not there; the columns are {columns}")
    _text(first, config.text_column, index=0)
    return dataset.select_columns([config.text_column])


def _text(row: Mapping[str, Any], column: str, *, index: int) -> Text:
    text = row[column]
    if text is None or isinstance(text, str):
        return text
    texts = sorted(name for name, value in row.items() if isinstance(value, str))
    kind = "a list (a chat?)" if isinstance(text, list) else type(text).__name__
    raise ConfigError(
        f"dataset.text_column: {column!r} holds {kind} at sample {index}, expected text"
        + (f"; the columns with text are {texts}" if texts else "")
    )


def _unsplit(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Iterate over a dataset; a streamed one gives each worker of a DataLoader all of it, not files of its own."""
    import fsspec
    from datasets import IterableDataset
    from torch.utils.data import get_worker_info

    if get_worker_info() is None or not isinstance(dataset, IterableDataset):
        yield from dataset
        return
    fsspec.asyn.reset_lock()  # as the datasets library does in a worker, which would wait for a thread that it has not
    for batch in dataset.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def _dataset_errors() -> tuple[type[BaseException], ...]:
    """What the datasets library raises for names, splits, files and rows that are not there or not readable."""
    from datasets.exceptions import DatasetsError

    return (DatasetsError, OSError, ValueError, RuntimeError, StopIteration)


def _refusal(what: str, error: BaseException) -> RunError:
    """Return what to raise for an error of the datasets library, whose own cache may be on a disk that is full."""
    full = DISK_ERRORS.get(getattr(error, "errno", None) or 0)
    if full is not None:
        where = getattr(error, "filename", None) or "HF_HOME says where the datasets library keeps its files"
        return DiskGuard(f"{what}: {full} ({where}); make room, {TO_GO_ON}")
    return ConfigError(f"{what}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    """Return what an exception of the datasets library says, in one line."""
    if isinstance(error, StopIteration):
        return "it is empty: there is no sample to run the teacher on"
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[:LONGEST_REASON] or type(cause).__name__


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
