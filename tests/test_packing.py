"""Integers as symbols and bits: exact for every size, cut anywhere, and nothing else is accepted."""

import numpy as np
import pytest

from accel_distill.packing import LARGEST, Bits, join_bits, pack, unpack


def test_small_values_are_their_own_symbols_and_larger_ones_by_their_leading_four_bits():
    symbols, stream, width = pack(np.array([0, 15, 16, 31, 32, 50_256]), name="x")
    assert symbols.tolist() == [0, 15, 16, 23, 24, 8 * 12 + 12]  # 50,256 = 0b1100_010001010000
    assert width.tolist() == [0, 0, 1, 1, 2, 12]
    bits = np.unpackbits(stream, bitorder="little")[:16]
    assert bits[:4].tolist() == [0, 1, 0, 0]  # of 16, 31 and 32
    assert int("".join(map(str, bits[15:3:-1])), 2) == 0b010001010000


def test_every_size_comes_back_and_so_does_any_cut():
    edges = [1 << size for size in range(28)]
    values = np.array([0, *edges, *(edge - 1 for edge in edges), LARGEST])
    values = np.concatenate([values, np.random.default_rng(0).geometric(0.001, 2000)])
    symbols, stream, width = pack(values, name="x")
    ends = np.concatenate([[0], np.cumsum(width)])
    for first, last in [(0, len(values)), (3, 4), (5, 5), (7, 60), (58, 2000)]:
        start, stop = int(ends[first]), int(ends[last])
        part = Bits(stream[start // 8 : -(-stop // 8)], start % 8, stop - start)
        assert unpack(symbols[first:last], part, name="x").tolist() == values[first:last].tolist()


def test_parts_are_joined_and_come_back_in_their_order():
    values = np.random.default_rng(1).geometric(0.01, 500)
    symbols, stream, width = pack(values, name="x")
    ends = np.concatenate([[0], np.cumsum(width)])
    cuts = [(300, 310), (5, 5), (0, 100), (499, 500), (100, 300)]
    parts = []
    for first, last in cuts:
        start, stop = int(ends[first]), int(ends[last])
        parts.append(Bits(stream[start // 8 : -(-stop // 8)], start % 8, stop - start))
    joined = join_bits(parts, [last - first for first, last in cuts])
    of = np.concatenate([np.arange(first, last) for first, last in cuts])
    assert unpack(symbols[of], joined, name="x").tolist() == values[of].tolist()
    with pytest.raises(ValueError, match="its symbols need"):
        unpack(symbols[of], joined._replace(length=joined.length + 1), name="x")


@pytest.mark.parametrize("value", [-1, LARGEST + 1])
def test_a_value_that_cannot_be_packed_is_refused(value):
    with pytest.raises(ValueError, match=f"column x: {value} is not between 0 and"):
        pack(np.array([3, value]), name="x")


def test_bits_that_are_not_those_of_the_symbols_are_refused():
    symbols, stream, _ = pack(np.array([300, 5, 70]), name="x")  # 5 and 3 bits
    assert unpack(symbols, Bits(stream, 0, 8), name="x").tolist() == [300, 5, 70]
    for bits in (Bits(stream, 0, 7), Bits(stream, 0, 9), Bits(stream, 1, 8), Bits(stream[:0], 0, 8)):
        with pytest.raises(ValueError, match="column x: its symbols need 8 bits"):
            unpack(symbols, bits, name="x")


def test_symbols_beyond_the_largest_value_are_refused():
    with pytest.raises(ValueError, match="column x: symbol 255 stands for no value"):
        unpack(np.array([1, 255], np.uint8), Bits(np.zeros(9, np.uint8), 0, 30), name="x")
