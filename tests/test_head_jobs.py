"""A chunk's losses and gradient in the place of its logits, against autograd through the plain losses in float64."""

import pytest
import torch
from torch import Tensor

from accel_distill.divergences import ALLOWED, Divergence, TargetKind
from accel_distill.head_jobs import DenseJob, SparseJob, sparse_chunks
from accel_distill.losses import IGNORE_INDEX, Entries, Losses, Objective

VOCAB, POSITIONS = 37, 11
COMBINATIONS = [(kind, name) for kind, names in ALLOWED.items() for name in names]
WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4)]
TOLERANCE = 2e-6


def logits(*, scale: float = 3.0, seed: int = 1) -> Tensor:
    return scale * torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    found = torch.randint(VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(2))
    found[4] = IGNORE_INDEX
    return found


def entries() -> Entries:
    """Return 0 to 10 entries a position, the label of some among them; the weights of a position sum to at most 1."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.arange(POSITIONS)
    ids = [torch.randperm(VOCAB, generator=generator)[:n] for n in counts.tolist()]
    weights = [torch.rand(n, generator=generator) for n in counts.tolist()]
    weights = [w / w.sum() * (1.0 if n % 2 else 0.8) if n else w for n, w in enumerate(weights)]
    ids[7][2] = labels()[7] if labels()[7] not in ids[7] else ids[7][2]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return offsets, torch.cat(ids), torch.cat(weights)


def make_job(objective: Objective, *, size: int, with_peak: bool = False) -> SparseJob | DenseJob:
    positions = torch.arange(POSITIONS)
    if objective.kind == "dense":
        teacher = logits(scale=2.0, seed=5)
        return DenseJob(objective, positions, labels().clamp(min=0), lambda part: teacher[part], 1.0, with_peak, size)
    return SparseJob(objective, positions, sparse_chunks(labels(), entries(), size=size), 1.0, with_peak)


def taken(job: SparseJob | DenseJob, rows: Tensor) -> tuple[Losses, Tensor]:
    """Return losses and gradient of all positions, chunk by chunk."""
    buffer, losses = rows.clone(), []
    for index, part in enumerate(job.parts):
        losses.append(job.take(buffer[part], index, with_gradient=True)[0])
    return Losses(*map(torch.cat, zip(*losses, strict=True))), buffer


def plainly(job: SparseJob | DenseJob, rows: Tensor) -> tuple[Losses, Tensor]:
    leaf = rows.clone().requires_grad_()
    losses = [job.plain(leaf[part], index) for index, part in enumerate(job.parts)]
    joined = Losses(*map(torch.cat, zip(*losses, strict=True)))
    job.objective.weigh(joined).backward()
    assert leaf.grad is not None
    return Losses(*(loss.detach() for loss in joined)), leaf.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_losses_and_gradient_are_as_good_as_plain_ones(
    kind: TargetKind, name: Divergence, weights: tuple[float, float], temperature: float
) -> None:
    kd_weight, ce_weight = weights
    objective = Objective(kd_weight, ce_weight, temperature, kind, name)
    job = make_job(objective, size=4)
    assert len(job.parts) == 3
    found, exact, float32 = taken(job, logits()), plainly(job, logits().double()), plainly(job, logits())
    pairs = zip([*found[0], found[1]], [*exact[0], exact[1]], [*float32[0], float32[1]], strict=True)
    for got, want, yardstick in pairs:
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= (yardstick - want).abs().max() + TOLERANCE
    assert exact[1].abs().max() > 0.002 and exact[0].kd.abs().max() > 0.05


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_a_watch_is_told_the_largest_gradient_of_kd_alone_and_changes_nothing(
    kind: TargetKind, name: Divergence, temperature: float
) -> None:
    objective = Objective(0.0, 1.0, temperature, kind, name)
    job, told = make_job(objective, size=POSITIONS), []
    unwatched, watched = logits(), logits()
    job.take(unwatched, 0, with_gradient=True)
    job.take(watched, 0, with_gradient=True, watch_kd=told.append)
    assert torch.equal(watched, unwatched)
    leaf = logits().requires_grad_()
    (by_logits,) = torch.autograd.grad(job.plain(leaf, 0).kd.sum(), leaf)
    # a sparse job is told those of its entries, and one for the log-sum of all other ids
    assert len(told) == 1 and float(told[0]) >= float(by_logits.abs().max()) * (1 - 1e-5) > 0.01


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_a_target_of_all_ids_leaves_no_rest(kind: TargetKind) -> None:
    p = torch.softmax(logits(seed=5), dim=-1)
    every = torch.arange(POSITIONS + 1) * VOCAB, torch.arange(VOCAB).repeat(POSITIONS), p.flatten()
    for temperature in (1.0, 2.0):
        objective = Objective(0.6, 0.4, temperature, kind)
        job = SparseJob(objective, torch.arange(POSITIONS), sparse_chunks(labels(), every, size=5))
        found, want = taken(job, logits()), plainly(job, logits().double())
        for got, expected in zip([*found[0], found[1]], [*want[0], want[1]], strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gap", [20.0, 80.0, 300.0])
def test_a_student_that_is_sure_of_the_targets_ids_or_of_others_loses_no_digits(gap: float) -> None:
    rows = torch.tensor([[gap + 1.0, gap, 0.3, 0.1, -0.2], [0.3, 0.1, gap, gap - 1.0, -0.2]])
    target = torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 1]), torch.tensor([0.7, 0.25, 0.7, 0.25])
    for name in ("forward_kl", "reverse_kl", "jsd"):
        objective = Objective(0.7, 0.3, 1.0, "top_k", name)
        job = SparseJob(objective, torch.arange(2), sparse_chunks(torch.tensor([1, 2]), target, size=2))
        found, want = taken(job, rows), plainly(job, rows.double())
        for got, expected in zip([*found[0], found[1]], [*want[0], want[1]], strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_large_logits_lose_nothing_to_their_offset() -> None:
    rows = logits() + 8192.0  # rounds them
    job = make_job(Objective(0.6, 0.4), size=4)
    for got, expected in zip(taken(job, rows)[0], taken(job, rows - 8192.0)[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["threshold", "dense"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_peak_is_the_students_largest_probability_at_temperature_one(kind: TargetKind, temperature: float) -> None:
    job = make_job(Objective(temperature=temperature, kind=kind), size=POSITIONS, with_peak=True)
    _, peak = job.take(logits(), 0, with_gradient=False)
    confidence, top_id = torch.softmax(logits(), dim=-1).max(dim=-1)
    assert peak is not None and torch.equal(peak.top_id, top_id)
    torch.testing.assert_close(peak.confidence, confidence)


def test_chunks_cover_all_positions_and_no_positions_make_none() -> None:
    offsets, ids, weights = entries()
    chunks = sparse_chunks(labels(), entries(), size=4)
    assert [(c.part.start, c.part.stop) for c in chunks] == [(0, 4), (4, 8), (8, 11)]
    assert torch.equal(torch.cat([c.entries[1] for c in chunks]), ids)
    assert torch.equal(torch.cat([c.entries[2] for c in chunks]), weights)
    assert torch.equal(torch.cat([c.entries[0].diff() for c in chunks]), offsets.diff())
    assert sparse_chunks(labels()[:0], (offsets[:1], ids[:0], weights[:0]), size=4) == []
