"""Non-negative integers as one-byte symbols and raw bits: small ones exactly, larger ones by size and low bits.

The one decision: a value keeps its leading four bits in the symbol, which gzip's Huffman codes then make short where
it is common, and its lower bits, which look random, go to a bit stream of their own. Ids by frequency rank took 12 %
fewer bytes so than as shuffled 16-bit integers (docs/decisions.md). It costs a gather of four bytes for each value.

    value  0 .. 15    symbol = value, no bits
    value  16 ..      width = bits below the leading four; symbol = 8 width + (value >> width); `width` low bits
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LARGEST = (1 << 28) - 1  # 24 bits beside the symbol: with a start inside a byte they lie in four bytes

LAST_SYMBOL = 8 * 24 + 15

_symbols = np.arange(LAST_SYMBOL + 1)
WIDTH = np.maximum(_symbols // 8 - 1, 0).astype(np.uint8)  # bits behind each symbol
_BASE = ((_symbols - 8 * WIDTH) << WIDTH).astype(np.uint32)
_MASK = ((1 << WIDTH.astype(np.int64)) - 1).astype(np.uint32)


class Bits(NamedTuple):
    """A range of a bit stream, least significant bit first."""

    data: np.ndarray  # (bytes,) uint8
    start: int | np.ndarray  # the first bit, counted from the first byte; joined, for each value that of its part ...
    length: int  # ... less the bits of the parts before


def pack(values: np.ndarray, *, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return symbols (n,) uint8, the stream's bytes uint8, and the bits (n,) that each value takes of it.

    Raises ValueError for a value below 0 or above `LARGEST`: nothing wraps.
    """
    if len(values) and (values.min() < 0 or values.max() > LARGEST):
        found = int(values.min()) if values.min() < 0 else int(values.max())
        raise ValueError(f"column {name}: {found} is not between 0 and {LARGEST}")
    values = values.astype(np.int64)
    width = np.maximum(np.frexp(values.astype(np.float64))[1] - 4, 0)  # frexp's exponent is the bit length
    symbols = (8 * width + (values >> width)).astype(np.uint8)
    return symbols, _bit_stream(values & ((1 << width) - 1), width), width


def unpack(symbols: np.ndarray, bits: Bits, *, name: str) -> np.ndarray:
    """Return the values (n,) int64 of `symbols` (n,) uint8 and their bits; ValueError where the two do not fit."""
    if len(symbols) and symbols.max() > LAST_SYMBOL:
        raise ValueError(f"column {name}: symbol {int(symbols.max())} stands for no value")
    width = WIDTH[symbols]
    ends = np.cumsum(width, dtype=np.int64)
    count = int(ends[-1]) if len(ends) else 0
    at = ends - width + bits.start
    if count != bits.length or (len(at) and at[-1] + width[-1] > 8 * len(bits.data)):
        raise ValueError(f"column {name}: its symbols need {count} bits, and it has {bits.length}")
    padded = np.concatenate([bits.data, np.zeros(4, np.uint8)])
    words = np.ndarray(len(bits.data) + 1, "<u4", padded, strides=(1,))  # the four bytes from each byte on
    low = (words[at >> 3] >> (at & 7).astype(np.uint32)) & _MASK[symbols]
    return (_BASE[symbols] + low).astype(np.int64)


def join_bits(parts: Sequence[Bits], counts: Sequence[int]) -> Bits:
    """Return the bit streams of several parts, of so many values each, as that of all of their values."""
    data, lengths = [part.data for part in parts], [part.length for part in parts]
    bytes_before = np.cumsum([0, *map(len, data)])[:-1]
    bits_before = np.cumsum([0, *lengths])[:-1]
    starts = [part.start for part in parts] + 8 * bytes_before - bits_before
    return Bits(np.concatenate(data), np.repeat(starts, counts), sum(lengths))


def _bit_stream(low: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Put the `width` bits of each `low` behind each other; a value touches at most two 32-bit words."""
    ends = np.cumsum(width)
    total = int(ends[-1]) if len(ends) else 0
    has_bits = width > 0
    at = (ends - width)[has_bits]
    shifted = low[has_bits].astype(np.uint64) << (at & 31).astype(np.uint64)
    words = np.zeros(total // 32 + 2, np.uint64)
    if len(at):
        word = at >> 5
        first = np.flatnonzero(np.diff(word, prepend=-1))
        sums = np.add.reduceat(shifted, first)  # disjoint bits: a sum is their union
        words[word[first]] = sums & 0xFFFFFFFF
        words[word[first] + 1] += sums >> np.uint64(32)
    return words.astype("<u4").view(np.uint8)[: -(-total // 8)]
