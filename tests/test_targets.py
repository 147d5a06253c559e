"""The samplers: exact tests on grids of uniforms, against plain float64 probabilities."""

import math

import pytest
import torch
from torch import Tensor

from accel_distill.codec import tail_counts, total_weight
from accel_distill.targets import (
    SparseTargets,
    concatenate,
    random_targets,
    read_logits,
    sample,
    threshold_targets,
    top_k_targets,
)

GRID = 4096  # equally spaced uniforms
AT_ONCE = 512


def flat(vocab: int) -> Tensor:
    return torch.zeros(vocab)


def peaked(vocab: int) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 3


def one_hot(vocab: int) -> Tensor:
    logits = torch.full((vocab,), -200.0)
    logits[vocab // 2] = 0.0
    return logits


def two_equal(vocab: int) -> Tensor:
    logits = torch.full((vocab,), -200.0)
    logits[[0, vocab - 1]] = 0.0
    return logits


def seven_three(vocab: int) -> Tensor:
    logits = torch.full((vocab,), -200.0)
    logits[0], logits[vocab - 1] = math.log(0.3), math.log(0.7)
    return logits


SHAPES = {f.__name__: f for f in (flat, peaked, one_hot, two_equal, seven_three)}
SMALL = [(2, 0.06), (7, 0.3), (512, 0.03), (2048, 0.01)]
GRID_CASES = [(shape, *case) for shape in SHAPES for case in SMALL] + [("peaked", 50_257, 0.06), ("flat", 50_257, 0.06)]


def chunk_of(logits: Tensor, rows: int):
    return read_logits(logits.repeat(rows, 1), next_ids=torch.zeros(rows, dtype=torch.long))


def mean_weights(logits: Tensor, threshold: float, *, tail: Tensor, rounding: Tensor) -> tuple[Tensor, SparseTargets]:
    """Mean of the dense weights over the given uniforms, float64, and the last targets."""
    total = torch.zeros(len(logits), dtype=torch.float64)
    for start in range(0, len(tail), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        chunk = chunk_of(logits, len(tail[part]))
        targets = threshold_targets(chunk, threshold=threshold, tail=tail[part], rounding=rounding[part])
        offsets, ids, _ = targets.entries()
        total.index_add_(0, ids, exact_weights(targets))
        rows = torch.arange(len(targets)).repeat_interleave(offsets.diff())
        assert len(torch.unique(rows * len(logits) + ids)) == len(ids), "an id twice at a position"
    return total / len(tail), targets


def exact_weights(targets: SparseTargets) -> Tensor:
    """The weights in float64, from the integers, in the order of `entries`."""
    parts, head, tail = [], 0, 0
    for heads, tails in zip(targets.head_count.tolist(), targets.tail_count.tolist(), strict=True):
        values = targets.head_values[head : head + heads]
        left = targets.scale - int(values.sum())
        parts.append(values.double() / targets.scale)
        parts.append(torch.full((tails,), left / (targets.scale * max(tails, 1)), dtype=torch.float64))
        head, tail = head + heads, tail + tails
    return torch.cat(parts)


@pytest.mark.parametrize(("shape", "vocab", "threshold"), GRID_CASES)
def test_tail_weights_have_the_teachers_probabilities_as_their_mean_for_every_id(shape, vocab, threshold):
    logits = SHAPES[shape](vocab)
    p = logits.double().softmax(-1)
    u = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    mean, targets = mean_weights(logits, threshold, tail=u, rounding=torch.full_like(u, 0.37))
    heads = targets.head_ids[: int(targets.head_count[0])]
    kept = torch.ones(vocab, dtype=torch.bool)
    kept[heads] = False
    r = 1 - float(mean[heads].sum())  # what this rounding left for the tail
    count = int(targets.tail_count[0])
    if count:
        expected = p[kept] / p[kept].sum() * r
        assert float((mean[kept] - expected).abs().max()) <= r / count / GRID + 1e-7
    else:
        assert r == 0 and float(mean[kept].sum()) == 0


@pytest.mark.parametrize(("shape", "vocab", "threshold"), GRID_CASES)
def test_head_weights_have_the_teachers_probabilities_as_their_mean(shape, vocab, threshold):
    logits = SHAPES[shape](vocab)
    p = logits.double().softmax(-1)
    v = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    mean, targets = mean_weights(logits, threshold, tail=torch.full_like(v, 0.37), rounding=v)
    heads = targets.head_ids[: int(targets.head_count[0])]
    assert float((mean[heads] - p[heads]).abs().max()) <= 1 / total_weight(threshold) / GRID * 2 + 1e-7


def test_both_exact_tests_hold_at_the_largest_vocabulary():
    vocab, threshold = 262_208, 0.03
    logits = peaked(vocab) + torch.randn(vocab, generator=torch.Generator().manual_seed(1)).clamp(min=0) * 2
    p = logits.double().softmax(-1)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    chunk = chunk_of(logits, 64)
    targets = threshold_targets(chunk, threshold=threshold, tail=u, rounding=u.flip(0))
    assert float((targets.to_dense(vocab).double().sum(-1) - 1).abs().max()) < 1e-6
    assert int(targets.tail_ids.max()) > 131_072  # ids beyond 17 bits are drawn and kept
    # systematic points hit consecutive ids as often as their mass says, to within one point a run
    counts = torch.bincount(targets.tail_ids, minlength=vocab).double()
    kept = p.clone()
    kept[targets.head_ids] = 0
    drawn, mass = counts.cumsum(0) / counts.sum(), kept.cumsum(0) / kept.sum()
    assert float((drawn - mass).abs().max()) <= 2 / int(targets.tail_count.min())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_target_sums_to_one_and_starts_with_the_teachers_top_id(shape):
    logits = torch.stack([SHAPES[shape](1000)] * 50)
    u = torch.linspace(0, 1 - 2**-53, 50, dtype=torch.float64)  # both ends
    targets = threshold_targets(
        read_logits(logits.clone(), next_ids=torch.zeros(50, dtype=torch.long)),
        threshold=0.03,
        tail=u,
        rounding=u.flip(0),
    )
    rows = torch.arange(50).repeat_interleave(targets.entries()[0].diff())
    sums = torch.zeros(50, dtype=torch.float64).index_add_(0, rows, exact_weights(targets))
    assert float((sums - 1).abs().max()) < 1e-12
    assert torch.equal(targets.head_ids[targets.head_count.cumsum(0) - targets.head_count], logits.argmax(-1))


def test_the_first_head_id_is_the_argmax_where_probabilities_tie_in_float32_but_logits_do_not():
    logits = torch.tensor([[0.1, 0.1, -1.0]])
    logits[0, 1] = torch.nextafter(logits[0, 0], torch.tensor(1.0))
    assert int(logits.argmax()) == 1 and len((logits - logits.max()).exp().unique()) == 2
    u = torch.zeros(1, dtype=torch.float64)
    chunk = read_logits(logits.clone(), next_ids=torch.zeros(1, dtype=torch.long))
    assert threshold_targets(chunk, threshold=0.03, tail=u, rounding=u).head_ids[0] == 1
    chunk = read_logits(logits.clone(), next_ids=torch.zeros(1, dtype=torch.long))
    assert top_k_targets(chunk, k=2).head_ids[0] == 1


def test_a_one_hot_teacher_costs_one_id_and_no_tail():
    u = torch.rand(500, dtype=torch.float64)
    targets = threshold_targets(chunk_of(one_hot(1000), 500), threshold=0.03, tail=u, rounding=u.flip(0))
    assert targets.head_count.tolist() == [1] * 500 and targets.tail_count.tolist() == [0] * 500
    assert targets.head_values.tolist() == [total_weight(0.03)] * 500


def test_the_head_is_every_id_at_or_above_the_threshold_in_descending_probability():
    p = torch.tensor([[0.05, 0.4, 0.3, 0.05, 0.2]])
    u = torch.full((1,), 0.5, dtype=torch.float64)
    chunk = read_logits(p.log(), next_ids=torch.zeros(1, dtype=torch.long))
    targets = threshold_targets(chunk, threshold=0.2, tail=u, rounding=u)
    assert total_weight(0.2) == 8
    assert targets.head_ids.tolist() == [1, 2, 4]
    assert targets.head_values.tolist() == [3, 3, 1]  # floor(3.2 + .5), floor(5.6 + .5) - 3, floor(7.2 + .5) - 6
    assert targets.tail_count.tolist() == [1] and targets.tail_ids.tolist() == [3]  # the middle of ids 0 and 3


def test_the_tail_count_table_says_what_its_formula_says():
    table = tail_counts(0.06)
    assert total_weight(0.06) == 32 and len(table) == 33
    assert table[:3].tolist() == [0, 1, 1]
    assert table[32] == int((32 - 1) / (32 * 0.06))
    assert table[5] == 2 and table[4] == 1  # (5 - 1) / 1.92 = 2.08


@pytest.mark.parametrize("vocab", [2, 300, 40_000])
def test_pooled_random_draws_follow_the_teachers_distribution(vocab):
    logits, positions, draws = peaked(vocab), 400, 50
    p = logits.double().softmax(-1)
    chunk = chunk_of(logits, positions)
    places = {"sample_index": torch.arange(positions), "position": torch.zeros(positions, dtype=torch.long)}
    targets = sample(chunk, method="random", parameter=draws, seed=3, **places)
    counts = targets.to_dense(vocab).double().sum(0) * draws
    assert round(float(counts.sum())) == positions * draws
    expected = p * positions * draws
    order = expected.argsort(descending=True)  # pool ids, most probable first, into bins of at least 25 expected draws
    bins, observed, chi_square, left = 0, 0.0, 0.0, 0.0
    for e, o in zip(expected[order].tolist(), counts[order].tolist(), strict=True):
        left, observed = left + e, observed + o
        if left >= 25:
            chi_square += (observed - left) ** 2 / left
            bins, left, observed = bins + 1, 0.0, 0.0
    assert bins >= 2
    assert chi_square < bins + 4 * math.sqrt(2 * bins)


def test_random_targets_count_the_draws_and_keep_the_top_id_even_undrawn():
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    points = torch.tensor([[0.6, 0.99, 0.7, 0.8]], dtype=torch.float64)
    chunk = read_logits(p, next_ids=torch.zeros(1, dtype=torch.long))
    targets = random_targets(chunk, points=points)
    assert targets.head_ids.tolist() == [0] and targets.head_values.tolist() == [0]
    assert targets.tail_ids.tolist() == [1, 2] and targets.tail_values.tolist() == [2, 2]
    assert targets.to_dense(3).tolist() == [[0.0, 0.5, 0.5]]


def test_top_k_keeps_the_largest_probabilities_to_the_step_of_their_logarithm():
    logits = torch.randn(20, 500) * 3
    p = logits.double().softmax(-1)
    targets = top_k_targets(read_logits(logits.clone(), next_ids=torch.zeros(20, dtype=torch.long)), k=8)
    values, ids = p.topk(8, dim=-1)
    assert torch.equal(targets.head_ids.view(20, 8), ids)
    _, _, weights = targets.entries()
    assert float((weights.view(20, 8) / values - 1).abs().max()) < 1 / 2048
    whole = top_k_targets(read_logits(logits.clone(), next_ids=torch.zeros(20, dtype=torch.long)), k=9999)
    assert whole.head_count.tolist() == [500] * 20


def test_entropy_and_log_probability_are_those_of_float64():
    logits, next_ids = torch.randn(30, 3000) * 4, torch.randint(0, 3000, (30,))
    for temperature in (1.0, 2.5):
        chunk = read_logits(logits.clone(), next_ids=next_ids, temperature=temperature)
        tempered = (logits.double() / temperature).log_softmax(-1)
        assert torch.allclose(chunk.entropy, -(tempered.exp() * tempered).sum(-1), atol=1e-5)
        plain = logits.double().log_softmax(-1).gather(1, next_ids[:, None])[:, 0]
        assert torch.allclose(chunk.logprob, plain, atol=1e-5)


def test_ids_that_the_tokenizer_cannot_make_are_never_drawn():
    logits = torch.zeros(200, 600)
    logits[:, 590:] = 50.0
    for method, parameter in (("threshold", 0.06), ("random", 50), ("top_k", 64)):
        chunk = read_logits(logits.clone(), next_ids=torch.zeros(200, dtype=torch.long), valid_ids=590)
        place = {"sample_index": torch.arange(200), "position": torch.arange(200)}
        targets = sample(chunk, method=method, parameter=parameter, seed=0, **place)
        assert len(targets) == 200 and int(targets.entries()[1].max()) < 590


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_shows_in_the_entropy_of_its_position(bad):
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    entropy = read_logits(logits, next_ids=torch.zeros(3, dtype=torch.long)).entropy
    assert entropy.isfinite().tolist() == [True, False, True]


def test_the_gradient_of_a_sampled_target_has_the_dense_gradient_as_its_mean():
    teacher, student = peaked(300), torch.randn(300, dtype=torch.float64)
    dense = student.softmax(-1) - teacher.double().softmax(-1)
    n = 5_000
    places = {"sample_index": torch.arange(n), "position": torch.zeros(n, dtype=torch.long)}
    for method, parameter in (("threshold", 0.06), ("random", 50)):
        targets = sample(chunk_of(teacher, n), method=method, parameter=parameter, seed=0, **places)
        weights = targets.to_dense(300).double()
        error = (student.softmax(-1) - weights.mean(0)) - dense
        assert float(error.abs().max()) < 5 * float(weights.std(0).max()) / math.sqrt(n)


def test_slices_and_concatenation_keep_positions_apart():
    places = {"sample_index": torch.arange(9), "position": torch.arange(9)}
    for method, parameter in (("threshold", 0.05), ("random", 7), ("top_k", 3)):
        chunk = read_logits(torch.randn(9, 40) * 2, next_ids=torch.zeros(9, dtype=torch.long))
        whole = sample(chunk, method=method, parameter=parameter, seed=0, **places)
        parts = [whole.position_slice(0, 0), whole.position_slice(0, 4), whole.position_slice(4, 9)]
        assert [len(part) for part in parts] == [0, 4, 5]
        assert torch.equal(concatenate(parts).to_dense(40), whole.to_dense(40))
        assert torch.equal(parts[2].to_dense(40), whole.to_dense(40)[4:])
