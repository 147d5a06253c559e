"""Signals and stops in one process: an exception in the main thread, and everything as before afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from accel_distill.errors import DiskGuard, RunError, Stopped, exit_with, status_of
from accel_distill.stopping import RAISE, WATCHED, Stop, stop_on_signals


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_is_an_exception_in_the_block_with_its_number(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (*WATCHED, RAISE)]
    with pytest.raises(Stopped) as caught, stop_on_signals():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert caught.value.number == number and status_of(caught.value) == 128 + number
    assert [signal.getsignal(each) for each in (*WATCHED, RAISE)] == before


def test_another_thread_can_raise_its_error_in_the_main_thread() -> None:
    def ask(stop: Stop) -> None:
        time.sleep(0.1)
        stop.ask(DiskGuard("the disk is nearly full"))

    begun = time.monotonic()
    with pytest.raises(DiskGuard, match="nearly full"), stop_on_signals() as stop:
        threading.Thread(target=ask, args=(stop,)).start()
        time.sleep(30)
    assert time.monotonic() - begun < 20


def test_only_the_first_reason_is_raised_and_only_once() -> None:
    with stop_on_signals() as stop:
        with pytest.raises(RunError, match="first"):
            stop.ask(RunError("first"))
            time.sleep(10)
        stop.ask(RunError("second"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # nothing more is raised while the run ends


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("3", 0)])
def test_what_all_ranks_are_told_by_a_signal_rank_0_says(
    rank: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> int:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setenv("RANK", rank)
    assert exit_with(stopped) == 143
    assert capsys.readouterr().err.count("stopped by SIGTERM; what was published or saved is kept") == said


def test_a_forked_process_dies_of_its_own_signal_and_the_first_one_does_not_hear_of_it() -> None:
    with stop_on_signals():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.2)


class Slow:
    """Takes its time to be deleted, where an exception is only printed."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_comes_in_a_finalizer_is_raised_behind_it() -> None:
    begun = time.monotonic()
    with pytest.raises(Stopped), stop_on_signals():
        Slow()  # deleted at once
        time.sleep(10)
    assert time.monotonic() - begun < 5


def test_a_forked_process_ends_when_the_one_that_forked_it_was_killed() -> None:
    program = "import os, time; from accel_distill.stopping import stop_on_signals\n"
    program += (
        "with stop_on_signals():\n    child = os.fork()\n    print(child or '', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert any(line.strip() for line in parent.stdout)
        begun = time.monotonic()
        parent.kill()
        parent.stdout.read()  # to its end: nobody holds the other end of the pipe any more
    assert time.monotonic() - begun < 30


def test_a_thread_that_a_library_left_behind_does_not_keep_a_stopped_process() -> None:
    waits = "import threading; threading.Thread(target=threading.Event().wait).start(); "
    ends = "from accel_distill import stopping; stopping.AFTERWARDS = 0.5; stopping.end(143)"
    assert subprocess.run([sys.executable, "-c", waits + ends], timeout=60).returncode == 143


def test_what_is_to_run_at_exit_runs_and_is_written_before_the_process_ends() -> None:
    program = "import atexit, sys; from accel_distill.stopping import end; atexit.register(print, 'at exit'); "
    program += "atexit.register(sys.stderr.write, 'and an error'); print('done'); end(3)"
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\nat exit\n", "and an error")


def test_a_process_that_did_its_work_waits_for_the_threads_it_has() -> None:
    writes = "import threading, time; threading.Timer(1.0, print, ['written']).start(); "
    ends = "from accel_distill import stopping; stopping.AFTERWARDS = 0.0; stopping.end(0)"
    done = subprocess.run([sys.executable, "-c", writes + ends], timeout=60, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "written\n")
