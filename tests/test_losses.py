"""Each loss against a plainly written float64 reference, in value and gradient.

The yardstick is the reference itself in float32: a loss may be off by what that is off, and a little more.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accel_distill.divergences import ALLOWED, DIVERGENCES, Divergence, TargetKind, TopKTail
from accel_distill.losses import (
    IGNORE_INDEX,
    LEAST,
    POINTWISE,
    Entries,
    Objective,
    cross_entropy,
    outcomes,
    outcomes_of_parts,
    segment_sum,
)

VOCAB = 7
OFFSETS = [0, 3, 3, 4, 8]  # the second position has no entry
IDS = [5, 0, 3, 6, 1, 2, 4, 0]
WEIGHTS = [0.5, 0.25, 0.25, 1.0, 0.125, 0.5, 0.25, 0.0625]  # the last position sums to 0.9375
TEMPERATURES = [0.5, 1.0, 2.0]
TOLERANCE = 2e-6


def student_logits(*, positions: int = 4, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(positions, vocab, generator=torch.Generator().manual_seed(1))


def entries(weights: list[float] = WEIGHTS) -> Entries:
    return torch.tensor(OFFSETS), torch.tensor(IDS), torch.tensor(weights)


def sparse_cross_entropy(logits: Tensor, target: Entries, *, temperature: float = 1.0) -> Tensor:
    none = torch.zeros(len(logits), dtype=torch.int64)
    return Objective(temperature=temperature).sparse(logits, none, target).kd


def top_k_forward_kl(logits: Tensor, target: Entries, *, temperature: float = 1.0) -> Tensor:
    none = torch.zeros(len(logits), dtype=torch.int64)
    return Objective(temperature=temperature, kind="top_k").sparse(logits, none, target).kd


def forward_kl(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    none = torch.zeros(len(logits), dtype=torch.int64)
    return Objective(temperature=temperature, kind="dense").dense(logits, none, teacher_logits).kd


def plain_sparse(logits: Tensor, target: Entries, temperature: float) -> Tensor:
    offsets, ids, weights = (part.tolist() for part in target)
    rows = []
    for position, z in enumerate(logits / temperature):
        row = z.sum() * 0
        for e in range(offsets[position], offsets[position + 1]):
            row = row + weights[e] * (torch.logsumexp(z, dim=0) - z[ids[e]])
        rows.append(temperature**2 * row)
    return torch.stack(rows)


def plain_top_k(logits: Tensor, target: Entries, temperature: float) -> Tensor:
    offsets, ids, weights = (part.tolist() for part in target)
    rows = []
    for position, z in enumerate(logits / temperature):
        kept = {ids[e]: weights[e] for e in range(offsets[position], offsets[position + 1])}
        q = torch.softmax(z, dim=0)
        row = z.sum() * 0
        for token, p in kept.items():
            row = row + p * (torch.tensor(p, dtype=z.dtype).log() - q[token].log())
        outside = [token for token in range(len(z)) if token not in kept]
        bucket = torch.tensor(1 - sum(kept.values()), dtype=z.dtype)
        if outside and bucket > 0:
            row = row + bucket * (bucket.log() - q[outside].sum().log())
        rows.append(temperature**2 * row)
    return torch.stack(rows)


def plain_dense(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    p = torch.softmax(teacher_logits.to(logits.dtype) / temperature, dim=-1)
    q = torch.softmax(logits / temperature, dim=-1)[:, : p.shape[1]]
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


def plain_divergence(name: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """Return the divergence of probabilities p and q over the last dimension, as papers write it; p may be 0."""
    here, tiny = p > 0, torch.tensor(2.0**-24, dtype=q.dtype)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(
            a > 0, a * (a.clamp(min=1e-300 if a.dtype == torch.float64 else 1e-38) / b).log(), 0 * b
        ).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return (q * (q / torch.where(here, p, tiny)).log()).sum(-1)
    if name == "jsd":
        mixture = 0.3 * p + 0.7 * q
        return 0.3 * kl(p, mixture) + 0.7 * kl(q, mixture)
    if name == "skew_kl":
        return kl(p, 0.2 * p + 0.8 * q)
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    a, b = 0.4, 0.9
    inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -inner.sum(-1) / (a * b)


PARAMETERS = {"jsd_beta": 0.3, "skew": 0.2, "alpha": 0.4, "beta": 0.9}


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_as_good_as_plain(
    loss: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], logits: Tensor
) -> None:
    found = value_and_gradient(loss, logits)
    exact = value_and_gradient(plain, logits.double())
    float32 = value_and_gradient(plain, logits)
    for got, want, yardstick in zip(found, exact, float32, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= (yardstick - want).abs().max() + TOLERANCE
    assert exact[0].abs().max() > 0.05 and exact[1].abs().max() > 0.005  # not vacuous


def test_cross_entropy_is_the_float64_one_and_zero_where_ignored() -> None:
    labels = torch.tensor([2, IGNORE_INDEX, 0, 6])

    def plain(z: Tensor) -> Tensor:
        rows = [z[p].sum() * 0 if y < 0 else z[p].logsumexp(0) - z[p, y] for p, y in enumerate(labels.tolist())]
        return torch.stack(rows)

    assert_as_good_as_plain(lambda z: cross_entropy(z, labels), plain, student_logits())
    assert cross_entropy(student_logits(), labels)[1] == 0.0


def test_cross_entropy_with_every_label_ignored_is_zero_with_zero_gradient() -> None:
    value, gradient = value_and_gradient(lambda z: cross_entropy(z, torch.full((4,), IGNORE_INDEX)), student_logits())
    assert value.tolist() == [0.0] * 4 and not gradient.any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sparse_cross_entropy_is_the_float64_one_also_where_weights_do_not_sum_to_one(
    temperature: float,
) -> None:
    target = entries()
    assert_as_good_as_plain(
        lambda z: sparse_cross_entropy(z, target, temperature=temperature),
        lambda z: plain_sparse(z, target, temperature),
        student_logits(),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sparse_gradient_is_t_times_the_sum_of_weights_times_softmax_minus_the_target(
    temperature: float,
) -> None:
    logits, target = student_logits(), entries()
    _, gradient = value_and_gradient(lambda z: sparse_cross_entropy(z, target, temperature=temperature), logits)
    dense = torch.zeros(4, VOCAB)
    dense[torch.tensor([0, 0, 0, 2, 3, 3, 3, 3]), target[1]] = target[2]
    q = torch.softmax(logits / temperature, dim=-1)
    torch.testing.assert_close(gradient, temperature * (dense.sum(-1, keepdim=True) * q - dense))


def test_sparse_cross_entropy_is_ce_of_a_label_where_the_target_is_one_hot() -> None:
    labels = torch.tensor([2, 3, 0, 6])
    one_hot = torch.arange(5), labels, torch.ones(4)
    torch.testing.assert_close(sparse_cross_entropy(student_logits(), one_hot), cross_entropy(student_logits(), labels))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_top_k_bucket_kl_is_the_float64_one(temperature: float) -> None:
    target = entries([0.5, 0.25, 0.125, 0.75, 0.125, 0.5, 0.25, 0.0625])
    assert_as_good_as_plain(
        lambda z: top_k_forward_kl(z, target, temperature=temperature),
        lambda z: plain_top_k(z, target, temperature),
        student_logits(),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("student_vocab", [VOCAB, VOCAB + 4])
def test_dense_forward_kl_is_the_float64_one_also_for_a_wider_student(temperature: float, student_vocab: int) -> None:
    teacher_logits = 2 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    assert_as_good_as_plain(
        lambda z: forward_kl(z, teacher_logits, temperature=temperature),
        lambda z: plain_dense(z, teacher_logits, temperature),
        student_logits(vocab=student_vocab),
    )


def full_support(teacher_logits: Tensor, temperature: float) -> Entries:
    positions, vocab = teacher_logits.shape
    ids = teacher_logits.argsort(dim=-1, descending=True)
    p = torch.softmax(teacher_logits / temperature, dim=-1)
    return torch.arange(positions + 1) * vocab, ids.flatten(), p.gather(1, ids).flatten()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("student_vocab", [VOCAB, VOCAB + 4])
def test_k_equal_to_the_vocabulary_is_the_dense_divergence(temperature: float, student_vocab: int) -> None:
    teacher_logits = 2 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    target = full_support(teacher_logits, temperature)
    logits = student_logits(vocab=student_vocab)
    want = value_and_gradient(lambda z: forward_kl(z, teacher_logits, temperature=temperature), logits)
    top_k = value_and_gradient(lambda z: top_k_forward_kl(z, target, temperature=temperature), logits)
    sparse = value_and_gradient(lambda z: sparse_cross_entropy(z, target, temperature=temperature), logits)
    entropy = -(temperature**2) * segment_sum(target[2] * target[2].log(), target[0])
    # a wider student has a bucket, whose mass P = 1 - sum(p) is float32 rounding, up to 1e-7 times log(1e7)
    torch.testing.assert_close(top_k[0], want[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(top_k[1], want[1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(sparse[0] - entropy, want[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(sparse[1], want[1], rtol=1e-5, atol=2e-6)


def test_top_k_kl_is_a_lower_bound_of_the_dense_one_and_grows_with_k() -> None:
    teacher_logits = 2 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    _, ids, weights = full_support(teacher_logits, 1.0)
    by_k = []
    for k in range(1, VOCAB + 1):
        kept = ids.view(4, VOCAB)[:, :k].flatten(), weights.view(4, VOCAB)[:, :k].flatten()
        by_k.append(top_k_forward_kl(student_logits(), (torch.arange(5) * k, *kept)))
    assert (torch.stack(by_k).diff(dim=0) >= -1e-6).all()
    torch.testing.assert_close(by_k[-1], forward_kl(student_logits(), teacher_logits))


@pytest.mark.parametrize("bucket", [0.0, 1e-7, 0.1], ids=["P = 0", "P tiny", "P = 0.1"])
@pytest.mark.parametrize("gap", [0.0, 20.0, 80.0, 300.0], ids=["Q large", "Q 1e-8", "Q 1e-34", "Q 0 in float32"])
def test_top_k_bucket_is_stable_for_a_student_or_teacher_with_nothing_outside(bucket: float, gap: float) -> None:
    logits = torch.tensor([[gap + 1.0, gap, 0.3, 0.1, -0.2]])
    target = torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0.75 - bucket, 0.25])
    found = value_and_gradient(lambda z: top_k_forward_kl(z, target), logits)

    def exact(z: Tensor) -> Tensor:
        logq = torch.log_softmax(z, dim=-1)
        p = target[2].double()
        mass = 1 - p.sum()
        outside = torch.xlogy(mass, mass) - mass * logq[:, 2:].logsumexp(-1)
        return (p * (p.log() - logq[0, :2])).sum() + outside

    want = value_and_gradient(exact, logits.double())
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-6)


def test_teacher_logits_of_minus_infinity_give_no_nan() -> None:
    teacher_logits = torch.tensor([[1.0, 2.0, float("-inf")]])
    value, gradient = value_and_gradient(lambda z: forward_kl(z, teacher_logits), torch.zeros(1, 3))
    assert value.isfinite().all() and gradient.isfinite().all() and value.item() > 0


def test_large_logits_lose_nothing_to_their_offset() -> None:
    logits, target = student_logits() + 8192.0, entries()
    rounded = logits - 8192.0  # what the addition left of them
    torch.testing.assert_close(sparse_cross_entropy(logits, target), sparse_cross_entropy(rounded, target))


@pytest.mark.parametrize("loss", [sparse_cross_entropy, top_k_forward_kl])
def test_no_positions_give_no_values_and_a_gradient_of_zero(
    loss: Callable[[Tensor, Entries], Tensor],
) -> None:
    logits = student_logits().requires_grad_()
    target = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    value = loss(logits[:0], target)
    value.sum().backward()
    assert value.shape == (0,) and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("student_vocab", [VOCAB, VOCAB + 4])
def test_a_dense_divergence_is_the_float64_one_also_for_a_wider_student_and_a_masked_id(
    name: Divergence, temperature: float, student_vocab: int
) -> None:
    teacher_logits = 2 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    teacher_logits[1, 3] = float("-inf")
    objective = Objective(temperature=temperature, kind="dense", divergence=name, **PARAMETERS)
    labels = torch.tensor([2, 0, 5, 6])

    def plain(z: Tensor) -> Tensor:
        p = torch.softmax(teacher_logits.to(z.dtype) / temperature, dim=-1)
        p = torch.nn.functional.pad(p, (0, student_vocab - VOCAB))
        return temperature**2 * plain_divergence(name, p, torch.softmax(z / temperature, dim=-1))

    logits = student_logits(vocab=student_vocab)
    assert_as_good_as_plain(lambda z: objective.dense(z, labels, teacher_logits).kd, plain, logits)
    losses = objective.dense(logits, labels, teacher_logits)
    torch.testing.assert_close(losses.ce, cross_entropy(logits, labels))
    torch.testing.assert_close(losses.kl, forward_kl(logits, teacher_logits, temperature=temperature))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_top_k_divergence_is_the_float64_one_on_k_and_one_outcomes(
    name: Divergence, temperature: float, tail: TopKTail
) -> None:
    target = entries([0.5, 0.25, 0.125, 0.75, 0.125, 0.5, 0.25, 0.0625])
    objective = Objective(temperature=temperature, kind="top_k", divergence=name, top_k_tail=tail, **PARAMETERS)
    offsets, ids, weights = (part.tolist() for part in target)

    def plain(z: Tensor) -> Tensor:
        rows = []
        for position, q in enumerate(torch.softmax(z / temperature, dim=-1)):
            part = slice(offsets[position], offsets[position + 1])
            p, kept = torch.tensor(weights[part], dtype=z.dtype), ids[part]
            if tail == "renormalize" and kept:
                p = p / p.sum()
            outside = [token for token in range(VOCAB) if token not in kept]
            bucket = 0 * p.sum() if tail == "renormalize" else 1 - p.sum()
            both = torch.cat([p, bucket[None]]), torch.cat([q[kept], q[outside].sum()[None]])
            rows.append(temperature**2 * plain_divergence(name, *both))
        return torch.stack(rows)

    labels = torch.zeros(4, dtype=torch.int64)
    assert_as_good_as_plain(lambda z: objective.sparse(z, labels, target).kd, plain, student_logits())
    forward = Objective(temperature=temperature, kind="top_k", top_k_tail=tail)
    losses, expected = (o.sparse(student_logits(), labels, target) for o in (objective, forward))
    torch.testing.assert_close(losses.kl, expected.kd)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_of_a_distribution_from_itself_is_zero_and_from_another_above(name: Divergence) -> None:
    objective = Objective(kind="dense", divergence=name)
    logits, labels = student_logits(), torch.zeros(4, dtype=torch.int64)
    value, gradient = value_and_gradient(lambda z: objective.dense(z, labels, logits).kd, logits)
    torch.testing.assert_close(value, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(4, VOCAB), atol=1e-6, rtol=0)
    assert (objective.dense(logits, labels, logits.flip(0)).kd > 1e-2).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_certain_teacher_and_a_certain_student_give_no_infinity(name: Divergence) -> None:
    objective = Objective(kind="dense", divergence=name)
    certain, labels = torch.tensor([[300.0, 0.0, -300.0]]), torch.zeros(1, dtype=torch.int64)
    for teacher in (certain, certain.flip(1), torch.tensor([[0.0, float("-inf"), 1.0]])):
        value, gradient = value_and_gradient(lambda z, t=teacher: objective.dense(z, labels, t).kd, certain)
        assert value.isfinite().all() and gradient.isfinite().all()
    one = torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1)
    sparse = Objective(kind="top_k", divergence=name)
    for logits in (certain, certain.flip(1)):
        value, gradient = value_and_gradient(lambda z: sparse.sparse(z, labels, one).kd, logits)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_reverse_kl_takes_a_probability_of_zero_as_two_to_the_minus_24() -> None:
    logp, logq = torch.tensor([float("-inf"), -1.0]), torch.tensor([-2.0, -3.0])
    found = POINTWISE["reverse_kl"](logp, logq)
    assert found.tolist() == pytest.approx([float(logq[0].exp()) * (-2.0 - LEAST), float(logq[1].exp()) * -2.0])


def test_outcomes_of_a_rows_parts_are_those_of_the_row_whatever_its_offset() -> None:
    logits, target = student_logits(), entries()
    rows = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3])
    kept = logits[rows, target[1]]
    left = logits.index_put((rows, target[1]), torch.tensor(-torch.inf)).logsumexp(-1)
    want = outcomes(logits, target)
    for offset in (0.0, -5.0, 4.0):
        found, logsumexp = outcomes_of_parts(kept + offset, left + offset, target)
        torch.testing.assert_close(found.logprobs, want.logprobs)
        torch.testing.assert_close(found.log_rest, want.log_rest)
        torch.testing.assert_close(logsumexp, logits.logsumexp(-1) + offset)


@pytest.mark.parametrize("kind", ["threshold", "random"])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "forward_kl"])
def test_sampled_targets_refuse_what_is_not_linear_in_them_and_name_what_works(
    kind: TargetKind, name: Divergence
) -> None:
    with pytest.raises(
        ValueError, match=f"{name} cannot be taken from {kind} targets.*forward_kl.*targets.method=top_k"
    ):
        Objective(kind=kind, divergence=name)
    assert ALLOWED[kind] == ("forward_kl",)


def test_only_top_k_targets_have_a_tail_to_renormalize() -> None:
    with pytest.raises(ValueError, match="renormalize is for top_k targets"):
        Objective(kind="random", top_k_tail="renormalize")


def test_a_weight_of_zero_keeps_an_infinite_loss_out() -> None:
    inf = torch.tensor([torch.inf])
    losses = Objective(kd_weight=0.0, ce_weight=2.0).sparse(
        student_logits(positions=1), torch.tensor([1]), entries_of_one()
    )
    weighed = Objective(kd_weight=0.0, ce_weight=2.0).weigh(losses._replace(kd=inf))
    assert weighed.item() == pytest.approx(2 * losses.ce.item())


def entries_of_one() -> Entries:
    return torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1)


@pytest.mark.parametrize("loss", [sparse_cross_entropy, top_k_forward_kl])
def test_half_precision_logits_are_taken_to_float32(loss: Callable[[Tensor, Entries], Tensor]) -> None:
    logits = student_logits().bfloat16()
    found, gradient = value_and_gradient(lambda z: loss(z, entries()), logits)
    assert found.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found, loss(logits.float(), entries()))
