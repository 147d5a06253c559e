"""What can go wrong that a user, a file or a machine causes, each with the exit status of its command.

The one decision: a command catches `RunError` and nothing else, so a bug of ours still shows its traceback.
"""

import os
import re
import signal
import sys
from collections.abc import Callable

# What every stop for want of room ends with.
TO_GO_ON = (
    "then run the same command again: it goes on, nothing half-written was kept (a cache takes less with a lower "
    "dataset.max_samples, a higher targets.threshold or a lower targets.top_k)"
)

# How torch raises an error of a dataloader worker anew: a text with the worker's traceback is its message.
OF_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")


class RunError(Exception):
    """A failure whose message is for the user: what was found, what was expected, what to do."""

    exit_status = 1

    def __str__(self) -> str:
        """Return the message; of a worker's error the one that was raised there, without its traceback."""
        said = super().__str__()
        if OF_A_WORKER.match(said):
            return re.split(rf"\n(?:\w+\.)*{type(self).__name__}: ", said)[-1].strip()
        return said


class ConfigError(RunError):
    """Usage or configuration: a wrong word, a file or column that is not there, an unfit launcher."""

    exit_status = 2


class DoesNotFit(RunError):
    """The run, as configured, does not fit the disk."""

    exit_status = 3


class DiskGuard(RunError):
    """Stopped because the disk is (nearly) full; the same command goes on later."""

    exit_status = 4


class CacheMismatch(RunError):
    """The cache belongs to another run: other teacher, tokenizer, text, target settings or layout."""

    exit_status = 5


class DamagedCache(RunError):
    """A file of the cache is not what was published."""

    exit_status = 6


class RankStopped(RunError):
    """Another rank of the run died, or stopped with an error; the exit status is that rank's."""

    def __init__(self, message: str, *, exit_status: int = 1, is_told: bool = False) -> None:
        """`is_told`: another rank has printed why, so that of the others only rank 0 repeats it."""
        super().__init__(message)
        self.exit_status, self.is_told = exit_status, is_told


class NotFinite(RunError):
    """A number is NaN or infinite."""


class Stopped(KeyboardInterrupt):
    """A signal asks the process to stop; a KeyboardInterrupt, so that no library takes it for a failure of its own."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def exit_with(command: Callable[[], int]) -> int:
    """Run `command`; turn a `RunError`, or a signal, into one sentence on standard error and its exit status."""
    try:
        return command()
    except (RunError, KeyboardInterrupt) as error:
        say(error)
        return status_of(error)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def say(error: BaseException) -> None:
    """Print the one sentence of an end that is not a bug; what every rank is told, rank 0 alone prints."""
    is_main = os.environ.get("RANK", "0") == "0"
    if isinstance(error, RankStopped) and error.is_told and not is_main:
        return
    if isinstance(error, RunError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, KeyboardInterrupt) and is_main:
        number = _signal_of(error)
        how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        print(
            f"{how}; what was published or saved is kept; docs/resuming.md says how to go on",
            file=sys.stderr,
            flush=True,
        )


def status_of(error: BaseException) -> int:
    """Return the exit status of a process that ends for this reason."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + _signal_of(error)
    return error.exit_status if isinstance(error, RunError) else 1


def _signal_of(error: KeyboardInterrupt) -> int:
    return error.number if isinstance(error, Stopped) else signal.SIGINT
