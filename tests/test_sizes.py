"""The README's table of sizes, against figures worked by hand."""

import pytest

from accel_distill.figures import count, duration, size
from accel_distill.sizes import FINEWEB_MEAN, NAIVE_TOP_64, PACKED, USE_CASES, main, table


def test_a_million_packed_samples_of_naive_top_64_are_786_gigabytes_not_megabytes() -> None:
    assert NAIVE_TOP_64 == 384
    assert 2048 * 384 == 786_432  # one sample: 786 kB
    assert size(1_000_000 * PACKED * NAIVE_TOP_64) == "786 GB"


@pytest.mark.parametrize(
    ("number", "written"),
    [(0, "0.00 B"), (999, "999 B"), (1000, "1.00 kB"), (18_432, "18.4 kB"), (36_864_000_000, "36.9 GB")]
    + [(78_643_200_000_000, "78.6 TB"), (2.5e15, "2.50 PB"), (3e18, "3,000 PB")],
)
def test_sizes_are_decimal(number: float, written: str) -> None:
    assert size(number) == written


def test_counts_and_durations_take_the_largest_unit() -> None:
    assert [count(10_000 * PACKED), count(100_000_000 * FINEWEB_MEAN)] == ["20.5 M", "65.0 G"]
    assert [duration(s) for s in (5, 90, 3600, 86_400 * 2.5)] == ["5.00 s", "1.50 min", "1.00 h", "2.50 days"]


def test_a_row_multiplies_samples_length_bytes_and_speed() -> None:
    rows = table(18.0, 20_000.0).splitlines()
    assert len(rows) == 2 + len(USE_CASES) == 7
    # 1 M x 2,048 = 2.048 G tokens: x 18 B = 36.9 GB, / 20,000 = 102,400 s = 1.19 days; 1 M x 650: 11.7 GB, 9.03 h
    assert rows[4] == (
        "| small | 1,000,000 | 2.05 G tokens: 36.9 GB, 1.19 days | 650 M tokens: 11.7 GB, 9.03 h | 786 GB; 250 GB |"
    )


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bytes-per-position", "18", "--positions-per-second", "20000"]) == 0
    assert table(18.0, 20_000.0) in capsys.readouterr().out


def test_the_lengths_of_another_corpus_make_another_table(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ["--bytes-per-position", "10", "--positions-per-second", "1000", "--packed", "512", "--mean", "200"]
    assert main(inputs) == 0
    # 10 k x 512 = 5.12 M tokens: x 10 B = 51.2 MB, / 1,000 = 85.3 min; 10 k x 200 = 2 M: 20 MB, 33.3 min
    row = (
        "| quick test | 10,000 | 5.12 M tokens: 51.2 MB, 1.42 h | 2.00 M tokens: 20.0 MB, 33.3 min | 1.97 GB; 768 MB |"
    )
    printed = capsys.readouterr().out
    assert row in printed and "packed to 512 tokens each | the mean, 200 tokens each" in printed


def test_neither_bytes_nor_a_cache_is_a_mistake_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--positions-per-second", "1000"]) == 2
    assert "one of the arguments --bytes-per-position --cache is required" in capsys.readouterr().err
