"""A stream of which places are noted while it is read, so that training that goes on begins near where it stopped.

    OUTPUT_DIR/hints.json    as in a cache (hints.py), with a hash of source, place and the texts that follow

The one decision: a place is a guess here too. It is used only when the AFTER texts that are read there have the hash
that was noted, with its number and source; else the one before it, or the first sample. So a wrong one costs time and
never a sample. The price is that those texts are read twice.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from accel_distill import hints
from accel_distill.errors import RunError
from accel_distill.hints import NO_STATE, Hint, add_hint, read_hints
from accel_distill.reading import Mark, Reading
from accel_distill.text_hash import Text, TextHash

log = logging.getLogger("accel_distill.train")

AFTER = 16  # texts by which a place is known


class NotedStream:
    """Opens a stream as late as may be."""

    def __init__(
        self, read: Callable[..., Reading], directory: Path, *, source: Mapping[str, Any], is_writer: bool
    ) -> None:
        """`read` opens the stream at a `Mark`, or at its start; one rank writes, and of its workers the first."""
        self._read, self._directory, self._is_writer = read, directory, is_writer
        self._source = json.dumps(source, sort_keys=True)

    def open(self, index: int) -> "NotedReading":
        """Return a reading that begins with sample `index`, or as little before it as can be."""
        for hint in reversed(read_hints(self._directory)):
            if hint.at <= index and self._is_confirmed(hint):
                if self._writes():
                    log.info("the stream is read from sample %s on", f"{hint.at:,}")
                return self._noted(self._read(Mark(hint.at, hint.state)))
        return self._noted(self._read())

    def note(self, mark: Mark, texts: TextHash) -> None:
        """Write a place down, for another run; without it that reads more, so a disk that refuses it is passed over."""
        with contextlib.suppress(RunError, OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            add_hint(Hint(mark.at, mark.state, self._key(mark.at, texts)), self._directory, scratch=self._directory)

    def _noted(self, reading: Reading) -> "NotedReading":
        return NotedReading(reading, self.note if self._writes() else None)

    def _writes(self) -> bool:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        return self._is_writer and (worker is None or worker.id == 0)

    def _is_confirmed(self, hint: Hint) -> bool:
        try:
            found = TextHash.of(islice(self._read(Mark(hint.at, hint.state)), AFTER))
        except NO_STATE:
            return False
        return self._key(hint.at, found) == hint.after

    def _key(self, at: int, texts: TextHash) -> str:
        return hashlib.sha256(f"{self._source} {at} {texts.hexdigest()}".encode()).hexdigest()


class NotedReading:
    """An iterator over texts; `index` is the stream index of the next one."""

    def __init__(self, reading: Reading, note: Callable[[Mark, TextHash], None] | None) -> None:
        """`note` hears of a place, and of the AFTER texts behind it, every `hints.EVERY` seconds."""
        self._reading, self._note = reading, note
        self._place: Mark | None = None
        self._texts = TextHash()
        self._noted = time.monotonic()

    @property
    def index(self) -> int:
        """The stream index of the next text."""
        return self._reading.index

    def __iter__(self) -> "NotedReading":
        return self

    def __next__(self) -> Text:
        text = next(self._reading)
        if self._note is not None:
            self._look(text, self._note)
        return text

    def _look(self, text: Text, note: Callable[[Mark, TextHash], None]) -> None:
        if self._place is not None:
            self._texts.add(text)
            if self.index - self._place.at == AFTER:
                note(self._place, self._texts)
                self._place = None
        elif time.monotonic() - self._noted >= hints.EVERY:
            self._place, self._texts, self._noted = self._reading.mark(), TextHash(), time.monotonic()
