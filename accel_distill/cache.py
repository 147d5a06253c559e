"""`TeacherCache`: a complete cache as a map-style dataset of samples.

The one decision: it is a path and a list of shards; files are opened lazily in each process, checked before the first
byte is used, and a few are kept open. Nothing is opened when it is made, so it pickles to dataloader workers.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accel_distill.codec import STAT_STEPS, Method, decode
from accel_distill.errors import CacheMismatch, DamagedCache
from accel_distill.manifest import Record, manifest_entry, read_manifest, read_record
from accel_distill.rows import COUNTED_BY, Rows
from accel_distill.shard import ShardFile
from accel_distill.shard_checks import check_dealing, check_rows

if TYPE_CHECKING:
    from torch import Tensor

    from accel_distill.targets import SparseTargets

OPEN_SHARDS = 8


@dataclass(frozen=True)
class CachedSample:
    """One row of a cache. The target at position i is the teacher's distribution of token i + 1."""

    sample_index: int  # in stream order
    input_ids: "Tensor"  # (T,) int64
    target_mask: "Tensor"  # (T,) bool: the positions that carry a target
    targets: "SparseTargets"  # of those positions, in order
    teacher_entropy: float  # nats, summed over those positions, at the cache's temperature
    teacher_logprob: float  # of the true next tokens at temperature 1, summed likewise


class TeacherCache:
    """The samples of a cache in stream order: `len(cache)`, `cache[n]`; a map-style dataset for any DataLoader."""

    def __init__(self, path: str | Path) -> None:
        """Read what the cache at `path` is; raise ConfigError where there is none, CacheMismatch while incomplete."""
        self._record = read_record(Path(path))
        manifest = read_manifest(self._record)
        if manifest is None:
            raise CacheMismatch(
                f"cache {path}: it is not complete (no manifest.json); run the same generate command again, "
                "which makes what is missing"
            )
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self.samples: int = manifest["samples"]  # of the stream
        self._length: int = manifest["sums"]["sequences"]
        self._open: OrderedDict[int, _Rows] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> CachedSample:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of a cache of {len(self)}")
        shard, row = self._places[item]
        return self._rows(int(shard)).sample(int(row))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def path(self) -> Path:
        """The cache's directory."""
        return self._record.path

    @property
    def identity(self) -> dict[str, Any]:
        """What the cache was made from."""
        return self._record.identity

    @property
    def cache_id(self) -> str:
        """The sha256 of the identity."""
        return self._record.cache_id

    @property
    def method(self) -> Method:
        """The targets' method."""
        return self._record.method

    @property
    def parameter(self) -> float:
        """The threshold, k, or the number of draws."""
        return self._record.parameter

    @property
    def temperature(self) -> float:
        """What the teacher's logits were divided by."""
        return self.identity["targets"]["temperature"]

    @property
    def vocab_size(self) -> int:
        """The width of the teacher's output layer."""
        return self._record.vocab_size

    @property
    def tokenizer_size(self) -> int:
        """How many ids the tokenizer can make."""
        return self.identity["tokenizer"]["size"]

    @property
    def max_length(self) -> int:
        """The longest row, in tokens."""
        return self.identity["sequence"]["max_length"]

    @property
    def tokenizer_path(self) -> Path:
        """Where the teacher's tokenizer is saved."""
        return self.path / "tokenizer"

    @cached_property
    def sample_indices(self) -> np.ndarray:
        """(len,) int64: the index in the stream of each item's sample."""
        return self._indices_and_places[0]

    @cached_property
    def has_target(self) -> np.ndarray:
        """(len,) bool: whether a position of an item carries a target; opens only shards where one has none."""
        parts = [np.zeros(0, bool)]
        for number, shard in enumerate(self._shards):
            all_have = np.ones(shard["sequences"], bool)
            parts.append(self._rows(number).has_target if shard["untargeted"] else all_have)
        return np.concatenate(parts)[self._order]

    @property
    def _places(self) -> np.ndarray:
        """(len, 2): shard and row of each item."""
        return self._indices_and_places[1]

    @cached_property
    def _indices_and_places(self) -> tuple[np.ndarray, np.ndarray]:
        order, indices = self._order, self._unordered_indices
        shards = np.repeat(np.arange(len(self._shards)), [shard["sequences"] for shard in self._shards])
        rows = np.concatenate([np.arange(shard["sequences"]) for shard in self._shards] or [np.zeros(0, np.int64)])
        return indices[order], np.stack([shards, rows], axis=1)[order]

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self._unordered_indices, kind="stable")

    @cached_property
    def _unordered_indices(self) -> np.ndarray:
        """Sample indices, shard after shard: computed where a sample is one row, else read from the shards."""
        layout, parts = self._record.layout, [np.zeros(0, np.int64)]
        for number, shard in enumerate(self._shards):
            if shard["sequences"] == shard["samples"]:
                first = layout.first_sample(shard["group"], shard["lane"])
                parts.append(first + layout.lanes * np.arange(shard["samples"]))
            else:
                parts.append(self._rows(number).sample_indices)
        return np.concatenate(parts)

    def _rows(self, number: int) -> "_Rows":
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._shards[number]
        path = self._record.shard_path(shard["group"], shard["lane"], shard["samples"])
        rows = self._open[number] = _Rows(path, self._record, expected=shard)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return rows


