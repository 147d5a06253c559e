"""`TeacherCache`: a cache as a map-style dataset of samples.

The one decision: it is a path and a list of shards; files are opened lazily in each process, checked before the first
byte is used, and a few are kept open. Nothing is opened when it is made, so it pickles to dataloader workers.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accel_distill.codec import Method, offsets
from accel_distill.errors import CacheMismatch
from accel_distill.manifest import Record, manifest_entry, read_manifest, read_record, settled_shards
from accel_distill.rows import RowReader, Rows, StoredRows, decode_rows, join_stored
from accel_distill.shard_checks import check_dealing, check_rows

if TYPE_CHECKING:
    from torch import Tensor

    from accel_distill.targets import SparseTargets

OPEN_BYTES = (
    64_000_000  # of the shard files that stay open, one at least; `threshold` decodes to 2 to 2.5 times as much
)
MOST_OPEN = 64  # shards, however small
BLOCK_TOKENS = 16_384  # decoded at once: fewer make the array operations small, more make a single sample slow


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

    def __init__(self, path: str | Path, *, allow_partial: bool = False) -> None:
        """Read what the cache at `path` is; raise ConfigError where there is none, CacheMismatch while incomplete.

        With `allow_partial` an incomplete cache is pinned to the shards that are there now; a copy of this object, in
        another process or later, has the same.
        """
        self._record = read_record(Path(path))
        manifest = read_manifest(self._record)
        self.complete: bool = manifest is not None
        self._shards: list[dict[str, Any]] = manifest["shards"] if manifest else []
        if manifest is None and allow_partial:
            self._shards = settled_shards(self._record)
        if manifest is None and not self._shards:
            raise CacheMismatch(
                f"cache {path}: it is not complete ({'it has no shard' if allow_partial else 'no manifest.json'}); run "
                "the same generate command again, which makes what is missing"
                + ("" if allow_partial else ", or train on what is there with cache.allow_partial=true")
            )
        self.samples: int = sum(shard["samples"] for shard in self._shards)  # of the stream
        self._length: int = sum(shard["sequences"] for shard in self._shards)
        self.processes = 1  # that read this cache, each other samples of one order; dataloader workers are seen
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> CachedSample:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of a cache of {len(self)}")
        shard, row = self._places[item]
        return self._shard(int(shard)).sample(int(row))

    def __getitems__(self, items: Sequence[int]) -> list[CachedSample]:
        """Return the samples of a batch, as torch's DataLoader asks for them.

        What one of several readers decodes alone, it decodes together: the array operations are few and large then.
        """
        places = self._places[np.asarray(items, np.int64)].tolist()
        if self._is_alone() or not places:
            return [self[item] for item in items]
        stored, every_position = [], True
        for number, row in places:
            shard = self._shard(number)  # which may be closed again before the last is open
            stored.append(shard.stored(row))
            every_position = every_position and shard.every_position
        record = self._record
        try:
            rows = decode_rows(
                join_stored(stored),
                method=record.method,
                parameter=record.parameter,
                ids_by_rank=record.ids_by_rank,
            )
            check_rows(record, rows, every_position=every_position, distinct=False)
        except ValueError:  # one by one, they name the file
            return [self[item] for item in items]
        block = _Block(rows, method=record.method, parameter=record.parameter)
        return [block.sample(row) for row in range(len(items))]

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
    def content_sha256(self) -> str:
        """The sha256 of the names and headers of the shards, each of which holds the hash of its data."""
        return hashlib.sha256(
            "".join(f"{shard['name']} {shard['header_sha256']}\n" for shard in self._shards).encode()
        ).hexdigest()

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
            parts.append(self._shard(number).has_target if shard["untargeted"] else all_have)
        has_target = np.concatenate(parts)[self._order]
        self._close()
        return has_target

    @cached_property
    def lengths(self) -> np.ndarray:
        """(len,) int64: the tokens of each item; opens every shard once, which hashes it (about 1 GB/s)."""
        parts = [np.zeros(0, np.int64), *(self._shard(number).lengths for number in range(len(self._shards)))]
        lengths = np.concatenate(parts)[self._order]
        self._close()
        return lengths

    @property
    def shard_of_item(self) -> np.ndarray:
        """(len,) int64: the number of the shard that each item is in."""
        return self._places[:, 0]

    @property
    def shard_positions(self) -> np.ndarray:
        """(shards,) int64: how many positions with a target each shard holds."""
        return np.array([shard["positions"] for shard in self._shards], np.int64)

    @property
    def nonfinite(self) -> int:
        """How many positions have no target because a logit of the teacher was not finite."""
        return sum(shard["nonfinite"] for shard in self._shards)

    @cached_property
    def shard_bytes(self) -> np.ndarray:
        """(shards,) int64: the size of each shard's file."""
        return np.array([shard["bytes"] for shard in self._shards], np.int64)

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
                parts.append(self._shard(number).sample_indices)
        return np.concatenate(parts)

    def _shard(self, number: int) -> "_Shard":
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._shards[number]
        path = self._record.shard_path(shard["group"], shard["lane"], shard["samples"])
        opened = self._open[number] = _Shard(path, self._record, expected=shard, by_blocks=self._is_alone())
        while self._too_many_open():
            self._open.popitem(last=False)[1].close()
        return opened

    def _is_alone(self) -> bool:
        """Whether nobody else reads other samples of the same order."""
        return self.processes * _workers() == 1

    def _close(self) -> None:
        """Close what was opened for the columns of all rows: a worker shall not inherit files in the midst of use."""
        while self._open:
            self._open.popitem()[1].close()

    def _too_many_open(self) -> bool:
        count = len(self._open)
        return count > MOST_OPEN or (count > 1 and self.shard_bytes[list(self._open)].sum() > OPEN_BYTES)


