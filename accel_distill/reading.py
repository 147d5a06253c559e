"""The texts of a dataset from any sample on, in stream order, read again where the network fails.

The one decision: a stream that was opened again is believed only when what it says of samples already read has the
hash of what was read; else it is read from further back, and at last refused. So no sample is lost or repeated,
whatever the datasets library makes of a state of its own. The price is a hash of every text.
"""

import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from accel_distill.errors import CacheMismatch, RunError
from accel_distill.text_hash import Text, TextHash

TRIES = 5  # in a row, without a new sample
FIRST_WAIT = 1.0  # seconds; doubles with each try
MARK_EVERY = 1000  # samples
# Libraries whose own exceptions are of the network.
NETWORK = {"aiohttp", "botocore", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
PASSING = {408, 425, 429}  # HTTP statuses below 500 of a server that may answer later
UNREACHABLE = {
    getattr(errno, name)
    for name in "EAGAIN EIO ENETDOWN ENETRESET ENETUNREACH EHOSTDOWN EHOSTUNREACH EREMOTEIO ESTALE ETIMEDOUT".split()
}


@dataclass(frozen=True)
class Mark:
    """A place in a stream: `at` samples come before it; `state` is what the datasets library calls it."""

    at: int
    state: Any = None


START = Mark(0)


class Reading:
    """An iterator over texts; `index` is the stream index of the next one."""

    def __init__(
        self,
        open_at: Callable[[Mark], Iterator[Text]],
        *,
        state: Callable[[], Any],
        name: str,
        start: Mark = START,
        tell: Callable[[str], None],
    ) -> None:
        """`open_at` opens the stream at a mark, `state()` is where the one opened last is; `tell` hears of retries."""
        self.index = start.at
        self._open_at, self._state, self._name, self._tell = open_at, state, name, tell
        self._texts: Iterator[Text] | None = None
        # The first mark and the last two, each with the hash of the hashes of the MARK_EVERY texts after it, and so on.
        self._marks = [(start, hashlib.sha256())]
        self._part = TextHash()  # of the texts since the last mark
        self._failures = 0

    def __iter__(self) -> "Reading":
        return self

    def __next__(self) -> Text:
        while True:
            try:
                self._texts = self._texts or self._opened()
                text = next(self._texts)
            except StopIteration:
                raise
            except Exception as error:
                if not is_transient(error):
                    raise
                self._texts = None
                self._wait(error)
            else:
                self._note(text)
                return text

    def mark(self) -> Mark:
        """Return the place before the next text."""
        return Mark(self.index, self._state())

    def _note(self, text: Text) -> None:
        self._failures = 0
        self._part.add(text)
        self.index += 1
        if (self.index - self._marks[0][0].at) % MARK_EVERY == 0:
            for _, parts in self._marks:
                parts.update(self._part.digest())
            self._marks = [self._marks[0], *self._marks[1:][-1:], (self.mark(), hashlib.sha256())]
            self._part = TextHash()

    def _wait(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if self._failures == TRIES:
            raise RunError(
                f"dataset {self._name}: reading sample {self.index} failed {TRIES + 1} times in a row ({reason}); run "
                "the same command again when the network is back: it goes on"
            ) from error
        wait = FIRST_WAIT * 2**self._failures
        self._failures += 1
        self._tell(
            f"dataset {self._name}: reading sample {self.index} failed ({reason}); "
            f"try {self._failures} of {TRIES} in {wait:.0f} s"
        )
        time.sleep(wait)

    def _opened(self) -> Iterator[Text]:
        """Open the stream where the next text is; raise CacheMismatch where it no longer says what was read."""
        first = self._marks[0][0]
        for mark, parts in reversed(self._marks):
            whole, rest = divmod(self.index - mark.at, MARK_EVERY)
            if whole == rest == 0 and mark is not first:
                continue  # nothing to tell by
            texts, again = self._open_at(mark), hashlib.sha256()
            for _ in range(whole):
                again.update(TextHash.of(islice(texts, MARK_EVERY)).digest())
            same_rest = TextHash.of(islice(texts, rest)).digest() == self._part.digest()
            if same_rest and again.digest() == parts.digest():
                return texts
        raise CacheMismatch(
            f"dataset {self._name}: the stream changed while it was read: samples {first.at} to {self.index - 1} are "
            "not what they were before the connection was lost; name a fixed dataset.revision, and another cache.path"
        )


def is_transient(error: BaseException) -> bool:
    """Whether an exception, or one behind it, is of the network and may pass."""
    behind: BaseException | None = error
    for _ in range(10):
        if behind is None:
            return False
        status = getattr(getattr(behind, "response", None), "status_code", getattr(behind, "status", None))
        if isinstance(status, int):
            return status >= 500 or status in PASSING
        if isinstance(behind, ConnectionError | TimeoutError) or type(behind).__module__.split(".")[0] in NETWORK:
            return True
        if isinstance(behind, OSError) and behind.errno in UNREACHABLE:
            return True
        behind = behind.__cause__ or behind.__context__
    return False
