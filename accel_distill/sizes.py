"""`accel-distill sizes`: what caches take, in tokens, bytes and hours, from a quick test to production.

The one decision: only measured numbers go in (bytes a position, positions a second, tokens a sample), and everything
else is multiplied out here, where a test works the figures by hand. A published table of this kind is wrong by a
factor of 1000. Cost: a position is counted for every token, one too many for each sample.

    accel-distill sizes --cache caches/fineweb --positions-per-second 20000
    accel-distill sizes --bytes-per-position 18 --positions-per-second 20000
"""

from collections.abc import Sequence
from pathlib import Path

from accel_distill.command_line import OneSentenceParser
from accel_distill.errors import ConfigError, exit_with
from accel_distill.figures import count, duration, size

USE_CASES = {
    "quick test": 10_000,
    "development": 100_000,
    "small": 1_000_000,
    "medium": 10_000_000,
    "large": 100_000_000,
}
PACKED = 2048  # tokens a sample that fills max_length
FINEWEB_MEAN = 650  # tokens a document: samples of 10 and 100 G tokens have 15 and 161 M documents
NAIVE_TOP_64 = 64 * (2 + 4)  # bytes a position: float16 and int32 for each of 64 ids


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table as Markdown; return the exit status."""

    def run() -> int:
        parser = OneSentenceParser(prog="accel-distill sizes", description="Print what caches take, as Markdown.")
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--bytes-per-position", type=float, metavar="X", help="as `estimate` measures them")
        source.add_argument("--cache", type=Path, help="a cache to take the bytes per position from")
        parser.add_argument("--positions-per-second", type=float, metavar="Y", required=True, help="of all processes")
        parser.add_argument("--packed", type=int, default=PACKED, metavar="N", help="tokens of a full sample (2048)")
        parser.add_argument(
            "--mean", type=int, default=FINEWEB_MEAN, metavar="N", help="tokens of a mean sample (650, FineWeb's)"
        )
        given = parser.parse_args(argv)
        per_position = given.bytes_per_position or _bytes_per_position(given.cache)
        print(f"{per_position:.1f} bytes a position, {given.positions_per_second:,.0f} positions a second:\n")
        print(table(per_position, given.positions_per_second, packed=given.packed, mean=given.mean))
        return 0

    return exit_with(run)


def table(
    bytes_per_position: float, positions_per_second: float, *, packed: int = PACKED, mean: int = FINEWEB_MEAN
) -> str:
    """Return one row for each use case: what it takes packed, at the corpus' mean length, and naively."""
    corpus = "FineWeb's mean" if mean == FINEWEB_MEAN else "the mean"
    rows = [
        f"| use case | `dataset.max_samples` | packed to {packed:,} tokens each | {corpus}, {mean:,} tokens each"
        " | naive top-64 (packed; mean) |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for use_case, samples in USE_CASES.items():
        both = [samples * length for length in (packed, mean)]
        cells = " | ".join(cell(tokens, bytes_per_position, positions_per_second) for tokens in both)
        naive = "; ".join(size(tokens * NAIVE_TOP_64) for tokens in both)
        rows.append(f"| {use_case} | {samples:,} | {cells} | {naive} |")
    return "\n".join(rows)


def cell(tokens: float, bytes_per_position: float, positions_per_second: float) -> str:
    """Return what so many tokens take: `34.1 M tokens: 682 MB, 28.4 min`."""
    stored, seconds = tokens * bytes_per_position, tokens / positions_per_second
    return f"{count(tokens)} tokens: {size(stored)}, {duration(seconds)}"


def _bytes_per_position(cache: Path) -> float:
    """Return what `accel-distill inspect` measures for a cache."""
    from accel_distill.inspect_cache import inspect_cache

    found = inspect_cache(cache)["bytes_per_position"]
    if found is None:
        raise ConfigError(f"cache {cache}: it holds no position yet, so there are no bytes per position to take")
    return float(found)
