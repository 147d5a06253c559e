"""The rows of a shard, read in ranges and decoded, with every column checked against the others.

The one decision: whoever reads rows in bulk (verify) gets numpy arrays; the map-style dataset has its own reader.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel_distill.codec import STAT_STEPS, Arrays, Method, column_dtypes, decode
from accel_distill.errors import DamagedCache
from accel_distill.shard import ShardFile, ShardHeader

OFFSETS = {
    "tokens": "token_offsets",
    "positions": "target_offsets",
    "heads": "head_offsets",
    "tails": "tail_offsets",
}
ROW_COLUMNS = ("sample_index", *OFFSETS.values(), "entropy", "logprob")
COUNTED_BY = {
    "head_count": "positions",
    "head_ids": "heads",
    "head_values": "heads",
    "tail_count": "positions",
    "tail_ids": "tails",
    "tail_values": "tails",
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


def row_columns(method: Method, parameter: float, vocab_size: int) -> dict[str, np.dtype]:
    """Return name and dtype of every column of a shard."""
    wide = {name: np.dtype("<i8") for name in ROW_COLUMNS}
    targets = column_dtypes(method, parameter, vocab_size)
    return {**wide, "input_ids": targets["head_ids"], "target_mask": np.dtype("u1"), **targets}


class RowReader:
    """Reads ranges of rows of one shard file. Raises DamagedCache, naming the file, for all that does not fit."""

    def __init__(self, path: Path, *, method: Method, parameter: float, ids_by_rank: np.ndarray) -> None:
        """Open the shard, and read and check the columns that say how much of each other column is a row's."""
        self._method, self._parameter, self._ids_by_rank = method, parameter, ids_by_rank
        dtypes = row_columns(method, parameter, len(ids_by_rank))
        self._columns = [name for name in COUNTED_BY if name in dtypes]
        self._file = ShardFile(path, dtypes=dtypes)
        try:
            self.sample_index = self._exactly(self.header.sequences, "sample_index")
            ends = {"tokens": self.header.tokens, "positions": self.header.positions}
            ends["heads"] = self._file.length("head_ids")
            ends["tails"] = self._file.length("tail_ids") if "tail_ids" in dtypes else 0
            self._starts = {name: self._row_starts(OFFSETS[name], end) for name, end in ends.items()}
            self._entropy, self._logprob = (
                self._exactly(self.header.sequences, name) / STAT_STEPS for name in ("entropy", "logprob")
            )
            for name, counted in COUNTED_BY.items():
                if name in dtypes:
                    self._expect(name, ends[counted])
            self._expect("input_ids", self.header.tokens)
            self._expect("target_mask", -(-self.header.tokens // 8))
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

    @property
    def row_positions(self) -> np.ndarray:
        """(rows,): how many positions of each row carry a target."""
        return np.diff(self._starts["positions"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, first: int, last: int) -> Rows:
        """Return the rows `first` to `last` (exclusive), decoded and checked."""
        columns = {name: self._elements(name, first, last) for name in self._columns}
        tokens, positions = (self._starts[name][first : last + 1] for name in ("tokens", "positions"))
        mask = self._mask(int(tokens[0]), int(tokens[-1]))
        try:
            targets = decode(columns, method=self._method, parameter=self._parameter, ids_by_rank=self._ids_by_rank)
            ranks = self._file.read("input_ids", int(tokens[0]), int(tokens[-1]))
            if len(ranks) and ranks.max() >= len(self._ids_by_rank):
                size = len(self._ids_by_rank)
                raise ValueError(f"column input_ids: rank {int(ranks.max())}, but the vocabulary has {size} ids")
            if (found := int(mask.sum())) != (expected := int(positions[-1] - positions[0])):
                raise ValueError(f"column target_mask has {found} bits where its counts say {expected}")
        except ValueError as error:
            raise self.damaged(f"rows {first} to {last - 1}: {error}") from error
        rows = slice(first, last)
        stats = (self._entropy[rows], self._logprob[rows])
        ids = self._ids_by_rank[ranks].astype(np.int64)
        return Rows(self.sample_index[rows], tokens - tokens[0], positions - positions[0], ids, mask, targets, *stats)

    def damaged(self, what: str) -> DamagedCache:
        """Return the error that says `what` of this file."""
        return DamagedCache(f"shard {self._file.path}: {what}; delete this file and run generate again")

    def _elements(self, name: str, first: int, last: int) -> np.ndarray:
        starts = self._starts[COUNTED_BY[name]]
        return self._file.read(name, int(starts[first]), int(starts[last]))

    def _mask(self, start: int, stop: int) -> np.ndarray:
        packed = self._file.read("target_mask", start // 8, -(-stop // 8))
        return np.unpackbits(packed, bitorder="little")[start % 8 :][: stop - start].astype(bool)

    def _row_starts(self, name: str, end: int) -> np.ndarray:
        found = self._exactly(self.header.sequences + 1, name)
        if found[0] != 0 or found[-1] != end or np.diff(found).min(initial=0) < 0:
            raise self.damaged(f"column {name} does not ascend from 0 to {end}")
        return found

    def _exactly(self, length: int, name: str) -> np.ndarray:
        """Read a whole column, which must have `length` elements."""
        self._expect(name, length)
        return self._file.read(name)

    def _expect(self, name: str, length: int) -> None:
        if (found := self._file.length(name)) != length:
            raise self.damaged(f"column {name} has {found} elements, expected {length}")
