"""What a run shows of its progress, on a terminal and elsewhere."""

import io
import re
import sys

import pytest

from accel_distill import progress as progress_module
from accel_distill.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress) -> None:
    """Four shards of 5 samples and 100 positions each, made in turn by this rank and another."""
    with progress:
        progress.positions(60)
        progress.positions(40)
        progress.positions(-100)
        progress.committed(20, made=200, bytes_per_position=12.34)
        progress.positions(100)
        progress.positions(-100)
        progress.committed(30, made=400, bytes_per_position=12.34)


def test_elsewhere_it_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    run(Progress(total=30, done=10, world_size=2, shown=True))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert re.fullmatch(r"10 of 30 samples  [\d,]+ positions/s  time left unknown", lines[0])
    assert re.fullmatch(r"20 of 30 samples  [\d,]+ positions/s  12.3 bytes/position  0 s left", lines[3])
    assert lines[6].startswith("30 of 30 samples")


def test_elsewhere_it_is_silent_for_half_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(total=30, done=10, world_size=2, shown=True))
    assert capsys.readouterr().err == ""
    assert progress_module.LINE_EVERY == 30


def test_an_unknown_total_is_shown_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    run(Progress(total=None, done=0, world_size=1, shown=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("30 of ? samples") and lines[-1].endswith("time left unknown")


def test_on_a_terminal_it_is_a_bar_that_ends_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(Progress(total=30, done=10, world_size=2, shown=True))
    frames = terminal.getvalue().split("\r")
    assert "10/30" in frames[1] and "30/30" in frames[-1]
    assert "positions/s=" in frames[-1] and "bytes/position=12.3" in frames[-1]


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    run(Progress(total=30, done=10, world_size=2, shown=False))
    assert terminal.getvalue() == ""


def test_positions_a_second_are_those_that_all_ranks_made_and_as_many_in_hand_as_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 10.0, 20.0])
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    progress = Progress(total=20, done=0, world_size=4, shown=True)
    progress.positions(500)
    progress.positions(-500)
    progress.committed(10, made=3000, bytes_per_position=None)
    lines = capsys.readouterr().err.splitlines()
    assert "  200 positions/s  " in lines[0]  # 4 ranks with 500 each in 10 s
    assert "  150 positions/s  20 s left" in lines[2]  # 3,000 in 20 s; half is done


def test_retries_are_shown_once_there_are_some(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    progress = Progress(total=30, done=0, world_size=1, shown=True)
    progress.positions(10)
    progress.retried()
    progress.retried()
    lines = capsys.readouterr().err.splitlines()
    assert "retries" not in lines[0] and "  2 retries  " in lines[2]
