"""The measurement of going on runs, and with a hint less is read."""

import re
import sys

import pytest

from bench import resume


def test_it_prints_the_seconds_of_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["resume.py", "--samples", "20000"])
    resume.main()
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"20,000 samples, \d MB of JSONL, 16 shards there", first)
    seconds = re.fullmatch(r"resume with a hint ([\d.]+) s, without ([\d.]+) s", second)
    assert seconds and all(float(figure) > 0 for figure in seconds.groups())
