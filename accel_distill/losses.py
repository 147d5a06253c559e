"""Divergences between a teacher's target and a student's logits, one float32 value per position.

The one decision: a divergence is one function of (log p, log q) for a single outcome, written as one would by hand
(`POINTWISE`); dense targets sum it over the vocabulary, `top_k` targets over k + 1 outcomes, and nothing is reduced
over positions, weighted or normalised here. From logits (P, V) this is the plain reference, and costs a float32
(P, V) or two; `fused_head.py` gives the same functions the few numbers of a position that they depend on.

A temperature T divides the logits; every divergence is multiplied by T^2, in value and in gradient, so
that the size of the gradient does not depend on T (Hinton et al. 2015). Sparse targets are the teacher's
distribution at that temperature already.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accel_distill.divergences import Divergence, TargetKind, TopKTail, refused_divergence, refused_tail

IGNORE_INDEX = -100
# log of what float32 cannot tell from 0 in 1 - sum(p). It stands for a teacher's probability of exactly 0 (a masked
# id, an empty bucket) in the one divergence that would be infinite there, the reverse KL.
LEAST = math.log(2**-24)

Entries = tuple[Tensor, Tensor, Tensor]
"""Sparse targets of P positions: offsets (P + 1,) int64, ids (E,) int64, weights (E,) float32; the ids of
position p are `ids[offsets[p]:offsets[p + 1]]`, each at most once."""

Pointwise = Callable[[Tensor, Tensor], Tensor]
"""What one outcome adds to a divergence, from log p (the teacher's, -inf allowed) and log q (the student's, finite)."""


class Losses(NamedTuple):
    """What a position costs, (P,) each, in nats. KD and KL from sampled targets: before the teacher's entropy."""

    kd: Tensor  # the divergence of the loss, with the factor T^2
    ce: Tensor  # of the true next token, at temperature 1
    kl: Tensor  # T^2 KL(teacher || student), whatever the divergence of the loss; without a gradient if another


class Outcomes(NamedTuple):
    """The student's distribution as a sparse target sees it: its entries, and all other ids as one bucket."""

    logprobs: Tensor  # (E,)
    log_rest: Tensor  # (P,), finite also where the target leaves no id out


