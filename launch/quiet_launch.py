"""`accelerate launch`, but a failure is what the failed process said: no trace of the launcher's, and its exit status.

Accelerate turns any failure of a process into exit status 1 and 40 lines of traceback around the one sentence that
matters. Used by start.sh: python launch/quiet_launch.py [flags of accelerate launch] -m MODULE ARGUMENTS
"""

import logging
import signal
import subprocess
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C in the seconds of importing is no traceback

from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402


def main() -> int:
    """Launch; return the exit status of the process that failed first, 128 + n for signal n."""
    logging.disable(logging.CRITICAL)  # of this process, the launcher, alone
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return as_status(failure.exitcode)
    except subprocess.CalledProcessError as error:
        return as_status(error.returncode)
    except SignalException as error:
        return 128 + error.sigval
    except ImportError as error:  # of DeepSpeed, which the configuration asks for
        reason = " ".join(str(error).split())
        print(
            f"error: {reason} (launch/setup.sh deepspeed, or pip install 'accel-distill[deepspeed]')", file=sys.stderr
        )
        return 2
    return 0


def as_status(code: int) -> int:
    """Return what a shell would say of a process that ended with `code` (negative: by that signal)."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
