"""The README's table of sizes, against figures worked by hand."""

import pytest

from bench.sizes import FINEWEB_MEAN, NAIVE_TOP_64, PACKED, USE_CASES, count, duration, main, size, table


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
    assert [count(10_000 * PACKED), count(100_000_000 * FINEWEB_MEAN)] == ["20.5 M", "34.1 G"]
    assert [duration(s) for s in (5, 90, 3600, 86_400 * 2.5)] == ["5.00 s", "1.50 min", "1.00 h", "2.50 days"]


def test_a_row_multiplies_samples_length_bytes_and_speed() -> None:
    rows = table(18.0, 20_000.0).splitlines()
    assert len(rows) == 2 + len(USE_CASES) == 7
    # 1 M x 2,048 = 2.048 G tokens: x 18 B = 36.9 GB, / 20,000 = 102,400 s = 1.19 days; 1 M x 341: 6.14 GB, 4.74 h
    assert rows[4] == (
        "| small | 1,000,000 | 2.05 G tokens: 36.9 GB, 1.19 days | 341 M tokens: 6.14 GB, 4.74 h | 786 GB; 131 GB |"
    )


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bytes-per-position", "18", "--positions-per-second", "20000"]) == 0
    assert table(18.0, 20_000.0) in capsys.readouterr().out
