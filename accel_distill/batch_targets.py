"""What the positions of a batch are trained towards: the job for the head, and what the teacher's side adds to figures.

The one decision: the trainer asks one callable for it (`TargetsOf`), and does not know whether targets came with the
batch, from a cache, or are made now by a teacher in the process (online_targets.py). It costs that a dense teacher's
figures are there only once the job has run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accel_distill.head_jobs import Job, SparseJob, sparse_chunks
from accel_distill.losses import Entries, Objective

Batch = dict[str, Tensor]  # what a collator returns


@dataclass(frozen=True)
class Taught:
    """A batch of S samples, one a row or several, with P positions that carry a target, as the teacher sees them."""

    job: Job
    entropy: Tensor  # (S,): what to subtract from a sample's summed KD to make it a KL, with the factor T^2
    top_ids: Tensor  # (P,) int64: the teacher's most probable ids; of a dense teacher once the job has run with a peak
    logprob: Tensor  # (S,) or (P,): of the true next tokens at temperature 1; of a dense teacher once the job has run
    logprob_rows: Tensor  # as long: the sample of each


TargetsOf = Callable[..., Taught]
"""Called as `targets_of(batch, objective, factor=..., with_peak=...)`, once for each micro-batch on every process."""


def cached_targets(batch: Batch, objective: Objective, *, factor: Tensor | float = 1.0, with_peak: bool) -> Taught:
    """Return what a batch of `CachedLogitCollator` says."""
    entries = batch["target_offsets"], batch["target_ids"], batch["target_weights"]
    samples = torch.arange(len(batch["teacher_logprob"]), device=batch["input_ids"].device)
    job = sparse_job(batch, entries, objective, factor=factor, with_peak=with_peak)
    entropy = subtracted_entropy(batch["teacher_entropy"], objective)
    return Taught(
        job, entropy, entries[1][entries[0][:-1]], batch["teacher_logprob"], samples
    )  # its top id comes first


def sparse_job(
    batch: Batch, entries: Entries, objective: Objective, *, factor: Tensor | float, with_peak: bool
) -> SparseJob:
    """Return the job of sparse targets for the positions of a batch."""
    chunks = sparse_chunks(labels_of(batch), entries)
    return SparseJob(objective, batch["target_positions"], chunks, factor, with_peak)


def labels_of(batch: Batch) -> Tensor:
    """Return the true next token of each position with a target, (P,)."""
    return batch["labels"].flatten()[batch["target_positions"] + 1]


def subtracted_entropy(entropy: Tensor, objective: Objective) -> Tensor:
    """Return `Taught.entropy` from the teacher's entropies by row: zero where the KD is a divergence already."""
    if objective.kind in ("top_k", "dense"):
        return torch.zeros_like(entropy)
    return objective.temperature**2 * entropy