class _Rows:
    """The rows of one open shard."""

    def __init__(self, path: Path, record: Record, *, expected: dict[str, Any]) -> None:
        """Open the shard; `expected` is what the manifest says of it."""
        self._file, self._record = ShardFile(path, dtypes=record.dtypes), record
        header = self._file.header
        if (found := manifest_entry(path.name, header)) != expected:
            key = next(key for key in found if found[key] != expected[key])
            raise self._damaged(f"its {key} is {found[key]!r}, but manifest.json says {expected[key]!r}")
        self.sample_indices = self._exactly(header.sequences, "sample_index")
        try:
            check_dealing(record, header, self.sample_indices)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self._tokens = self._offsets("token_offsets", header.tokens)
        self._positions = self._offsets("target_offsets", header.positions)
        self._heads = self._offsets("head_offsets", self._file.length("head_ids"))
        tails = self._file.length("tail_ids") if "tail_ids" in record.dtypes else 0
        self._tails = self._offsets("tail_offsets", tails)
        counted = {"tokens": header.tokens, "positions": header.positions}
        counted |= {"heads": self._file.length("head_ids"), "tails": tails}
        for name in record.dtypes.keys() & COUNTED_BY.keys():
            self._expect(name, counted[COUNTED_BY[name]])
        self._expect("input_ids", header.tokens)
        packed = self._exactly(-(-header.tokens // 8), "target_mask")
        self._mask = np.unpackbits(packed, bitorder="little", count=header.tokens).astype(bool)
        self._stats = {name: self._exactly(header.sequences, name) / STAT_STEPS for name in ("entropy", "logprob")}

    @property
    def has_target(self) -> np.ndarray:
        return np.diff(self._positions) > 0

    def sample(self, row: int) -> CachedSample:
        import torch

        from accel_distill.targets import SparseTargets

        record = self._record
        tokens = slice(self._tokens[row], self._tokens[row + 1])
        positions = (self._positions[row], self._positions[row + 1])
        heads, tails = (self._heads[row], self._heads[row + 1]), (self._tails[row], self._tails[row + 1])
        ranges = {"head_count": positions, "head_ids": heads, "head_values": heads}
        ranges |= {"tail_count": positions, "tail_ids": tails, "tail_values": tails}
        columns = {name: self._file.read(name, *ranges[name]) for name in ranges if name in record.dtypes}
        try:
            arrays = decode(columns, method=record.method, parameter=record.parameter, ids_by_rank=record.ids_by_rank)
            ids = record.ids_by_rank[self._file.read("input_ids", tokens.start, tokens.stop)].astype(np.int64)
            rows = Rows(
                self.sample_indices[row : row + 1],
                np.array([0, len(ids)]),
                np.array([0, len(arrays["head_count"])]),
                ids,
                self._mask[tokens],
                arrays,
                self._stats["entropy"][row : row + 1],
                self._stats["logprob"][row : row + 1],
            )
            check_rows(record, rows, every_position=not self._file.header.nonfinite, distinct=False)
        except (ValueError, IndexError) as error:
            raise self._damaged(f"row {row}: {error}") from error
        return CachedSample(
            sample_index=int(self.sample_indices[row]),
            input_ids=torch.from_numpy(ids),
            target_mask=torch.from_numpy(self._mask[tokens].copy()),
            targets=SparseTargets.from_arrays(arrays, method=record.method, parameter=record.parameter),
            teacher_entropy=float(self._stats["entropy"][row]),
            teacher_logprob=float(self._stats["logprob"][row]),
        )

    def close(self) -> None:
        self._file.close()

    def _offsets(self, name: str, end: int) -> np.ndarray:
        """Read an offsets column; it must ascend from 0 to `end`, one more than there are rows."""
        found = self._exactly(self._file.header.sequences + 1, name)
        if found[0] != 0 or found[-1] != end or np.diff(found).min(initial=0) < 0:
            raise self._damaged(f"column {name} does not ascend from 0 to {end}")
        return found

    def _exactly(self, length: int, name: str) -> np.ndarray:
        """Read a whole column, which must have `length` elements."""
        self._expect(name, length)
        return self._file.read(name)

    def _expect(self, name: str, length: int) -> None:
        if self._file.length(name) != length:
            raise self._damaged(f"column {name} has {self._file.length(name)} elements, expected {length}")

    def _damaged(self, what: str) -> DamagedCache:
        return DamagedCache(f"shard {self._file.path}: {what}; delete this file and run generate again")
