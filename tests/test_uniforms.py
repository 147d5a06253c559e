"""The counter-based uniforms: an independent rewrite in Python integers, and their statistics."""

import math

import torch

from accel_distill.uniforms import PURPOSES, uniforms

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def plain(purpose: str, seed: int, sample: int, position: int) -> float:
    key = splitmix(splitmix(seed + GOLDEN) + PURPOSES[purpose] * GOLDEN)
    state = splitmix(position * GOLDEN + splitmix(sample * GOLDEN + key))
    return (state >> 11) / 2**53


def grid(purpose: str, *, seed: int = 0, samples: int = 200, positions: int = 500) -> torch.Tensor:
    index = torch.arange(samples).repeat_interleave(positions)
    position = torch.arange(positions).repeat(samples)
    return uniforms(purpose, seed=seed, sample_index=index, position=position).view(samples, positions)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def test_uniforms_equal_the_hash_written_in_plain_integers():
    places = [(0, 0), (1, 0), (0, 1), (10**12, 7), (2**31, 131_071), (2**62, 2**40)]
    index, position = (torch.tensor(column) for column in zip(*places, strict=True))
    for seed in (0, 1, 2**63 - 1):
        for purpose in PURPOSES:
            found = uniforms(purpose, seed=seed, sample_index=index, position=position).tolist()
            assert found == [plain(purpose, seed, *place) for place in places]


def test_uniforms_do_not_depend_on_what_else_is_in_the_batch():
    whole = grid("tail", samples=5, positions=7)
    alone = uniforms("tail", seed=0, sample_index=torch.tensor([3]), position=torch.tensor([4]))
    assert alone.item() == whole[3, 4].item()


def test_uniforms_are_uniform_by_a_chi_square_test():
    bins = 1000
    found = grid("rounding")
    counts = torch.histc(found, bins=bins, min=0, max=1)
    expected = found.numel() / bins
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (bins - 1)) < 4 * math.sqrt(2 * (bins - 1))
    assert 0 <= found.min() and found.max() < 1


def test_uniforms_do_not_correlate_between_positions_samples_purposes_or_seeds():
    found = grid("tail")
    limit = 4 / math.sqrt(found.numel())
    pairs = {
        "positions": (found[:, :-1], found[:, 1:]),
        "samples": (found[:-1], found[1:]),
        "diagonal": (found[:-1, 1:], found[1:, :-1]),
        "purposes": (found, grid("rounding")),
        "seeds": (found, grid("tail", seed=1)),
    }
    for name, (x, y) in pairs.items():
        assert abs(correlation(x, y)) < limit, name


def test_draws_of_a_position_are_all_different_and_uncorrelated():
    n = 20_000
    found = uniforms("draws", seed=0, sample_index=torch.arange(n), position=torch.zeros(n, dtype=torch.long), draws=4)
    assert found.shape == (n, 4) and len(found.unique()) == 4 * n
    for j in range(3):
        assert abs(correlation(found[:, j], found[:, j + 1])) < 4 / math.sqrt(n)
