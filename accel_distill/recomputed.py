"""A cached sample against what the teacher says of it now.

The one decision: as the sampler's uniforms depend on seed, sample and position alone, the same teacher makes the very
same integers again; so targets are compared with targets, without sampling noise, and with the distributions. It costs
a second forward of the sample, alone and not in the batch that it was made in: its last bits may differ.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from accel_distill.cache import CachedSample
from accel_distill.losses import Entries, Objective, outcomes, student_logprobs
from accel_distill.targets import SparseTargets, read_logits, sample
from accel_distill.teacher import Sampling, Teacher

ID_BITS = 32  # of a number that is a position and an id
IMPOSSIBLE = 1e-9  # probability: an id that the teacher gives less now cannot have been drawn by it ...
IMPROBABLE = 1e-6  # ... but be one of its top k, which are not drawn; not with more than this, though


@dataclass(frozen=True)
class Comparison:
    """Counts and sums over the positions of some samples, to be added and divided."""

    samples: int
    positions: int
    kl: float  # nats, from the cached target to the teacher now; unbiased by sampling where the target is
    kl_squared: float  # sum over samples of the square of their KL sums ...
    kl_positions: float  # ... of KL sum times positions ...
    positions_squared: float  # ... and of positions squared: for the standard error of the ratio
    agreed: int  # positions whose cached top id is the teacher's
    agreed_before: int  # ... is the teacher's at the position before
    agreed_after: int  # ... at the position after
    neighbours: int  # positions that have a position before, which are as many as have one after
    identical: int  # positions whose target comes out the same, integer for integer
    moved: float  # sum over positions of half the sum of |w - w'|: the mass that lies elsewhere
    entries: int  # cached head and tail ids
    impossible: int  # of which the teacher cannot have said
    logprob: float  # sum over samples of |stored - now|, nats, of the true next tokens
    entropy: float  # likewise of the entropy

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            *(ours + theirs for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )


class Recomputer:
    """Runs a teacher again over samples of a cache."""

    def __init__(self, teacher: Teacher, *, head_chunk: int, valid_ids: int, sampling: Sampling) -> None:
        """`sampling` and `valid_ids` are the cache's; logits exist for `head_chunk` positions at a time."""
        self._teacher, self._head_chunk, self._valid_ids, self._sampling = teacher, head_chunk, valid_ids, sampling

    @torch.inference_mode()
    def compare(self, cached: CachedSample, *, start: int) -> Comparison:
        """Compare a sample, or a piece that starts at token `start` of its document, with at least one target."""
        device = self._teacher.device
        ids, wanted = cached.input_ids.to(device), cached.target_mask[:-1].nonzero()[:, 0].to(device)
        tops, kl, entropy, logprob = [], 0.0, 0.0, 0.0
        identical, moved, entries, impossible = 0, 0.0, 0, 0
        for part, logits in self._logits(ids, wanted):
            target = cached.targets.position_slice(part.start, part.stop)
            there = logits[:, : self._valid_ids].float()
            kl += float(self._divergence(there, target).sum())
            entries += len(target.entries()[1])
            impossible += impossible_ids(there, target, temperature=self._sampling.temperature)
            again = self._sampled(logits, ids, wanted[part], cached.sample_index, start=start)
            tops.append(again.top)
            entropy, logprob = entropy + again.entropy, logprob + again.logprob
            identical += identical_positions(target, again.targets)
            moved += moved_mass(target, again.targets)
        if self._sampling.method != "top_k":
            kl -= cached.teacher_entropy
        count, now = len(cached.targets), torch.cat(tops).cpu()
        said = cached.targets.head_ids[cached.targets.head_count.cumsum(0) - cached.targets.head_count]
        return Comparison(
            1, count, kl, kl * kl, kl * count, count * count,
            int((said == now).sum()), int((said[1:] == now[:-1]).sum()), int((said[:-1] == now[1:]).sum()), count - 1,
            identical, moved, entries, impossible,
            abs(cached.teacher_logprob - logprob), abs(cached.teacher_entropy - entropy),
        )  # fmt: skip

    def _divergence(self, logits: Tensor, target: SparseTargets) -> Tensor:
        """Return KL (top_k: of k + 1 outcomes), or cross-entropy where the target is a sample, (n,), without T^2."""
        temperature, (offsets, ids, weights) = self._sampling.temperature, target.entries()
        entries: Entries = (offsets.to(logits.device), ids.to(logits.device), weights.to(logits.device))
        objective = Objective(kind=self._sampling.method, temperature=temperature)
        seen = outcomes(logits, entries, temperature=temperature)
        return objective.from_outcomes(seen, entries, vocab_size=logits.shape[-1])[1] / temperature**2

    def _sampled(self, logits: Tensor, ids: Tensor, at: Tensor, index: int, *, start: int) -> "_Again":
        """Sample the targets of the positions `at` again; `logits` are consumed."""
        how = self._sampling
        chunk = read_logits(logits, next_ids=ids[at + 1], temperature=how.temperature, valid_ids=self._valid_ids)
        entropy, logprob, top = float(chunk.entropy.sum()), float(chunk.logprob.sum()), chunk.top
        targets = sample(
            chunk,
            method=how.method,
            parameter=how.parameter,
            seed=how.seed,
            sample_index=torch.full_like(at, index),
            position=at + start,
        )
        return _Again(targets.cpu(), top, entropy, logprob)

    def _logits(self, ids: Tensor, wanted: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield ranges of the wanted positions and their logits, (n, V), to overwrite."""
        head = self._teacher.head
        run = self._teacher.all_logits if head is None else self._teacher.hidden_states
        hidden = run(ids[None])[0, wanted]
        for first in range(0, len(wanted), self._head_chunk):
            part = slice(first, min(first + self._head_chunk, len(wanted)))
            yield part, hidden[part].clone() if head is None else head.logits(hidden[part])


@dataclass(frozen=True)
class _Again:
    targets: SparseTargets
    top: Tensor  # (n,)
    entropy: float
    logprob: float


def impossible_ids(logits: Tensor, target: SparseTargets, *, temperature: float) -> int:
    """Return how many ids of a target the teacher cannot have said; `logits` (n, V) are what it says now."""
    offsets, ids, weights = (tensor.to(logits.device) for tensor in target.entries())
    rows = torch.arange(len(target), device=logits.device).repeat_interleave(offsets.diff())
    logprobs = student_logprobs(logits, temperature=temperature)[rows, ids]
    least = IMPROBABLE if target.method == "top_k" else 0.0
    return int(((logprobs < math.log(IMPOSSIBLE)) & (weights > least)).sum())


def identical_positions(first: SparseTargets, second: SparseTargets) -> int:
    """Return at how many positions two targets are the same integers; the order of tail ids has no meaning."""
    keys, difference = _difference(_integers(first), _integers(second))
    differs = torch.zeros(len(first), dtype=torch.bool)
    differs[keys[difference != 0] >> ID_BITS] = True
    return int((~differs).sum())


def moved_mass(first: SparseTargets, second: SparseTargets) -> float:
    """Return half of the sum of |w - w'| over all ids and positions: 1 where two targets have no id in common."""
    return float(_difference(_weights(first), _weights(second))[1].abs().sum() / 2)


def nothing() -> Comparison:
    """Return the comparison of no sample."""
    return Comparison(**{field.name: field.type(0) for field in fields(Comparison)})  # type: ignore[operator]


def _integers(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Return (position, id) of each entry as one number, and its integer: even, above 0, for heads; odd for tails."""
    position = torch.arange(len(targets))
    heads = (position.repeat_interleave(targets.head_count) << ID_BITS) + targets.head_ids
    tails = (position.repeat_interleave(targets.tail_count) << ID_BITS) + targets.tail_ids
    tail_values = targets.tail_values if targets.method == "random" else torch.ones_like(targets.tail_ids)
    return torch.cat([heads, tails]), torch.cat([2 * targets.head_values + 2, 2 * tail_values + 1])


def _weights(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    offsets, ids, weights = targets.entries()
    position = torch.arange(len(targets)).repeat_interleave(offsets.diff())
    return (position << ID_BITS) + ids, weights.double()


def _difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the keys of either and, for each, the value in `first` less that in `second`, 0 where it is missing."""
    keys, place = torch.unique(torch.cat([first[0], second[0]]), return_inverse=True)
    values = torch.cat([first[1], -second[1]])
    return keys, torch.zeros(len(keys), dtype=values.dtype).index_add_(0, place, values)
