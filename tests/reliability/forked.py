"""Ranks of `generate` as processes of their own that can be killed at will, started in a moment.

Importing torch and datasets costs seconds of CPU; a fork of a process that has them, nothing. So a server that has
imported them, and has run nothing, forks the ranks. They run the command's own `main`: signals, sentences and exit
statuses are the real ones. Only what rank 0 tells the others goes through a file instead of a process group.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from accel_distill.errors import RunError

TESTS = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
PATIENCE = 120.0  # seconds until a rank must have ended, on any machine


def start_server() -> None:
    """Start the server; what it cannot import it leaves out without a word, so it is told where the tests are."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), before]))
    CONTEXT.set_forkserver_preload(["reliability.forked_imports"])
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before


class Faults:
    """What goes wrong in a rank; made in the test, applied in the process."""

    def apply(self) -> None:
        """Arrange for it."""


class KillAt(Faults):
    """Kill -9 just before the n-th call of a step of publishing (counted from 0)."""

    def __init__(self, n: int) -> None:
        self.n = n

    def apply(self) -> None:
        from accel_distill import publish

        publish.os = CountedOs(kill_at=self.n)  # type: ignore[assignment]


class Count(Faults):
    """Write each step of publishing, with the name of its file, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def apply(self) -> None:
        from accel_distill import publish

        publish.os = CountedOs(path=self.path)  # type: ignore[assignment]


class Slow(Faults):
    """Compute each shard only after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def apply(self) -> None:
        from accel_distill import generate as command

        compute = command.ShardMaker.compute

        def slowly(*arguments: Any, **named: Any) -> Any:
            time.sleep(self.seconds)
            return compute(*arguments, **named)

        command.ShardMaker.compute = slowly  # type: ignore[method-assign]


class Stuck(Faults):
    """Wait for ever in C in the main thread, where no signal reaches Python; as in a collective."""

    def apply(self) -> None:
        from accel_distill import generate as command
        from accel_distill import stopping

        def stuck(*_: Any, **__: Any) -> None:
            mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)

        command.ShardMaker.compute = stuck  # type: ignore[assignment, method-assign]
        stopping.GRACE = 0.5


class SlowDisk(Faults):
    """Write for ever, in the thread that publishes."""

    def apply(self) -> None:
        from accel_distill import shard_writer

        def publish(*_: Any, **__: Any) -> bool:
            time.sleep(PATIENCE)
            return True

        shard_writer.publish = publish


class Fails(Faults):
    """Fail to publish with an error number, from the n-th shard on."""

    def __init__(self, code: int, *, after: int = 0) -> None:
        self.code, self.after = code, after

    def apply(self) -> None:
        from accel_distill import publish

        calls = itertools.count()

        def link(*arguments: Any) -> None:
            if "shard-" in str(arguments[1]) and next(calls) >= self.after:
                raise OSError(self.code, os.strerror(self.code))
            os.link(*arguments)

        publish.os = Changed(link=link)  # type: ignore[assignment]


class Changed:
    """The module `os` with some functions of its own."""

    def __init__(self, **functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return self._functions.get(name) or getattr(os, name)


STEPS = ("open", "write", "fsync", "fstat", "close", "link", "rename", "replace", "unlink")


class CountedOs:
    """The module `os`, whose steps are counted."""

    def __init__(self, *, kill_at: int | None = None, path: Path | None = None) -> None:
        self._kill_at, self._path, self._calls = kill_at, path, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: Any, **named: Any) -> Any:
            if self._calls == self._kill_at:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self._calls += 1
            if self._path is not None:
                with open(self._path, "a") as file:
                    file.write(f"{name} {_file_of(arguments)}\n")
            return real(*arguments, **named)

        return step


def _file_of(arguments: Sequence[Any]) -> str:
    """Return the name that a step is about: of a descriptor the last path that it links to."""
    last = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], Path) else arguments[0]
    return os.path.basename(os.readlink(f"/proc/self/fd/{last}") if isinstance(last, int) else str(last))


def run_rank(
    run_file: str,
    rank: int,
    world_size: int,
    handover: str,
    errors: Connection,
    faults: Faults | None,
    patience: float,
) -> None:
    """Be one rank; the process's whole life. What it says goes to a pipe, which no full disk stops."""
    import torch

    from accel_distill import alive
    from accel_distill import generate as command
    from accel_distill.processes import World
    from accel_distill.stopping import end

    path = Path(handover)

    def hand_over(made: Any) -> None:
        if world_size == 1:
            return
        path.with_suffix(".new").write_bytes(pickle.dumps(made))
        os.replace(path.with_suffix(".new"), path)

    class FileWorld(World):
        def from_main(self, make: Any) -> Any:
            if self.is_main:
                try:
                    made = make()
                except RunError as error:
                    hand_over(error)
                    raise
                hand_over(made)
                return made
            end = time.monotonic() + PATIENCE
            while not path.exists() and time.monotonic() < end:
                time.sleep(0.005)
            made = pickle.loads(path.read_bytes())
            if isinstance(made, RunError):
                raise SystemExit(made.exit_status)
            return made

        def leave(self) -> None:
            pass

    os.environ["RANK"] = str(rank)
    os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    alive.BEAT = patience / alive.LOOKS_TO_DIE
    command.start_processes = lambda: FileWorld(rank, world_size, torch.device("cpu"), "NO")
    if faults is not None:
        faults.apply()
    end(command.main(["--config", run_file, "--force"]))  # what the estimate refuses is not what is tested here


class Run:
    """A run of `generate` on so many ranks."""

    def __init__(
        self,
        run_file: Path,
        world_size: int,
        *,
        faults: dict[int, Faults] | None = None,
        patience: float = 2.0,
    ) -> None:
        """Start it. `faults` are of some ranks; `patience`: seconds after which a silent rank counts as dead."""
        start_server()
        self._handover = run_file.parent / f"handover-{uuid.uuid4().hex}"
        self.ranks: list[BaseProcess] = []
        self._errors: list[Connection] = []
        self._said = [b""] * world_size
        for rank in range(world_size):
            reader, writer = CONTEXT.Pipe(duplex=False)
            fault = (faults or {}).get(rank)
            given = (str(run_file), rank, world_size, str(self._handover), writer, fault, patience)
            self.ranks.append(CONTEXT.Process(target=run_rank, args=given))
            self.ranks[-1].start()
            writer.close()
            os.set_blocking(reader.fileno(), False)
            self._errors.append(reader)

    def kill(self) -> int:
        """Kill -9 every rank, and see that they are gone; return how many were still alive."""
        alive = 0
        for rank in self.ranks:
            alive += rank.is_alive()
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
        self.wait()
        return alive

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Return the exit statuses, -9 for a rank that was killed; no process of the run is left."""
        for rank in self.ranks:
            rank.join(timeout)
        late = [number for number, rank in enumerate(self.ranks) if rank.exitcode is None]
        for number in late:
            self.ranks[number].kill()
            self.ranks[number].join()
        assert not late, f"ranks {late} did not end in {timeout} s: {self.said(late[0])}"
        return [rank.exitcode if rank.exitcode is not None else 0 for rank in self.ranks]

    def said(self, rank: int) -> str:
        """Return what a rank has written to standard error."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._errors[rank].fileno(), 1 << 16):
                self._said[rank] += part
        return self._said[rank].decode()


@contextlib.contextmanager
def running(run: Run) -> Iterator[Run]:
    """Leave no rank behind, whatever the test finds."""
    try:
        yield run
    finally:
        run.kill()