def _workers() -> int:
    """Return how many workers the DataLoader has in which this runs, 1 outside of any."""
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return info.num_workers if info else 1


class _Shard:
    """The rows of one open shard.

    For a single reader they are decoded by blocks, which stay while the shard is open. Of several readers each wants
    other rows of every block, so each decodes its rows alone, from chunks that stay inflated.
    """

    def __init__(self, path: Path, record: Record, *, expected: dict[str, Any], by_blocks: bool) -> None:
        """Open the shard; `expected` is what the manifest says of it."""
        self._record = record
        self._reader = RowReader(
            path,
            method=record.method,
            parameter=record.parameter,
            ids_by_rank=record.ids_by_rank,
            keep_chunks=not by_blocks,
        )
        header = self._reader.header
        if (found := manifest_entry(path.name, header)) != expected:
            key = next(key for key in found if found[key] != expected[key])
            raise self._reader.damaged(f"its {key} is {found[key]!r}, but manifest.json says {expected[key]!r}")
        with self._reader.damaged_by():
            check_dealing(record, header, self._reader.sample_index)
        self.sample_indices = self._reader.sample_index
        self.has_target = self._reader.row_positions > 0
        self.lengths = self._reader.row_tokens
        self.every_position = not header.nonfinite  # carries a target
        self._block_rows = max(1, BLOCK_TOKENS * header.sequences // max(1, header.tokens)) if by_blocks else None
        self._blocks: dict[int, _Block] = {}

    def sample(self, row: int) -> CachedSample:
        """Return one row."""
        if self._block_rows is None:
            return self._read(row, row + 1).sample(0)
        number, inside = divmod(row, self._block_rows)
        if number not in self._blocks:
            first = number * self._block_rows
            self._blocks[number] = self._read(first, min(first + self._block_rows, len(self._reader)))
        return self._blocks[number].sample(inside)

    def _read(self, first: int, last: int) -> "_Block":
        rows = self._reader.read(first, last)
        with self._reader.damaged_by(f"rows from {first}: "):
            check_rows(self._record, rows, every_position=self.every_position, distinct=False)
        return _Block(rows, method=self._record.method, parameter=self._record.parameter)

    def stored(self, row: int) -> StoredRows:
        """Return one row before it is decoded."""
        return self._reader.stored(row, row + 1)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


class _Block:
    """Decoded rows, and where each of them starts."""

    def __init__(self, rows: Rows, *, method: Method, parameter: float) -> None:
        self._method, self._parameter = method, parameter
        self._heads = offsets(rows.targets["head_count"])[rows.positions]
        self._tails = offsets(rows.targets["tail_count"])[rows.positions]
        narrow = {name: _narrowed(values) for name, values in rows.targets.items()}
        self._rows = replace(rows, targets=narrow, input_ids=_narrowed(rows.input_ids))

    def sample(self, row: int) -> CachedSample:
        """Return one of the rows."""
        import torch

        from accel_distill.targets import SparseTargets

        rows = self._rows
        tokens, positions, heads, tails = (
            slice(starts[row], starts[row + 1]) for starts in (rows.tokens, rows.positions, self._heads, self._tails)
        )
        parts = {"head_count": positions, "head_ids": heads, "head_values": heads}
        parts |= {"tail_count": positions, "tail_ids": tails, "tail_values": tails}
        arrays = {name: rows.targets[name][part].astype(np.int64) for name, part in parts.items()}
        return CachedSample(
            sample_index=int(rows.sample_index[row]),
            input_ids=torch.from_numpy(rows.input_ids[tokens].astype(np.int64)),
            target_mask=torch.from_numpy(rows.target_mask[tokens].copy()),
            targets=SparseTargets.from_arrays(arrays, method=self._method, parameter=self._parameter),
            teacher_entropy=float(rows.entropy[row]),
            teacher_logprob=float(rows.logprob[row]),
        )


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Return values, none below 0, as the narrowest unsigned integers that hold them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
