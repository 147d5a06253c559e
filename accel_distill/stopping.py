"""How a run is stopped from outside: by a signal, or by another thread of the process that has seen a reason.

The one decision: a stop is an exception in the main thread, wherever that is; and where it does not come up (a library
waits for another rank, and no Python runs) the process is ended all the same, with the same exit status. That is safe
because a kill at any moment is: whatever has its final name is whole.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from accel_distill.errors import Stopped, say, status_of

WATCHED = (signal.SIGINT, signal.SIGTERM)
RAISE = signal.SIGUSR2  # wakes the main thread for an error that another thread has seen
GRACE = 10.0  # seconds until the main thread must have noticed
LONGEST = 20.0  # seconds from then until the process must have ended: the shard in the writer is published
AGAIN = 0.01  # seconds until a stop is tried again that came where it would be lost
AFTERWARDS = 10.0  # seconds for threads and exit functions of a command that was stopped or failed
PARENT_EVERY = 1.0  # seconds between two looks of a forked process at whether the one that forked it is there
ONE_KEYPRESS = 0.5  # seconds in which a terminal and a launcher may both pass on one Ctrl-C


class Stop:
    """The stop of one process; made by `stop_on_signals`."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._noticed = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.RLock()  # a second signal may come while the first is handled

    def ask(self, error: BaseException) -> None:
        """Raise `error` in the main thread, from any thread; the first reason counts."""
        if self._take(error):
            signal.pthread_kill(threading.main_thread().ident or 0, RAISE)

    def signalled(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread: raise, once."""
        if number != RAISE:
            self._take(Stopped(number))
        if self._error is None or self._noticed.is_set():
            return
        if _is_lost_in(frame):
            again = threading.Timer(AGAIN, signal.pthread_kill, args=(threading.get_ident(), RAISE))
            again.daemon = True
            again.start()
            return
        self._noticed.set()
        raise self._error

    def watch(self, pipe: int) -> None:
        """Read the numbers of signals as they come, also while the main thread runs no Python; run in a thread."""
        first_interrupt: float | None = None
        while numbers := os.read(pipe, 64):
            for number in set(numbers) & {*WATCHED}:
                self._take(Stopped(number))
                if number == signal.SIGINT and first_interrupt is not None:
                    if time.monotonic() - first_interrupt > ONE_KEYPRESS:
                        self._end()  # a second Ctrl-C
                elif number == signal.SIGINT:
                    first_interrupt = time.monotonic()
        os.close(pipe)

    def close(self) -> None:
        """Say that the command has ended by itself."""
        self._ended.set()

    def forget(self) -> None:
        """In a process forked from this one: a signal is its own affair, and must not reach this one's pipe.

        But it ends when this one does. A dataloader worker would else wait for ever to be rid of a batch, and its
        copies of the sockets keep other ranks from seeing that this one has died.
        """
        if not self._ended.is_set():
            signal.set_wakeup_fd(-1)
            for number in (*WATCHED, RAISE):
                signal.signal(number, signal.SIG_DFL)
            threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()

    def _take(self, error: BaseException) -> bool:
        with self._lock:
            if self._error is not None:
                return False
            self._error = error
        threading.Thread(target=self._see_it_end, name="stop", daemon=True).start()
        return True

    def _see_it_end(self) -> None:
        self._noticed.wait(GRACE)
        if not self._ended.wait(LONGEST if self._noticed.is_set() else 0.0):
            self._end()

    def _end(self) -> None:
        assert self._error is not None
        if not self._ended.is_set():
            say(self._error)
            os._exit(status_of(self._error))


def _is_lost_in(frame: FrameType | None) -> bool:
    """Whether Python would only print an exception raised there: in a finalizer, or a callback of a weak reference."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def _end_with(parent: int) -> None:
    """End this process once `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY)
    os._exit(1)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Let SIGTERM and SIGINT raise `Stopped` in the block, which the main thread runs; undone at its end.

    A signal that this process was told to ignore stays ignored.
    """
    stop = Stop()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = [number for number in (*WATCHED, RAISE) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.signalled) for number in heard}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=stop.forget)
    threading.Thread(target=stop.watch, args=(reader,), name="signals", daemon=True).start()
    try:
        yield stop
    finally:
        stop.close()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread


def end(status: int) -> NoReturn:
    """End the process with the exit status of its command: exit functions run, the interpreter is not taken down.

    Taking it down ends in two ways that were seen. A stop may have come up in a library that had just started a
    thread (as the one that loads the teacher's weights does): nobody tells that thread to end, and the interpreter
    waits for it for ever, so after a failure it gets AFTERWARDS. And a thread of gloo that drops its last tensor while
    Python before 3.14 is taken down dies of SIGABRT, after all the work is done.
    """
    if status:
        watchdog = threading.Timer(AFTERWARDS, os._exit, args=(status,))
        watchdog.daemon = True
        watchdog.start()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does first
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
