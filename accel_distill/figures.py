"""Numbers for people: sizes in decimal units, counts with k, M, G, and times in the largest unit that fits.

The one decision: three digits, so that two figures beside each other can be compared, and none claims more than that.
"""

from collections.abc import Sequence

BYTES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
TIMES = ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def size(number: float) -> str:
    """Return a number of bytes in decimal units: 1 GB is 10**9 bytes."""
    return _scaled(number, BYTES)


def count(number: float) -> str:
    """Return a number with its thousands (k), millions (M), billions (G) or trillions (T)."""
    return _scaled(number, COUNTS)


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it is at least one."""
    return _scaled(seconds, TIMES)


def rough_duration(seconds: float) -> str:
    """Return a time that is not known to the second: 95 s, 72 min, 17 h 5 min, 3.2 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def number_of(count: int, noun: str) -> str:
    """Return a number of things: 1 process, 2,000 processes."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun if count == 1 else plural}"


def _scaled(number: float, units: Sequence[tuple[float, str]]) -> str:
    """Return `number` with three digits in the first unit that does not exceed it, or else in the last."""
    scale, unit = next(((scale, unit) for scale, unit in units if abs(number) >= scale), units[-1])
    scaled = number / scale
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:,.{digits}f} {unit}".rstrip()
