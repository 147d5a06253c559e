"""A stream that fails and is opened again: no text lost, none twice, and another stream under the name is refused."""

import asyncio
import errno
import random
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.exceptions
import pytest

from accel_distill import reading as module
from accel_distill.errors import CacheMismatch, ConfigError, RunError
from accel_distill.reading import START, Mark, Reading, is_transient

TEXTS = [None if n % 9 == 4 else f"text {n}" for n in range(300)]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which do not happen; and marks every 10 samples."""
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setattr(module, "MARK_EVERY", 10)
    return waited


class Source:
    """A list of texts behind a network that fails at some reads, with a state that may lie."""

    def __init__(self, texts: list[str | None] = TEXTS, *, fails: Callable[[int], bool] = lambda read: False) -> None:
        self.texts, self.fails = texts, fails
        self.reads = self.opened = 0
        self.at = 0
        self.starts: list[int] = []
        self.lie = 0
        self.error: Callable[[], Exception] = lambda: ConnectionResetError(errno.ECONNRESET, "reset")

    def open_at(self, mark: Mark) -> Iterator[str | None]:
        self.opened += 1
        self.starts.append(mark.at)
        self.at = mark.at if not mark.at else mark.state + self.lie
        for text in self.texts[self.at :]:
            self.reads += 1
            if self.fails(self.reads):
                raise self.error()
            self.at += 1
            yield text

    def reading(self, start: Mark = START) -> tuple[Reading, list[str]]:
        told: list[str] = []
        return Reading(self.open_at, state=lambda: self.at, name="a/b", start=start, tell=told.append), told


def test_without_a_failure_the_texts_come_once_in_order() -> None:
    source = Source()
    reading, told = source.reading()
    assert list(reading) == TEXTS
    assert (source.opened, told, reading.index) == (1, [], 300)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_failures_at_random_lose_and_repeat_nothing(rate: float, seed: int, waits: list[float]) -> None:
    choice = random.Random(seed)
    source = Source(fails=lambda read: choice.random() < rate / 10)
    reading, told = source.reading()
    assert list(reading) == TEXTS
    assert len(told) == len(waits) == source.opened - 1


def test_it_goes_on_from_the_last_mark_and_not_from_the_start(waits: list[float]) -> None:
    source = Source(fails=lambda read: read == 257)
    reading, told = source.reading()
    assert list(reading) == TEXTS
    assert source.starts == [0, 250]
    assert told == ["dataset a/b: reading sample 256 failed ([Errno 104] reset); try 1 of 5 in 1 s"]
    assert waits == [1.0]


def test_just_after_a_mark_the_one_before_is_taken_so_that_something_can_be_checked() -> None:
    source = Source(fails=lambda read: read == 251)
    assert list(source.reading()[0]) == TEXTS
    assert source.starts == [0, 240]


def test_a_state_that_leads_elsewhere_is_noticed_and_the_stream_read_from_its_start() -> None:
    source = Source(fails=lambda read: read == 257)
    source.lie = 3
    assert list(source.reading()[0]) == TEXTS
    assert source.starts == [0, 250, 240, 0]


def test_a_stream_that_changed_while_it_was_read_is_refused_with_the_range() -> None:
    source = Source(fails=lambda read: read == 57)
    reading, _ = source.reading()
    read = [next(reading) for _ in range(56)]
    source.texts = ["other", *TEXTS[1:50], "other", *TEXTS[51:]]
    with pytest.raises(CacheMismatch, match="the stream changed while it was read: samples 0 to 55 are not what they"):
        next(reading)
    assert read == TEXTS[:56]


def test_a_stream_that_became_shorter_while_it_was_read_is_refused() -> None:
    source = Source(fails=lambda read: read == 57)
    reading, _ = source.reading()
    for _ in range(56):
        next(reading)
    source.texts = TEXTS[:40]
    with pytest.raises(CacheMismatch, match="the stream changed"):
        next(reading)


def test_it_gives_up_after_five_tries_in_a_row_and_says_how_to_go_on(waits: list[float]) -> None:
    source = Source(fails=lambda read: read > 20)
    reading, told = source.reading()
    with pytest.raises(
        RunError, match=r"reading sample 20 failed 6 times in a row \(\[Errno 104\] reset\); run the same"
    ):
        list(reading)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert len(told) == 5


def test_progress_begins_the_count_anew(waits: list[float]) -> None:
    failing = {30, 31, 32, 33, 90, 91, 92, 93}
    source = Source(fails=lambda read: read in failing)
    assert list(source.reading()[0]) == TEXTS
    assert waits == [1.0, 2.0, 4.0, 8.0] * 2


def test_a_failure_of_another_kind_is_not_tried_again(waits: list[float]) -> None:
    source = Source(fails=lambda read: read == 5)
    source.error = lambda: ConfigError("a column that is no text")
    with pytest.raises(ConfigError):
        list(source.reading()[0])
    assert waits == []


def test_a_reading_may_begin_at_any_mark() -> None:
    source = Source(fails=lambda read: read == 100)
    reading, _ = source.reading(Mark(123, 123))
    assert list(reading) == TEXTS[123:]
    assert source.starts == [123, 213]


class Response:
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


class HubError(OSError):
    """As huggingface_hub raises it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from the hub")
        self.response = Response(status)


def behind(cause: Exception) -> Exception:
    """As the datasets library raises what a library behind it has raised."""
    try:
        try:
            raise cause
        except type(cause) as error:
            raise RuntimeError("generating the dataset failed") from error
    except RuntimeError as error:
        return error


def of_module(name: str) -> Exception:
    """An exception of a library that may not be there."""
    return type("NetworkError", (Exception,), {"__module__": name})()


PASSING: dict[str, Any] = {
    "reset": ConnectionResetError(),
    "timeout": TimeoutError(),
    "asyncio timeout": asyncio.TimeoutError(),
    "fsspec": fsspec.exceptions.FSTimeoutError(),
    "aiohttp": of_module("aiohttp.client_exceptions"),
    "httpx": of_module("httpx"),
    "hub 503": HubError(503),
    "hub 429": HubError(429),
    "unreachable": OSError(errno.EHOSTUNREACH, "no route"),
    "stale": OSError(errno.ESTALE, "stale file handle"),
    "input/output": OSError(errno.EIO, "input/output error"),
    "behind": behind(of_module("httpcore")),
}
LASTING: dict[str, Any] = {
    "no file": FileNotFoundError(errno.ENOENT, "gone"),
    "no right": PermissionError(errno.EACCES, "no"),
    "full": OSError(errno.ENOSPC, "full"),
    "no number": OSError("Couldn't deserialize thrift"),
    "hub 404": HubError(404),
    "hub 401": HubError(401),
    "value": ValueError("JSON parse error"),
    "behind": behind(KeyError("text")),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str) -> None:
    assert is_transient(PASSING[name])


@pytest.mark.parametrize("name", LASTING)
def test_what_will_not_pass_is_not(name: str) -> None:
    assert not is_transient(LASTING[name])
