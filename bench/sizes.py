"""Print the README's table: what a cache takes, in tokens, bytes and hours, from a quick test to production.

The one decision: only two measured numbers go in, bytes a position and positions a second, and everything else
is multiplied out here, where a test works the figures by hand. A published table of this kind is wrong by a
factor of 1000. Cost: a position is counted for every token, one too many for each sample.

    python bench/sizes.py --cache caches/fineweb --positions-per-second 20000
    python bench/sizes.py --bytes-per-position 18 --positions-per-second 20000
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

USE_CASES = {
    "quick test": 10_000,
    "development": 100_000,
    "small": 1_000_000,
    "medium": 10_000_000,
    "large": 100_000_000,
}
PACKED = 2048  # tokens a sample that fills max_length
FINEWEB_MEAN = 341  # tokens a document: 15 T tokens in 44 G documents
NAIVE_TOP_64 = 64 * (2 + 4)  # bytes a position: float16 and int32 for each of 64 ids


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description="Print what caches take, as a Markdown table.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bytes-per-position", type=float, metavar="X", help="measured before")
    source.add_argument("--cache", type=Path, help="a cache to take the bytes per position from")
    parser.add_argument("--positions-per-second", type=float, metavar="Y", required=True, help="of all processes")
    arguments = parser.parse_args(argv)
    bytes_per_position = arguments.bytes_per_position or inspected_bytes_per_position(arguments.cache)
    print(f"{bytes_per_position:.1f} bytes a position, {arguments.positions_per_second:,.0f} positions a second:\n")
    print(table(bytes_per_position, arguments.positions_per_second))
    return 0


def table(bytes_per_position: float, positions_per_second: float) -> str:
    """Return one row for each use case: what it takes packed, at FineWeb's mean length, and naively."""
    rows = [
        "| use case | `dataset.max_samples` | packed to 2,048 tokens each | FineWeb's mean, 341 tokens each"
        " | naive top-64 (packed; mean) |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for use_case, samples in USE_CASES.items():
        both = [samples * length for length in (PACKED, FINEWEB_MEAN)]
        cells = [
            f"{count(tokens)} tokens: {size(tokens * bytes_per_position)}, {duration(tokens / positions_per_second)}"
            for tokens in both
        ]
        naive = "; ".join(size(tokens * NAIVE_TOP_64) for tokens in both)
        rows.append(f"| {use_case} | {samples:,} | {' | '.join(cells)} | {naive} |")
    return "\n".join(rows)


def size(number: float) -> str:
    """Return a number of bytes in decimal units: 1 GB is 10**9 bytes."""
    return _scaled(number, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def count(number: float) -> str:
    """Return a number with its thousands (k), millions (M), billions (G) or trillions (T)."""
    return _scaled(number, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")))


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it is at least one."""
    return _scaled(seconds, ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s")))


def inspected_bytes_per_position(cache: Path) -> float:
    """Return what `accel-distill inspect` measures for a cache."""
    command = [sys.executable, "-m", "accel_distill", "inspect", str(cache), "--json"]
    inspected = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if inspected.returncode:
        sys.exit(inspected.returncode)  # it has said why
    return float(json.loads(inspected.stdout)["bytes_per_position"])


def _scaled(number: float, units: Sequence[tuple[float, str]]) -> str:
    """Return `number` with three digits in the first unit that does not exceed it, or else in the last."""
    scale, unit = next(((scale, unit) for scale, unit in units if number >= scale), units[-1])
    scaled = number / scale
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:,.{digits}f} {unit}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
