"""The lengths of a dataset's samples, by tokenising some thousands of them.

The one decision: the samples are a random choice out of all that the run will have, as far as these can be reached. A
dataset that is not streamed is read at random places. A stream is read from its start, every sample of it equally
likely to be chosen (reservoir sampling), until the run's last sample or until the time is up; how far that was is told.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from accel_distill.stream import TextStream
from accel_distill.text_hash import Text
from accel_distill.tokens import SequenceRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENISED_AT_ONCE = 64  # texts
LOOK_EVERY = 64  # samples read between two looks at the clock
SEED = 0


@dataclass(frozen=True)
class LengthSample:
    """Texts of a run, chosen at random, and how long they are."""

    texts: list[Text]
    row_lengths: list[list[int]]  # tokens of each sequence of each text
    id_counts: np.ndarray  # (vocab_size,) how often each id is in them
    population: int  # samples that the run has, as far as one knows
    read: int  # samples of the stream that could be chosen; fewer than the population: the time was up
    seconds_per_sample: float  # of reading the stream
    seconds_per_token: float  # of tokenising

    @property
    def tokens(self) -> np.ndarray:
        """(n,) int64: the tokens of each sample."""
        return np.array([sum(lengths) for lengths in self.row_lengths])

    @property
    def positions(self) -> np.ndarray:
        """(n,) int64: how many positions of each sample have a next token."""
        return np.array([sum(max(length - 1, 0) for length in lengths) for lengths in self.row_lengths])

    @property
    def text_bytes(self) -> float:
        """The mean bytes of a text."""
        return sum(len((text or "").encode("utf-8", "surrogatepass")) for text in self.texts) / max(len(self.texts), 1)


def sample_lengths(
    stream: TextStream,
    *,
    rule: SequenceRule,
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    max_samples: int | None,
    wanted: int,
    seconds: float,
) -> LengthSample:
    """Tokenise `wanted` samples, or as many as can be read in `seconds` and tokenised in as much time again."""
    begun = time.monotonic()
    texts, population, read = _choose(stream, max_samples=max_samples, wanted=wanted, until=begun + seconds)
    read_seconds = time.monotonic() - begun
    counts, row_lengths, begun = np.zeros(vocab_size, np.int64), [], time.monotonic()
    left = iter(texts)
    while part := list(islice(left, TOKENISED_AT_ONCE)):
        rows, _ = rule.sequences(part, range(len(part)), tokenizer=tokenizer)
        lengths: list[list[int]] = [[] for _ in part]
        for row in rows:
            lengths[row.sample_index].append(len(row.ids))
        row_lengths += lengths
        ids = np.concatenate([row.ids for row in rows])
        counts += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
        if time.monotonic() - begun > seconds:
            break
    return LengthSample(
        texts[: len(row_lengths)],
        row_lengths,
        counts,
        population,
        read,
        read_seconds / max(read if stream.length is None else len(texts), 1),
        (time.monotonic() - begun) / max(int(counts.sum()), 1),
    )


def _choose(stream: TextStream, *, max_samples: int | None, wanted: int, until: float) -> tuple[list[Text], int, int]:
    """Return texts in random order, how many samples the run has, and out of how many these were chosen."""
    choice = random.Random(SEED)
    if stream.length is not None:
        population = min(n for n in (stream.length, max_samples) if n is not None)
        texts = list(stream.texts_at(sorted(choice.sample(range(population), min(wanted, population)))))
        choice.shuffle(texts)
        return texts, population, population
    texts, read, is_whole = _reservoir(islice(stream, max_samples), wanted=wanted, until=until, choice=choice)
    choice.shuffle(texts)
    assert max_samples is not None  # a stream has a cap
    return texts, read if is_whole else max_samples, read


def _reservoir(
    texts: Iterator[Text], *, wanted: int, until: float, choice: random.Random
) -> tuple[list[Text], int, bool]:
    """Return a random choice of an iterator's texts, how many it yielded, and whether that was all."""
    kept: list[Text] = []
    read = 0
    for read, text in enumerate(texts, start=1):
        if len(kept) < wanted:
            kept.append(text)
        elif (place := choice.randrange(read)) < wanted:
            kept[place] = text
        if read % LOOK_EVERY == 0 and time.monotonic() > until:
            return kept, read, False
    return kept, read, True


def spread_by_length(positions: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """Return `count` of the samples, spread evenly over all when sorted by length: each stands for a stratum."""
    order = np.argsort(np.asarray(positions), kind="stable")
    count = min(count, len(order))
    return [int(order[(2 * k + 1) * len(order) // (2 * count)]) for k in range(count)]
