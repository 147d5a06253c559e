"""What a run shows of its progress, on a terminal and elsewhere."""

import io
import logging
import re
import sys
import warnings

import pytest

from accel_distill import progress as progress_module
from accel_distill.progress import Committed, Progress

GB = 10**9


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", made)
    return made


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal; in the test, since pytest sets its own after the fixtures."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(progress_module, "DRAW_EVERY", 0.0)
    monkeypatch.setattr(progress_module, "terminal_width", lambda stream: 80)
    return made


def there(samples: int, *, positions: int, made: int, room: int | None = 69 * GB) -> Committed:
    """Return what the files of a cache say that takes 12.34 bytes a position."""
    size = round(12.34 * positions)
    return Committed(samples, positions, made, shard_bytes=size, disk_bytes=size + 5000, room_bytes=room)


def run(progress: Progress) -> None:
    """Four shards of 5 samples and 100 positions each, made in turn by this rank and another; 10 were there."""
    with progress:
        progress.committed(there(10, positions=200, made=0))
        progress.positions(60)
        progress.positions(40)
        progress.positions(-100)
        progress.committed(there(20, positions=400, made=200))
        progress.positions(100)
        progress.positions(-100)
        progress.committed(there(30, positions=600, made=400))


def lines_of(text: str) -> list[str]:
    """Return the lines that a terminal got, also those that were written over, without what moves its cursor."""
    return [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", text) if line.strip()]


def test_elsewhere_it_is_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    run(Progress(total=30, done=10, world_size=2, shown=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert re.fullmatch(
        r"10 of 30 samples \(33%\)  [\d,]+ positions/s now, [\d,]+ on average  12.34 bytes/position  7.47 kB on disk, "
        r"69.0 GB left  [\d.]+ (s|min|days|h \d+ min) left",
        lines[1],
    )
    assert lines[7].startswith("30 of 30 samples (100%)  ") and lines[7].endswith("  0 s left")
    assert re.fullmatch(
        r"30 of 30 samples \(100%\) in 0 s  [\d,]+ positions/s on average  12.34 bytes/position  12.4 kB on disk, "
        r"69.0 GB left",
        lines[8],
    )


def test_elsewhere_it_is_silent_for_half_a_minute_but_for_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(total=30, done=10, world_size=2, shown=True))
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert progress_module.LINE_EVERY == 30


def test_a_run_that_made_nothing_says_nothing_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=30, done=30, world_size=2, shown=True) as progress:
        progress.committed(there(30, positions=600, made=0))
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), Progress(total=30, done=0, world_size=1, shown=True) as progress:
        progress.positions(100)
        progress.committed(there(10, positions=200, made=200))
        raise ValueError
    assert capsys.readouterr().err.startswith("10 of 30 samples (33%) in 0 s  ")


