"""Texts as rows of training, tokenised when they are asked for: of a dataset at hand, or of a stream in one pass.

The one decision: a stream is a map-style dataset too, whose item n is sample `first + n`, read on to when it is asked
for. So dealing, the number of steps and going on in the middle are plain arithmetic on one global index, the same for
any number of ranks and dataloader workers, and the Trainer skips to a checkpoint's place without making what it skips.
It costs that every rank, and every dataloader worker of it, reads the whole stream; only its own rows are tokenised.
Going on, they begin at the last place that was noted (noted_stream.py).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from accel_distill.noted_stream import NotedReading, NotedStream
from accel_distill.pipeline import check_ids
from accel_distill.stream import TextStream
from accel_distill.tokens import SequenceRule, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_SAMPLE = -1  # sample index of a row that only fills a batch
AT_ONCE = 256  # texts that are tokenised together to count their pieces


class TextRow(NamedTuple):
    """One row of a batch."""

    sequence: TokenSequence
    end: int | None = None  # items that the stream has, where it ended before this one


def no_row(end: int | None = None) -> TextRow:
    """Return a row that only fills a batch."""
    return TextRow(TokenSequence(NO_SAMPLE, 0, np.zeros(0, np.int64)), end)


class Texts:
    """A text stream with all that makes rows of it."""

    def __init__(
        self, stream: TextStream, *, rule: SequenceRule, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
    ) -> None:
        """`vocab_size` is the teacher's: it has no embedding for other ids."""
        self.stream = stream
        self._rule, self._tokenizer, self._vocab_size = rule, tokenizer, vocab_size

    def rows(self, texts: Sequence[str | None], indices: Sequence[int]) -> list[TokenSequence]:
        """Return the token sequences of samples, by the same rule as a cache's."""
        rows, _ = self._rule.sequences(texts, indices, tokenizer=self._tokenizer)
        check_ids(rows, vocab_size=self._vocab_size)
        return rows

    def first_rows(self, samples: int) -> list[TextRow]:
        """Return the rows of the first samples: those that are held out."""
        texts = list(islice(self.stream.read(), samples))
        return [TextRow(row) for row in self.rows(texts, range(len(texts)))]

    def count_pieces(self, first: int, stop: int) -> np.ndarray:
        """Return how many rows each of the samples `first` to `stop` (exclusive) becomes, which takes reading them."""
        counts = np.zeros(stop - first, np.int64)
        for start in range(first, stop, AT_ONCE):
            indices = range(start, min(start + AT_ONCE, stop))
            rows = self.rows(list(self.stream.texts_at(indices)), indices)
            np.add.at(counts, [row.sample_index - first for row in rows], 1)
        return counts


class MapRows(Dataset):
    """The rows of a dataset that is at hand, from sample `first` to `stop` (exclusive), in any order."""

    def __init__(self, texts: Texts, *, first: int, stop: int, pieces: np.ndarray | None = None) -> None:
        """`pieces` says how many rows each sample has, where long documents are split; otherwise each has one."""
        self._texts, self._first = texts, first
        self._ends = np.arange(1, stop - first + 1) if pieces is None else pieces.cumsum()
        self.samples = stop - first

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: int) -> TextRow:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[TextRow]:
        """Return some rows; a document of which several are asked for is tokenised for each."""
        samples = np.searchsorted(self._ends, items, side="right")
        indices = [self._first + int(sample) for sample in samples]
        found: dict[int, list[TokenSequence]] = {}
        wanted = sorted(set(indices))
        for row in self._texts.rows(list(self._texts.stream.texts_at(wanted)), wanted):
            found.setdefault(row.sample_index, []).append(row)
        before = np.concatenate([[0], self._ends])[samples]
        return [
            TextRow(found[index][int(piece)]) for index, piece in zip(indices, np.asarray(items) - before, strict=True)
        ]


class StreamRows(Dataset):
    """The samples `first` to `stop` (exclusive) of a stream, one row each, to be asked for in ascending order.

    There are as many items as whole batches of all ranks need: those beyond the last sample have no token. So have
    those beyond the end of a stream that ends before `stop`, and they say where that was.
    """

    def __init__(self, texts: Texts, stream: NotedStream, *, first: int, stop: int, multiple: int) -> None:
        """`multiple`: samples of a batch, times ranks."""
        self._texts, self._stream, self._first, self._stop = texts, stream, first, stop
        self.samples = stop - first
        self._length = -(-self.samples // multiple) * multiple
        self._reading: NotedReading | None = None
        self._end: int | None = None  # samples in the stream, once known

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> TextRow:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[TextRow]:
        """Return some rows, in ascending order; an earlier one than before opens the stream again."""
        texts = {index: text for index in (self._first + item for item in items) for text in self._read(index)}
        rows = {row.sample_index: row for row in self._texts.rows(list(texts.values()), list(texts))}
        end = None if self._end is None else max(0, self._end - self._first)
        nothing = no_row(end)
        return [TextRow(rows[index]) if (index := self._first + item) in rows else nothing for item in items]

    def _read(self, index: int) -> Iterator[str | None]:
        """Yield the text of a sample, or nothing where the stream or this dataset has no such sample."""
        if index >= self._stop or (self._end is not None and index >= self._end):
            return
        if self._reading is None or index < self._reading.index:
            self._reading = self._stream.open(index)
        reading = self._reading
        yield from islice(reading, index - reading.index, index - reading.index + 1)
        if reading.index <= index:
            self._end = reading.index
