"""What is to be known of a chunk of logits: its losses, their gradient in its place, the student's top ids.

The one decision: only what is small goes through autograd. A sparse divergence depends on the logits of its ids and on
the log-sum of all others, a few numbers a position; all the other ids have the gradient g * softmax(z) with one g for
the position. So one function serves every divergence, and a chunk needs one buffer (two at another temperature than
1). Dense divergences go through autograd as they are, in smaller chunks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from accel_distill.losses import (
    IGNORE_INDEX,
    Entries,
    Losses,
    Objective,
    entry_rows,
    outcomes_of_parts,
    student_logprobs,
)

# Positions whose logits exist at once; 256 x 151,936 x 4 bytes are 156 MB. On a CPU 64 took 16 % more time, 128 7 %.
# On a GPU nothing was measured: to add up a half-precision head's gradient moves 14 bytes a weight in each chunk; that
# takes longer than the products of 256 positions, and half as long as those of 1024.
CHUNK = 256
GPU_CHUNK = 1024


class Peak(NamedTuple):
    """What evaluation wants to know beside the losses, (n,) each."""

    confidence: Tensor  # the student's largest probability, at temperature 1
    top_id: Tensor  # int64, the id that has it


Taken = tuple[Losses, Peak | None]
Watch = Callable[[Tensor], None]  # is given a gradient, or the largest value of one


class SparseChunk(NamedTuple):
    """Consecutive positions with their labels and sparse targets."""

    part: slice
    labels: Tensor  # (n,) int64
    entries: Entries


@dataclass(frozen=True)
class SparseJob:
    """The positions of a batch that carry a target or a label, and what is to be known of them."""

    objective: Objective
    positions: Tensor  # (P,) int64, into the flattened (B, T) grid of hidden states
    chunks: Sequence[SparseChunk]
    factor: Tensor | float = 1.0  # the loss is the weighted sum over positions times this
    with_peak: bool = False

    @property
    def parts(self) -> list[slice]:
        """The positions of each chunk."""
        return [chunk.part for chunk in self.chunks]

    def take(self, logits: Tensor, index: int, *, with_gradient: bool, watch_kd: Watch | None = None) -> Taken:
        """Consume the logits (n, V) of a chunk: with a gradient, they become that of its weighted sum of losses.

        The ids of the target are taken out of their row and come back as their own gradients. All others have the
        gradient g * softmax(z), with one g for each position. `watch_kd` is told the largest gradient of KD alone.
        """
        _, labels, entries = self.chunks[index]
        temperature, vocab_size = self.objective.temperature, logits.shape[1]
        at = entry_rows(entries[0], len(entries[1])), entries[1]
        known = labels.clamp(min=0)[:, None]
        top = logits.max(dim=-1) if self.with_peak else None
        of_label, of_entries = logits.gather(1, known)[:, 0], logits[at]
        logits[at] = -math.inf
        origin = logits.amax(dim=-1)
        origin.masked_fill_(origin == -math.inf, 0.0)  # the target leaves no id out
        logits.sub_(origin[:, None])
        sums = []
        soft = None
        if temperature != 1.0:
            soft = (logits / temperature).exp_()
            sums = [soft.sum(dim=-1)]
        sums = [logits.exp_().sum(dim=-1), *sums]
        leaves = [of_label - origin, of_entries - origin[at[0]], *(_log(total) for total in sums)]
        losses, logsumexp, gradients = self._small(
            leaves, labels, entries, vocab_size, with_gradient=with_gradient, watch_kd=watch_kd
        )
        if with_gradient:
            label, ids, *rest = gradients
            tiny = torch.finfo(logits.dtype).tiny
            logits.mul_((rest[0] / sums[0].clamp(min=tiny))[:, None])
            if soft is not None:
                logits.add_(soft.mul_((rest[1] / sums[1].clamp(min=tiny) / temperature)[:, None]))
            logits[at] = ids
            logits.scatter_add_(1, known, label[:, None])
        return losses, top and Peak((top.values - origin - logsumexp).exp(), top.indices)

    def plain(self, logits: Tensor, index: int) -> Losses:
        """Return the losses of the logits (n, V) of a chunk, with their gradients, in the plain way."""
        _, labels, entries = self.chunks[index]
        return self.objective.sparse(logits, labels, entries)

    def _small(
        self,
        leaves: list[Tensor],
        labels: Tensor,
        entries: Entries,
        vocab_size: int,
        *,
        with_gradient: bool,
        watch_kd: Watch | None,
    ) -> tuple[Losses, Tensor, Sequence[Tensor]]:
        """Return (losses, logsumexp (n,), gradients of the weighted sum) from what the losses depend on.

        leaves: the logits of the labels (n,) and of the entries (E,), the log-sum of the others (n,) and, at another
        temperature than 1, that at the temperature.
        """
        temperature = self.objective.temperature
        with torch.set_grad_enabled(with_gradient):
            label, ids, rest, *soft_rest = (leaf.requires_grad_(with_gradient) for leaf in leaves)
            student, logsumexp = outcomes_of_parts(ids, rest, entries)
            ce = (logsumexp - label).masked_fill(labels == IGNORE_INDEX, 0.0)
            if soft_rest:
                student, _ = outcomes_of_parts(ids / temperature, soft_rest[0], entries)
            kd, kl = self.objective.from_outcomes(student, entries, vocab_size=vocab_size)
            losses = Losses(kd, ce, kl)
            gradients: Sequence[Tensor] = ()
            if with_gradient and watch_kd is not None:
                watch_kd(largest_gradient(kd, leaves))
            if with_gradient:
                total = self.objective.weigh(losses)
                gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return Losses(*(loss.detach() for loss in losses)), logsumexp.detach(), gradients


def sparse_chunks(labels: Tensor, entries: Entries, *, size: int | None = None) -> list[SparseChunk]:
    """Cut P positions into chunks. It waits for the device, so do it before the model runs."""
    offsets, ids, weights = entries
    size = size or (CHUNK if labels.device.type == "cpu" else GPU_CHUNK)
    ends = [*range(0, len(labels), size), len(labels)]
    bounds = offsets[ends].tolist()
    return [
        SparseChunk(
            slice(start, stop),
            labels[start:stop],
            (offsets[start : stop + 1] - first, ids[first:last], weights[first:last]),
        )
        for (start, stop), (first, last) in zip(pairwise(ends), pairwise(bounds), strict=True)
    ]


@dataclass(frozen=True)
class DenseJob:
    """The positions of a batch with a teacher's logits, which are made a chunk at a time too."""

    objective: Objective
    positions: Tensor  # (P,) int64, into the flattened (B, T) grid of hidden states
    labels: Tensor  # (P,) int64
    teacher_logits: Callable[[slice], Tensor]  # of a range of the P positions: (n, U), U <= V
    factor: Tensor | float = 1.0
    with_peak: bool = False
    size: int = CHUNK // 4  # autograd keeps about six copies of a chunk, the teacher's among them

    @property
    def parts(self) -> list[slice]:
        """The positions of each chunk."""
        count = len(self.positions)
        return [slice(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def take(self, logits: Tensor, index: int, *, with_gradient: bool, watch_kd: Watch | None = None) -> Taken:
        """Consume the logits (n, V) of a chunk: with a gradient, they become that of its weighted sum of losses."""
        with torch.set_grad_enabled(with_gradient):
            leaf = logits.detach().requires_grad_(with_gradient)
            losses = self.plain(leaf, index)
            if with_gradient and watch_kd is not None:
                watch_kd(largest_gradient(losses.kd, [leaf]))
            if with_gradient:
                (gradient,) = torch.autograd.grad(self.objective.weigh(losses), leaf)
        found = Losses(*(loss.detach() for loss in losses))
        peak = peak_of(logits) if self.with_peak else None
        if with_gradient:
            logits.copy_(gradient)
        return found, peak

    def plain(self, logits: Tensor, index: int) -> Losses:
        """Return the losses of the logits (n, V) of a chunk, with their gradients, in the plain way."""
        part = self.parts[index]
        return self.objective.dense(logits, self.labels[part], self.teacher_logits(part))


def largest_gradient(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Return the largest gradient of a summed loss, in absolute value; 0 where it depends on none of the leaves."""
    if not loss.requires_grad:
        return loss.new_zeros(())
    found = torch.autograd.grad(loss.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.abs().flatten() for part in found]).max()


def peak_of(logits: Tensor) -> Peak:
    """Return the peak of logits (n, V), without a gradient."""
    logprob, top_id = student_logprobs(logits.detach()).max(dim=-1)
    return Peak(logprob.exp(), top_id)


Job = SparseJob | DenseJob


def _log(values: Tensor) -> Tensor:
    """Return the logarithm, finite also of 0."""
    return values.log().clamp(min=torch.finfo(values.dtype).min)