def test_an_unknown_total_is_shown_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    run(Progress(total=None, done=0, world_size=1, shown=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("30 of ? samples  ") and lines[-2].endswith("time left unknown")
    assert lines[-1].startswith("30 of ? samples in 0 s  ")


def test_on_a_terminal_it_is_a_bar_and_a_line_of_figures_that_end_where_the_run_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_terminal(monkeypatch)
    run(Progress(total=30, done=10, world_size=2, shown=True))
    lines = lines_of(terminal.getvalue())
    bars = [line for line in lines if "|" in line]
    assert "10/30 samples" in bars[0] and bars[-1].startswith("100% |##########|") and "30/30 samples" in bars[-1]
    assert lines[-2] == "30 of 30 samples (100%) in 0 s"
    assert lines[-1].endswith("12.3 B/pos  12.4 kB on disk, 69.0 GB left")
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize(("width", "shown"), [(30, 1), (60, 2), (80, 3), (120, 3)])
def test_the_line_of_figures_fits_the_terminal_and_gives_up_its_last_figures_first(
    width: int, shown: int, clock: Clock
) -> None:
    progress = Progress(total=100_000_000, done=0, world_size=8, shown=True)
    clock.now = 100.0
    progress.positions(1_000_000)
    clock.now = 150.0
    progress.positions(1_000_000)
    progress.committed(there(12_345_678, positions=8_000_000_000, made=8_000_000_000, room=1234 * GB))
    line = progress._fitting(150.0, width=width)
    assert len(line) < width and len(line.split("  ")) == shown
    assert line.startswith("160,000 positions/s now" if width == 120 else "160 k pos/s")


def test_what_is_logged_and_what_warns_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    handler, root = logging.StreamHandler(terminal), logging.getLogger()
    root.addHandler(handler)
    try:
        with Progress(total=30, done=10, world_size=1, shown=True) as progress:
            progress.positions(10)
            logging.getLogger("somewhere").warning("careful")
            with warnings.catch_warnings():  # which pytest has in its own hands
                logging.captureWarnings(False)
                logging.captureWarnings(True)
                warnings.warn("old", UserWarning, stacklevel=1)
    finally:
        root.removeHandler(handler)
    lines = lines_of(terminal.getvalue())
    assert "careful" in lines and any(line.endswith("UserWarning: old") for line in lines)


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    run(Progress(total=30, done=10, world_size=2, shown=False))
    assert terminal.getvalue() == ""


def test_the_average_is_what_all_ranks_made_and_as_much_in_hand_as_here(clock: Clock) -> None:
    progress = Progress(total=20, done=0, world_size=4, shown=True)
    clock.now = 10.0
    progress.positions(500)
    assert progress._average(10.0) == 200  # 4 ranks with 500 each in 10 s
    progress.positions(-500)
    progress.committed(there(10, positions=3000, made=3000))
    assert progress._average(20.0) == 150


def test_the_speed_of_now_leaves_out_loading_and_what_is_more_than_a_minute_ago(clock: Clock) -> None:
    progress = Progress(total=1000, done=0, world_size=2, shown=True)
    clock.now = 300.0  # the teacher was loaded
    progress.positions(100)
    for _ in range(10):
        clock.now += 10.0
        progress.positions(100)
    assert progress._rate_now() == 20  # 10 a second, and another rank
    for _ in range(10):
        clock.now += 10.0
        progress.positions(50)
    assert progress._rate_now() == 10
    progress.committed(there(500, positions=5000, made=0))  # nothing was published in this run yet
    assert progress._seconds_left(clock.now) == pytest.approx((5000 - 2 * 1600) / 10)


def test_a_rank_that_has_done_its_part_takes_the_speed_from_what_the_others_publish(clock: Clock) -> None:
    progress = Progress(total=100, done=0, world_size=2, shown=True)
    progress.positions(1000)
    progress.positions(-1000)
    progress.committed(there(10, positions=1000, made=1000))
    for n in range(1, 20):
        clock.now += 10.0
        progress.committed(there(10 + n, positions=1000 + 100 * n, made=1000 + 100 * n))
    assert progress._rate_now() == 10
    assert progress._seconds_left(clock.now) == pytest.approx(710)  # 71 samples of 100 positions


def test_on_resume_the_time_left_is_of_what_is_missing_at_the_speed_of_this_run(clock: Clock) -> None:
    progress = Progress(total=1000, done=900, world_size=1, shown=True)
    progress.committed(there(900, positions=90_000, made=0))
    assert progress._seconds_left(0.0) is None
    progress.positions(10)
    clock.now = 10.0
    progress.positions(1000)
    assert progress._seconds_left(10.0) == pytest.approx((10_000 - 1010) / 100)


def test_retries_are_shown_once_there_are_some(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    progress = Progress(total=30, done=0, world_size=1, shown=True)
    progress.positions(10)
    progress.retried()
    progress.retried()
    lines = capsys.readouterr().err.splitlines()
    assert "retr" not in lines[0] and "  1 retry  " in lines[1] and "  2 retries  " in lines[2]
