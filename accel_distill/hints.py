"""Where in a stream a group of shards begins, so that a run which goes on need not read all that came before.

    CACHE/hints.json    [{"at": 8192, "state": ...}, ...]    `state` is the datasets library's own

The one decision: a hint is a guess. It is used only where the identity pins the content of the dataset (the sha256 of
its files, or a commit), and only when the group after it is there and its texts have the hashes that its shards keep;
else the next older one, or the first sample. So a wrong hint costs time and never a sample. The price is that the
group is read twice.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accel_distill.deal import Layout
from accel_distill.errors import RunError
from accel_distill.manifest import scratch
from accel_distill.publish import replace
from accel_distill.reading import START, Mark, Reading
from accel_distill.regular_file import read_regular
from accel_distill.text_hash import Text, TextHash

NAME = "hints.json"
EVERY = 60.0  # seconds between two hints
MOST = 64  # hints that are kept; then every other one of the older half goes
LARGEST = 4_000_000  # bytes
# What opening a stream raises at a state that the datasets library makes nothing of.
NO_STATE = (RunError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Hint:
    """A place in the stream; `after` is what tells it where no shards do (noted_stream.py)."""

    at: int
    state: Any
    after: str | None = None


def read_hints(directory: Path) -> list[Hint]:
    """Return the hints in a directory, in order; none where there is no file, or not one of ours."""
    try:
        hints = [Hint(**hint) for hint in json.loads(read_regular(directory / NAME, limit=LARGEST))]
        return sorted((hint for hint in hints if hint.at > 0), key=lambda hint: hint.at)
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def add_hint(hint: Hint, directory: Path, *, scratch: Path) -> None:
    """Write a hint behind those of a directory that come before it. Raises as `publish` for the disk."""
    hints = [before for before in read_hints(directory) if before.at < hint.at] + [hint]
    if len(hints) > MOST:
        hints = hints[: MOST // 2 : 2] + hints[MOST // 2 :]
    data = json.dumps([asdict(hint) for hint in hints], indent=1).encode()
    replace(data, directory / NAME, scratch=scratch)


def start_late(
    cache: Path,
    committed: Mapping[tuple[int, int], tuple[int, str]],
    *,
    layout: Layout,
    read: Callable[[Mark], Reading],
) -> Reading:
    """Return a reading that begins with a group's first sample, as late as a confirmed hint lets it.

    `committed`: (group, lane) to the number of samples and the hash of the texts of the shard that is there.
    """
    first_open = layout.first_open_group({place: samples for place, (samples, _) in committed.items()})
    for hint in reversed(read_hints(cache)):
        group, rest = divmod(hint.at, layout.group_samples)
        if rest == 0 and group < first_open:
            hashes = [committed[group, lane][1] for lane in range(layout.lanes)]
            if _is_confirmed(Mark(hint.at, hint.state), hashes, layout=layout, read=read):
                return read(Mark(hint.at, hint.state))
    return read(START)


def _is_confirmed(mark: Mark, hashes: list[str], *, layout: Layout, read: Callable[[Mark], Reading]) -> bool:
    """Whether the group of texts at a mark has these hashes, lane by lane."""
    found = [TextHash() for _ in hashes]
    try:
        for n, text in enumerate(islice(read(mark), layout.group_samples)):
            found[n % layout.lanes].add(text)
    except NO_STATE:
        return False
    return [texts.hexdigest() for texts in found] == hashes


class HintWriter:
    """Passes texts on, and notes now and then where a group begins."""

    def __init__(self, reading: Reading, cache: Path, *, group_samples: int) -> None:
        """For one rank: the others have nothing to add."""
        self._reading, self._cache, self._group_samples = reading, cache, group_samples
        self._noted = time.monotonic()

    def __iter__(self) -> Iterator[Text]:
        """Yield the texts."""
        for text in self._reading:
            yield text
            index = self._reading.index
            if index % self._group_samples == 0 and time.monotonic() - self._noted >= EVERY:
                self._noted, mark = time.monotonic(), self._reading.mark()
                add_hint(Hint(mark.at, mark.state), self._cache, scratch=scratch(self._cache))