@dataclass(frozen=True)
class Objective:
    """kd_weight * divergence(teacher, student) + ce_weight * cross-entropy, of one kind of target."""

    kd_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    kind: TargetKind = "threshold"
    divergence: Divergence = "forward_kl"
    jsd_beta: float = 0.5  # weight of the teacher in the mixture
    skew: float = 0.1  # weight of the teacher in the mixture
    alpha: float = 0.2
    beta: float = 0.7
    top_k_tail: TopKTail = "bucket"

    def __post_init__(self) -> None:
        problem = refused_divergence(self.kind, self.divergence) or refused_tail(self.kind, self.top_k_tail)
        if problem:
            raise ValueError(problem)

    @cached_property
    def pointwise(self) -> Pointwise:
        """The divergence of one outcome, with its parameters."""
        parameters = {
            "jsd": {"beta": self.jsd_beta},
            "skew_kl": {"skew": self.skew},
            "alpha_beta": {"alpha": self.alpha, "beta": self.beta},
        }
        return partial(POINTWISE[self.divergence], **parameters.get(self.divergence, {}))

    def weigh(self, losses: Losses) -> Tensor:
        """Return the weighted sum over positions, a scalar. A weight of 0 also keeps an infinite loss out."""
        terms = [(self.kd_weight, losses.kd), (self.ce_weight, losses.ce)]
        return sum((weight * loss.sum() for weight, loss in terms if weight), start=losses.ce.new_zeros(()))

    def sparse(self, logits: Tensor, labels: Tensor, entries: Entries) -> Losses:
        """Return the losses of logits (P, V), any dtype, for labels (P,) and sparse targets."""
        student = outcomes(logits, entries, temperature=self.temperature)
        kd, kl = self.from_outcomes(student, entries, vocab_size=logits.shape[-1])
        return Losses(kd, cross_entropy(logits, labels), kl)

    def dense(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> Losses:
        """Return the losses of logits (P, V) for labels (P,) and a teacher's logits (P, U), U <= V.

        Ids that only the student has are ids that the teacher never says. A teacher logit of -inf is allowed.
        """
        logq = student_logprobs(logits, temperature=self.temperature)
        logp = torch.log_softmax(_float(teacher_logits) / self.temperature, dim=-1)
        if logp.shape[-1] < logq.shape[-1]:
            logp = F.pad(logp, (0, logq.shape[-1] - logp.shape[-1]), value=-math.inf)
        kd = self.temperature**2 * self.pointwise(logp, logq).sum(dim=-1)
        kl = kd
        if self.divergence != "forward_kl":
            kl = self.temperature**2 * forward_kl(logp, logq.detach()).sum(dim=-1)
        ce = cross_entropy(logits, labels) if self.temperature != 1.0 else F.nll_loss(logq, labels, reduction="none")
        return Losses(kd, ce, kl)

    def from_outcomes(self, student: Outcomes, entries: Entries, *, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Return KD and KL, (P,) each, of sparse targets."""
        if self.kind != "top_k":
            kd = self.temperature**2 * _sampled_cross_entropy(student, entries)
            return kd, kd
        of = partial(_top_k, entries=entries, tail=self.top_k_tail, vocab_size=vocab_size)
        kd = self.temperature**2 * of(self.pointwise, student)
        if self.divergence == "forward_kl":
            return kd, kd
        return kd, self.temperature**2 * of(forward_kl, Outcomes(*(part.detach() for part in student)))


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Return p log(p / q): its sum is KL(teacher || student)."""
    p = logp.exp()
    return p * (logp.masked_fill(p == 0, 0.0) - logq)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Return q log(q / p): its sum is KL(student || teacher); where p is 0, it counts as 2^-24."""
    return logq.exp() * (logq - logp.masked_fill(logp == -math.inf, LEAST))


def jsd(logp: Tensor, logq: Tensor, *, beta: float) -> Tensor:
    """Return the outcome's part in beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    The generalised Jensen-Shannon divergence as in GKD (Agarwal et al. 2024), 0 < beta < 1.
    """
    logm = _log_mixture(logp, logq, beta)
    return beta * forward_kl(logp, logm) + (1 - beta) * logq.exp() * (logq - logm)


def skew_kl(logp: Tensor, logq: Tensor, *, skew: float) -> Tensor:
    """Return the outcome's part in KL(p || skew p + (1 - skew) q), as in DistiLLM (Ko et al. 2024), 0 < skew < 1."""
    return forward_kl(logp, _log_mixture(logp, logq, skew))


def tvd(logp: Tensor, logq: Tensor) -> Tensor:
    """Return |p - q| / 2: its sum is the total variation distance."""
    return 0.5 * (logp.exp() - logq.exp()).abs()


def alpha_beta(logp: Tensor, logq: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Return the outcome's part in the alpha-beta divergence (Cichocki et al. 2011), alpha and beta above 0.

    As in ABKD (Wang et al. 2025); near (1, 0) it is the forward KL, near (0, 1) the reverse, at (.5, .5) Hellinger's.
    """
    total = alpha + beta
    mixed = (alpha * logp + beta * logq).exp()
    own = (alpha * (total * logp).exp() + beta * (total * logq).exp()) / total
    return (own - mixed) / (alpha * beta)


POINTWISE: dict[Divergence, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] in nats, (P,); 0 where the label is `IGNORE_INDEX`.

    logits (P, V), labels (P,) int64. Temperature does not apply to the true token.
    """
    return F.cross_entropy(_float(logits), labels, ignore_index=IGNORE_INDEX, reduction="none")


def student_logprobs(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / T) in float32, the shape of logits."""
    logits = _float(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def outcomes(logits: Tensor, entries: Entries, *, temperature: float = 1.0) -> Outcomes:
    """Return the student's outcomes from logits (P, V).

    The bucket is a logsumexp over the ids outside. `log(-expm1(lse_K - lse))` would save a copy of the logits, but has
    no correct digit left in float32 where it is below 1e-7, which a student reaches as soon as it is sure of a word.
    """
    offsets, ids, _ = entries
    logprobs = student_logprobs(logits, temperature=temperature)
    at = entry_rows(offsets, len(ids)), ids
    nothing = logprobs.new_tensor(torch.finfo(logprobs.dtype).min)  # not -inf: 0 * -inf is NaN
    return Outcomes(logprobs[at], logprobs.index_put(at, nothing).logsumexp(dim=-1))


def outcomes_of_parts(entry_logits: Tensor, log_rest: Tensor, entries: Entries) -> tuple[Outcomes, Tensor]:
    """Return the same outcomes from the entries' logits (E,) and the log of the others' sum of exponentials (P,).

    Beside them the logsumexp of all, (P,). Logits count from any zero, one for each position.
    """
    offsets, ids, _ = entries
    rows = entry_rows(offsets, len(ids))
    top = log_rest.detach().scatter_reduce(0, rows, entry_logits.detach(), "amax")
    # of differences to the largest: a difference of two rounded logarithms would lose what their size costs
    above, rest = entry_logits - top[rows], log_rest - top
    log_total = (rest.exp() + segment_sum(above.exp(), offsets)).log()
    return Outcomes(above - log_total[rows], rest - log_total), top + log_total


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum the ragged values (E,) of each position: (P,), 0 for a position without values."""
    sums = values.new_zeros(len(offsets) - 1)
    return sums.index_add(0, entry_rows(offsets, len(values)), values)


def entry_rows(offsets: Tensor, size: int) -> Tensor:
    """Return the position of each of the `size` entries, (E,); with the size known, no device sync."""
    positions = torch.arange(len(offsets) - 1, device=offsets.device)
    return positions.repeat_interleave(offsets.diff(), output_size=size)


def _sampled_cross_entropy(student: Outcomes, entries: Entries) -> Tensor:
    """Return sum_i w_i (-log q_i), (P,), the cross-entropy of unbiased targets, also where weights do not sum to 1.

    The teacher's entropy less, it is KL(teacher || student) in expectation over the sampling.
    """
    offsets, _, weights = entries
    return -segment_sum(weights * student.logprobs, offsets)


def _top_k(pointwise: Pointwise, student: Outcomes, *, entries: Entries, tail: TopKTail, vocab_size: int) -> Tensor:
    """Sum over k + 1 outcomes, the k ids and one bucket for all others, (P,).

    The weights are the teacher's probabilities of its k largest ids. What they lack to 1 is the bucket's mass; with
    `renormalize` it is 0, and they are divided by their sum. A divergence of fewer outcomes is a lower bound of the
    dense one, and equal to it where k is all the vocabulary.
    """
    offsets, _, weights = entries
    kept = segment_sum(weights, offsets)
    has_bucket = offsets.diff() < vocab_size
    if tail == "renormalize":
        weights = weights / kept[entry_rows(offsets, len(weights))]
        bucket = torch.zeros_like(kept)
    else:
        bucket = (1 - kept).clamp(min=0) * has_bucket
    inside = pointwise(weights.log(), student.logprobs)
    outside = pointwise(bucket.log(), student.log_rest).masked_fill(~has_bucket, 0.0)
    return segment_sum(inside, offsets) + outside


def _log_mixture(logp: Tensor, logq: Tensor, weight: float) -> Tensor:
    return torch.logaddexp(logp + math.log(weight), logq + math.log1p(-weight))


def _float(logits: Tensor) -> Tensor:
    """Return logits in float32, in float64 where they are so already."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
