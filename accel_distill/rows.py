"""The rows of a shard as columns, and back: writer and reader side by side.

The one decision: each column holds one thing of all rows, one behind the other, and the `row_*` columns say how much of
it is each row's. So any range of rows is read and decoded alone, and many rows at the cost of a few array operations.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from accel_distill.codec import (
    COUNTED_BY,
    PACKED,
    STAT_STEPS,
    Arrays,
    Column,
    Method,
    column_dtypes,
    decode,
    encode,
    ids_of_ranks,
    narrow,
    offsets,
    pack_column,
    unpack_column,
)
from accel_distill.errors import DamagedCache
from accel_distill.packing import Bits, join_bits
from accel_distill.shard import ShardFile, ShardHeader

INPUT_IDS = "input_ids"
ROW_DTYPES: dict[str, np.dtype] = {  # of the columns that every cache has
    "sample_index": np.dtype("<i8"),
    "row_tokens": np.dtype("<u4"),
    "entropy": np.dtype("<i8"),
    "logprob": np.dtype("<i8"),
    "target_mask": np.dtype("u1"),
    INPUT_IDS: np.dtype("u1"),
    f"{INPUT_IDS}_bits": np.dtype("u1"),
    f"row_{INPUT_IDS}_bits": np.dtype("<u4"),
}


@dataclass(frozen=True)
class Rows:
    """Some rows of a cache with T tokens and P targets in all."""

    sample_index: np.ndarray  # (n,) of the stream
    tokens: np.ndarray  # (n + 1,) where each row's tokens start, and where the last one's end
    positions: np.ndarray  # (n + 1,) likewise of positions with a target
    input_ids: np.ndarray  # (T,)
    target_mask: np.ndarray  # (T,) bool: the tokens at whose position there is a target
    targets: Arrays  # of the P positions, as codec.py describes them
    entropy: np.ndarray  # (n,) nats, summed over a row's targets
    logprob: np.ndarray  # (n,) likewise, of the true next tokens


@dataclass(frozen=True)
class StoredRows:
    """Some rows as their columns hold them, before they are decoded."""

    columns: dict[str, Column]  # of targets and tokens; `Bits` for each bit stream
    tokens: np.ndarray  # (n,) of each row
    positions: np.ndarray  # (n,)
    target_mask: np.ndarray  # (T,) bool
    sample_index: np.ndarray  # (n,)
    entropy: np.ndarray  # (n,)
    logprob: np.ndarray  # (n,)


def join_stored(parts: Sequence[StoredRows]) -> StoredRows:
    """Return the rows of several parts, which may be of several shards of a cache, one behind the other."""
    columns: dict[str, Column] = {}
    for name, first in parts[0].columns.items():
        values: list[Any] = [part.columns[name] for part in parts]
        if isinstance(first, Bits):
            columns[name] = join_bits(values, [len(part.columns[name.removesuffix("_bits")]) for part in parts])
        else:
            columns[name] = np.concatenate(values)
    others = [field.name for field in fields(StoredRows) if field.name != "columns"]
    return StoredRows(columns, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in others})


def decode_rows(stored: StoredRows, *, method: Method, parameter: float, ids_by_rank: np.ndarray) -> Rows:
    """Return stored rows, decoded and checked; raise ValueError, naming the column, where columns do not fit."""
    tokens, positions, mask = offsets(stored.tokens), offsets(stored.positions), stored.target_mask
    targets = decode(stored.columns, method=method, parameter=parameter, ids_by_rank=ids_by_rank)
    _check_mask(mask, tokens, stored.positions)
    ids = _tokens_of_codes(unpack_column(stored.columns, INPUT_IDS), mask, targets, ids_by_rank)
    return Rows(stored.sample_index, tokens, positions, ids, mask, targets, stored.entropy, stored.logprob)


def row_columns(method: Method, parameter: float) -> dict[str, np.dtype]:
    """Return name and dtype of every column of a shard."""
    return {**ROW_DTYPES, **column_dtypes(method, parameter)}


def encode_rows(rows: Rows, *, method: Method, parameter: float, ranks: np.ndarray) -> Arrays:
    """Return the columns of a shard; raise ValueError where a value does not fit its column.

    `ranks` (vocab_size,) maps an id to its frequency rank.
    """
    plain = {
        "sample_index": rows.sample_index,
        "row_tokens": np.diff(rows.tokens),
        "entropy": np.rint(rows.entropy * STAT_STEPS).astype(np.int64),
        "logprob": np.rint(rows.logprob * STAT_STEPS).astype(np.int64),
        "target_mask": np.packbits(rows.target_mask, bitorder="little"),
        **pack_column(_token_codes(rows, ranks), rows.tokens, name=INPUT_IDS),
    }
    fixed = {
        name: values.astype(dtype) if dtype.kind == "i" else narrow(values, dtype, name=name)
        for name, dtype in ROW_DTYPES.items()
        for values in [plain[name]]
    }
    return fixed | encode(rows.targets, method=method, parameter=parameter, ranks=ranks, rows=rows.positions)


def _token_codes(rows: Rows, ranks: np.ndarray) -> np.ndarray:
    """Return a number for each token: its place among the head ids of the position before it, which predicts it well.

    A token that is none of the h head ids is h + its frequency rank; h = 0 where the position before has no target.
    """
    codes, head_count = ranks[rows.input_ids], rows.targets["head_count"]
    following = np.flatnonzero(rows.target_mask) + 1  # each position's next token
    codes[following] += head_count
    position = np.repeat(np.arange(len(head_count)), head_count)
    hit = np.flatnonzero(rows.targets["head_ids"] == rows.input_ids[following[position]])
    codes[following[position[hit]]] = hit - offsets(head_count)[position[hit]]
    return codes


def _tokens_of_codes(codes: np.ndarray, mask: np.ndarray, targets: Arrays, ids_by_rank: np.ndarray) -> np.ndarray:
    """Return the tokens (T,) int32 of `_token_codes`; raise ValueError for a rank beyond the vocabulary."""
    following, head_count = np.flatnonzero(mask) + 1, targets["head_count"]
    place = codes[following]
    is_head = place < head_count
    ranks = codes.copy()
    ranks[following] -= np.where(is_head, place, head_count)
    tokens = ids_of_ranks(ranks, ids_by_rank, name=INPUT_IDS)
    tokens[following[is_head]] = targets["head_ids"][(offsets(head_count)[:-1] + place)[is_head]]
    return tokens


def _check_mask(mask: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> None:
    """Raise ValueError where a row's targets are not as many as it says, or its last token has one."""
    found = np.diff(offsets(mask)[tokens])
    if (found != positions).any():
        row = int((found != positions).argmax())
        raise ValueError(f"column target_mask says {found[row]} targets in a row that says {positions[row]}")
    last = tokens[1:][np.diff(tokens) > 0] - 1
    if mask[last].any():
        raise ValueError("column target_mask: a row's last token carries a target, but has no next token")


