"""Where in a stream a group of shards begins, so that a run which goes on need not read all that came before.

    CACHE/hints.json    [{"at": 8192, "state": ..., "samples": 64, "sha256": ...}, ...]

The one decision: a hint is a guess. It is used only where the identity pins the content of the dataset (the sha256 of
its files, or a commit), and only when the samples that come after it have the hash that was written with it; else the
next older one, or the first sample. So a wrong hint costs time and never a sample.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accel_distill.errors import RunError
from accel_distill.manifest import scratch
from accel_distill.publish import replace
from accel_distill.reading import START, Mark, Reading
from accel_distill.text_hash import Text, TextHash, hash_texts

NAME = "hints.json"
EVERY = 60.0  # seconds between two hints
SAMPLES = 64  # that confirm one
MOST = 64  # hints that are kept; then every other one of the older half goes
LARGEST = 4_000_000  # bytes


@dataclass(frozen=True)
class Hint:
    """A place in the stream, and the hash of the `samples` texts after it."""

    at: int
    state: Any
    samples: int
    sha256: str


def read_hints(cache: Path) -> list[Hint]:
    """Return the hints of a cache, in order; none where there is no file, or not one of ours."""
    try:
        with open(cache / NAME, "rb") as file:
            hints = [Hint(**hint) for hint in json.loads(file.read(LARGEST))]
        return sorted((hint for hint in hints if hint.at > 0 and hint.samples > 0), key=lambda hint: hint.at)
    except (OSError, ValueError, TypeError):
        return []


def start_near(cache: Path, sample: int, *, group_samples: int, read: Callable[[Mark], Reading]) -> Reading:
    """Return a reading that begins at a group's first sample, as near before `sample` as a confirmed hint allows."""
    for hint in reversed(read_hints(cache)):
        if hint.at <= sample and hint.at % group_samples == 0 and _is_confirmed(hint, read):
            return read(Mark(hint.at, hint.state))
    return read(START)


def _is_confirmed(hint: Hint, read: Callable[[Mark], Reading]) -> bool:
    try:
        texts = list(islice(read(Mark(hint.at, hint.state)), hint.samples))
    except (RunError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False  # a state that the datasets library makes nothing of
    return len(texts) == hint.samples and hash_texts(texts) == hint.sha256


class HintWriter:
    """Passes texts on, and notes now and then where a group begins."""

    def __init__(self, reading: Reading, cache: Path, *, group_samples: int) -> None:
        """For one rank: the others have nothing to add."""
        self._reading, self._cache, self._group_samples = reading, cache, group_samples
        self._noted = time.monotonic()
        self._mark: Mark | None = None  # of a hint whose samples are still coming
        self._hash, self._left = TextHash(), 0

    def __iter__(self) -> Iterator[Text]:
        """Yield the texts."""
        while True:
            self._begin()
            try:
                text = next(self._reading)
            except StopIteration:
                return
            self._add(text)
            yield text

    def _begin(self) -> None:
        """Begin a hint where a group begins and the last one is old enough."""
        is_start = self._reading.index > 0 and self._reading.index % self._group_samples == 0
        if is_start and self._mark is None and time.monotonic() - self._noted >= EVERY:
            self._noted = time.monotonic()
            self._mark, self._hash, self._left = self._reading.mark(), TextHash(), SAMPLES

    def _add(self, text: Text) -> None:
        if self._mark is not None:
            self._hash.add(text)
            self._left -= 1
            if not self._left:
                self._write(Hint(self._mark.at, self._mark.state, SAMPLES, self._hash.hexdigest()))
                self._mark = None

    def _write(self, hint: Hint) -> None:
        hints = [older for older in read_hints(self._cache) if older.at < hint.at] + [hint]
        if len(hints) > MOST:
            hints = hints[: MOST // 2 : 2] + hints[MOST // 2 :]
        data = json.dumps([asdict(each) for each in hints], indent=1).encode()
        replace(data, self._cache / NAME, scratch=scratch(self._cache))
