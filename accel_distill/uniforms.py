"""Uniform numbers that depend on nothing but (seed, purpose, sample_index, position, draw).

The one decision: a counter-based hash (the finaliser of splitmix64, chained) instead of a generator with a state, so
that the content of a cache does not depend on batches, ranks, order or resumption. It costs a few integer
operations for each number; they run on the device of the given indices.
"""

from typing import Literal

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1
PURPOSES = {"tail": 1, "rounding": 2, "draws": 3}
VERSION = 1  # of the hash; part of a cache's identity


def uniforms(
    purpose: Literal["tail", "rounding", "draws"],
    *,
    seed: int,
    sample_index: Tensor,
    position: Tensor,
    draws: int | None = None,
) -> Tensor:
    """Return float64 uniforms in [0, 1) with 53 random bits: (n,), or (n, draws) where `draws` is given.

    `sample_index` and `position` are int64 (n,): the sample's place in the stream, the position in its document.
    """
    key = _mix_int(_mix_int(seed + GOLDEN) + PURPOSES[purpose] * GOLDEN)
    state = _mix(sample_index * _signed(GOLDEN) + _signed(key))
    state = _mix(position * _signed(GOLDEN) + state)
    if draws is not None:
        counter = torch.arange(1, draws + 1, device=state.device)
        state = _mix(counter * _signed(GOLDEN) + state[:, None])
    return _shift_right(state, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 (wrapping, read as unsigned) by the finaliser of splitmix64."""
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's int64 `>>` is arithmetic, so the copied sign bits are masked off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """Return the int64 with the same 64 bits."""
    x &= MASK
    return x - (1 << 64) if x >> 63 else x