class RowReader:
    """Reads ranges of rows of one shard file. Raises DamagedCache, naming the file, for all that does not fit."""

    def __init__(
        self, path: Path, *, method: Method, parameter: float, ids_by_rank: np.ndarray, keep_chunks: bool = False
    ) -> None:
        """Open the shard, and read and check the columns that say how much of each other column is a row's.

        `keep_chunks` is for many reads of few rows: what they inflate stays in memory.
        """
        self._method, self._parameter, self._ids_by_rank = method, parameter, ids_by_rank
        self._packed = (*PACKED[method], INPUT_IDS)
        dtypes = row_columns(method, parameter)
        self._columns = [name for name in dtypes if name in COUNTED_BY]
        self._file = ShardFile(path, dtypes=dtypes, keep_chunks=keep_chunks)
        try:
            self.sample_index = self._exactly(self.header.sequences, "sample_index")
            self._starts = {name: self._row_starts(name) for name in ("tokens", "positions", "heads", "tails")}
            self._starts["rest"] = self._starts["heads"] - self._starts["positions"]
            self._bit_starts = {name: self._row_starts(f"{name}_bits") for name in self._packed}
            self._check_lengths()
            self._entropy, self._logprob = (
                self._exactly(self.header.sequences, name) / STAT_STEPS for name in ("entropy", "logprob")
            )
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def header(self) -> ShardHeader:
        """The header of the shard."""
        return self._file.header

    def totals(self) -> dict[str, int]:
        """Return how many tokens, positions, heads and tails the shard holds."""
        return {name: int(starts[-1]) for name, starts in self._starts.items()}

    def stored_bytes(self) -> dict[str, int]:
        """Return how many bytes each column takes in the file."""
        return {name: self._file.stored_bytes(name) for name in row_columns(self._method, self._parameter)}

    @property
    def row_tokens(self) -> np.ndarray:
        """(rows,): how many tokens each row has."""
        return np.diff(self._starts["tokens"])

    @property
    def row_positions(self) -> np.ndarray:
        """(rows,): how many positions of each row carry a target."""
        return np.diff(self._starts["positions"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, first: int, last: int) -> Rows:
        """Return the rows `first` to `last` (exclusive), decoded and checked."""
        with self.damaged_by(f"rows {first} to {last - 1}: "):
            return decode_rows(
                self.stored(first, last),
                method=self._method,
                parameter=self._parameter,
                ids_by_rank=self._ids_by_rank,
            )

    def stored(self, first: int, last: int) -> StoredRows:
        """Return the rows `first` to `last` (exclusive) as their columns hold them."""
        columns: dict[str, Column] = {name: self._elements(name, first, last) for name in self._columns}
        columns |= {f"{name}_bits": self._bits(name, first, last) for name in self._packed}
        tokens, positions = (self._starts[name][first : last + 1] for name in ("tokens", "positions"))
        rows = slice(first, last)
        return StoredRows(
            columns,
            np.diff(tokens),
            np.diff(positions),
            self._mask(int(tokens[0]), int(tokens[-1])),
            self.sample_index[rows],
            self._entropy[rows],
            self._logprob[rows],
        )

    @contextlib.contextmanager
    def damaged_by(self, where: str = "") -> Iterator[None]:
        """Turn what a check says with ValueError into DamagedCache of this file."""
        try:
            yield
        except ValueError as error:
            raise self.damaged(f"{where}{error}") from error

    def damaged(self, what: str) -> DamagedCache:
        """Return the error that says `what` of this file."""
        return DamagedCache(f"shard {self._file.path}: {what}; delete this file and run generate again")

    def _elements(self, name: str, first: int, last: int) -> np.ndarray:
        starts = self._starts[COUNTED_BY[name]]
        return self._file.read(name, int(starts[first]), int(starts[last]))

    def _bits(self, name: str, first: int, last: int) -> Bits:
        start, stop = (int(self._bit_starts[name][row]) for row in (first, last))
        return Bits(self._file.read(f"{name}_bits", start // 8, -(-stop // 8)), start % 8, stop - start)

    def _mask(self, start: int, stop: int) -> np.ndarray:
        packed = self._file.read("target_mask", start // 8, -(-stop // 8))
        return np.unpackbits(packed, bitorder="little")[start % 8 :][: stop - start].astype(bool)

    def _row_starts(self, name: str) -> np.ndarray:
        return offsets(self._exactly(self.header.sequences, f"row_{name}"))

    def _check_lengths(self) -> None:
        """Check that the columns are as long as the header and the row columns say."""
        for name, expected in (("tokens", self.header.tokens), ("positions", self.header.positions)):
            if (found := self._starts[name][-1]) != expected:
                raise self.damaged(f"column row_{name} sums to {found}, and its header says {expected}")
        lengths = {name: self._starts[COUNTED_BY[name]][-1] for name in self._columns}
        lengths |= {f"{name}_bits": -(-self._bit_starts[name][-1] // 8) for name in self._packed}
        lengths["target_mask"] = -(-self.header.tokens // 8)
        for name, expected in lengths.items():
            self._expect(name, int(expected))

    def _exactly(self, length: int, name: str) -> np.ndarray:
        """Read a whole column, which must have `length` elements."""
        self._expect(name, length)
        return self._file.read(name)

    def _expect(self, name: str, length: int) -> None:
        if (found := self._file.length(name)) != length:
            raise self.damaged(f"column {name} has {found} elements, expected {length}")
