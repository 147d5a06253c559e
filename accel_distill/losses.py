"""Divergences between a teacher's target and a student's logits, one float32 value per position.

The one decision: every loss is `log_softmax` followed by the formula as one would write it by hand, and
nothing is reduced, weighted or normalised here. That makes this file the reference for faster code; it
costs a (P, V) float32 tensor of log-probabilities (two for `top_k_forward_kl`) and as much in backward, so
a caller with many positions goes through them in chunks. No target is ever made dense.

A temperature T divides the logits; every divergence is multiplied by T^2, in value and in gradient, so
that the size of the gradient does not depend on T (Hinton et al. 2015). The targets are the teacher's
distribution at that temperature already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

Entries = tuple[Tensor, Tensor, Tensor]
"""Sparse targets of P positions: offsets (P + 1,) int64, ids (E,) int64, weights (E,) float32; the ids of
position p are `ids[offsets[p]:offsets[p + 1]]`, each at most once."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] in nats, (P,); 0 where the label is `IGNORE_INDEX`.

    logits (P, V), labels (P,) int64. Temperature does not apply to the true token.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def forward_kl(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) from dense logits, (P,).

    logits (P, V), teacher_logits (P, U) with U <= V: ids that only the student has are ids that the
    teacher never says. A teacher logit of -inf is allowed.
    """
    logprobs = student_logprobs(logits, temperature=temperature)[:, : teacher_logits.shape[-1]]
    teacher = torch.softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * (torch.xlogy(teacher, teacher) - teacher * logprobs).sum(dim=-1)


def sparse_cross_entropy(logits: Tensor, entries: Entries, *, temperature: float = 1.0) -> Tensor:
    """Return T^2 times the cross-entropy of unbiased sparse targets (`threshold`, `random`), (P,).

    That is T^2 sum_i w_i (logsumexp(z/T) - z_i/T), with the gradient T (sum(w) softmax(z/T) - w), also where
    the weights do not sum to 1. T^2 times the teacher's entropy less, it is T^2 KL(teacher || student) in
    expectation over the sampling; the entropy is stored with the targets and has no gradient.
    """
    offsets, _, weights = entries
    logprobs = student_logprobs(logits, temperature=temperature)
    return -(temperature**2) * segment_sum(weights * _at_entries(logprobs, entries), offsets)


def top_k_forward_kl(logits: Tensor, entries: Entries, *, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) on k + 1 outcomes, the k ids and one bucket for all others, (P,).

    The weights are the teacher's probabilities of its k largest ids; what they lack to 1 is the bucket's
    mass P. It is a lower bound of the dense KL, and equal to it where k is all the vocabulary. The gradient
    is T (q_j - p_j) on the k ids and T (q_j - P q_j / Q) outside.

    The student's bucket log Q is a logsumexp over the ids outside. `log(-expm1(lse_K - lse))` would save a
    copy of the logits, but has no correct digit left in float32 where Q < 1e-7, which a student reaches as
    soon as it is sure of a word.
    """
    offsets, _, weights = entries
    logprobs = student_logprobs(logits, temperature=temperature)
    inside = torch.xlogy(weights, weights) - weights * _at_entries(logprobs, entries)
    has_bucket = offsets.diff() < logits.shape[-1]
    bucket = (1 - segment_sum(weights, offsets)).clamp(min=0) * has_bucket
    outside = torch.xlogy(bucket, bucket) - bucket * _log_mass_outside(logprobs, entries)
    return temperature**2 * (segment_sum(inside, offsets) + outside)


def student_logprobs(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / T) in float32, the shape of logits."""
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum the ragged values (E,) of each position: (P,), 0 for a position without values."""
    sums = values.new_zeros(len(offsets) - 1)
    return sums.index_add(0, _rows(offsets, len(values)), values)


def _at_entries(logprobs: Tensor, entries: Entries) -> Tensor:
    """Pick the log-probability of every entry: (P, V) to (E,)."""
    offsets, ids, _ = entries
    return logprobs[_rows(offsets, len(ids)), ids]


def _log_mass_outside(logprobs: Tensor, entries: Entries) -> Tensor:
    """Return the log of the probability of all ids that are no entry, (P,); finite where there are none."""
    offsets, ids, _ = entries
    nothing = logprobs.new_tensor(torch.finfo(logprobs.dtype).min)  # not -inf: 0 * -inf is NaN
    return logprobs.index_put((_rows(offsets, len(ids)), ids), nothing).logsumexp(dim=-1)


def _rows(offsets: Tensor, size: int) -> Tensor:
    """Return the position of each of the `size` entries, (E,); with the size known, no device sync."""
    positions = torch.arange(len(offsets) - 1, device=offsets.device)
    return positions.repeat_interleave(offsets.diff(), output_size=size)
