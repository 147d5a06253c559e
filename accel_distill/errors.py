"""What can go wrong that a user, a file or a machine causes, each with the exit status of its command.

The one decision: a command catches `RunError` and nothing else, so a bug of ours still shows its traceback.
"""

import os
import signal
import sys
from collections.abc import Callable


class RunError(Exception):
    """A failure whose message is for the user: what was found, what was expected, what to do."""

    exit_status = 1


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


def exit_with(command: Callable[[], int]) -> int:
    """Run `command`; turn a `RunError`, or Ctrl-C, into one sentence on standard error and its exit status."""
    try:
        return command()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; what was published or saved is kept (see the README)", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
