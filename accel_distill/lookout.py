"""What a rank keeps an eye on while it works: the other ranks, and the room on the disk.

The one decision: it is a thread of its own, so that it looks every few seconds also while a shard takes an hour, and
what it sees reaches the main thread as an exception (see stopping.py), or at the next `check`.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from accel_distill import alive
from accel_distill.disk_space import DiskSpace
from accel_distill.errors import RankStopped, RunError, Stopped, status_of
from accel_distill.stopping import Stop

DISK_EVERY = 3  # beats
EXPLAINED_AFTER = alive.LOOKS_UNHELD + 2  # beats, until the death of a rank must have been seen


class Lookout:
    """The thread; a context. Leaving it tells the other ranks whether this one is done or has failed."""

    def __init__(self, ranks: alive.Ranks, space: DiskSpace, *, rank: int, stop: Stop | None) -> None:
        """`stop`: how to reach the main thread; without it only `check` raises what was seen."""
        self.space = space
        self._ranks, self._rank, self._stop = ranks, rank, stop
        self._ended = threading.Event()
        self._seen: RunError | None = None
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)

    def __enter__(self) -> "Lookout":
        self._thread.start()
        return self

    def check(self) -> None:
        """Raise what the thread has seen."""
        if self._seen is not None:
            raise self._seen

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what the thread sees of the other ranks in place of an error that came of it in a collective."""
        try:
            yield
        except RuntimeError as error:  # of torch.distributed, when the connection to a rank is closed
            end = time.monotonic() + EXPLAINED_AFTER * alive.BEAT
            while time.monotonic() < end:
                if self._seen is not None:
                    raise self._seen from error
                time.sleep(0.1)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is None:
            self._ranks.leave()
        else:
            self._ranks.fail(_reason(error, self._rank), status=status_of(error))
        self._ranks.close()

    def _run(self) -> None:
        beats = 0
        while not self._ended.wait(alive.BEAT):
            beats += 1
            try:
                self._ranks.beat()
                self._ranks.look()
                if beats % DISK_EVERY == 0:
                    self.space.check()
            except RunError as error:
                self._seen = error
                self._ranks.fail(_reason(error, self._rank), status=error.exit_status)
                if self._stop is not None:
                    self._stop.ask(error)
                return


def _reason(error: BaseException, rank: int) -> str:
    """Return what the other ranks are told."""
    if isinstance(error, RankStopped):
        return str(error)
    if isinstance(error, Stopped):
        return f"rank {rank} was stopped by {signal.Signals(error.number).name}"
    if isinstance(error, RunError):
        return f"rank {rank} stopped: {error}"
    return f"rank {rank} failed with {type(error).__name__}; see what it printed"
