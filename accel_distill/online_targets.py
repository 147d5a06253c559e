"""Targets from a teacher in the training process: sampled as for a cache, or dense, all of its logits.

The one decision: the teacher's base model runs once for each batch, before the student, and only the hidden states of
the positions with a target are kept; its head makes logits a chunk at a time. So no (positions, V) tensor exists whole,
neither here nor in the student's head. It runs for a batch without any target too: a teacher that is divided among the
ranks needs all of them in each forward.

The teacher is no part of the student: it is not wrapped, saved or optimised, and runs in its own dtype, without the
student's autocast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from accel_distill.batch_targets import Batch, Taught, labels_of, sparse_job, subtracted_entropy
from accel_distill.head_jobs import CHUNK, GPU_CHUNK, DenseJob
from accel_distill.losses import IGNORE_INDEX, Objective
from accel_distill.targets import concatenate, no_targets
from accel_distill.teacher import SampledChunk, Sampling, Teacher

# Of a chunk's logits, that a dense loss holds at least: its chunks are as much smaller than a sparse one's.
COPIES = 4

LogitsOf = Callable[[slice], Tensor]


class OnlineTargets:
    """Makes the targets of a batch of `TextCollator`."""

    def __init__(self, teacher: Teacher, sampling: Sampling | None) -> None:
        """Take the teacher; without a sampling the targets are all of its logits."""
        self._teacher, self._sampling = teacher, sampling

    def __call__(
        self, batch: Batch, objective: Objective, *, factor: Tensor | float = 1.0, with_peak: bool = False
    ) -> Taught:
        """Run the teacher on the batch; raise NotFinite where a logit that is sampled is not finite."""
        has_target = batch["labels"][:, 1:] != IGNORE_INDEX  # (B, T - 1)
        logits_of = self._teacher.read(batch["input_ids"], batch["attention_mask"], has_target)
        if self._sampling is None:
            return self._dense(batch, _Chunks(self._teacher, logits_of, labels_of(batch)), objective, factor, with_peak)
        found, rows = self._sampled(batch, logits_of, self._sampling), _rows(batch)
        job = sparse_job(batch, found.targets.entries(), objective, factor=factor, with_peak=with_peak)
        entropy = found.entropy.new_zeros(len(batch["input_ids"])).index_add_(0, rows, found.entropy)
        entropy = subtracted_entropy(entropy.float(), objective)
        ids, ends = found.targets.head_ids, found.targets.head_count.cumsum(0)
        return Taught(job, entropy, ids[ends - found.targets.head_count], found.logprob.float(), rows)

    @torch.no_grad()
    def _sampled(self, batch: Batch, logits_of: LogitsOf, sampling: Sampling) -> SampledChunk:
        """Sample a target at each position: the one that a cache has of this sample at this position."""
        rows, places = _rows(batch), batch["target_positions"] % batch["input_ids"].shape[1]
        here, there = rows.device, self._teacher.device  # another, where the teacher is spread over several
        with torch.autocast(there.type, enabled=False):
            chunks = self._teacher.sampled_chunks(
                logits_of,
                next_ids=labels_of(batch).to(there),
                samples=batch["sample_index"][rows].to(there),
                positions=(batch["row_start"][rows] + places).to(there),
                sampling=sampling,
            )
            parts = [SampledChunk(part.targets.to(here), *(f.to(here) for f in part[1:])) for part in chunks]
        none = torch.zeros(0, dtype=torch.float64, device=here)
        nothing = no_targets(sampling.method, sampling.parameter).to(here)
        targets, *figures = zip(SampledChunk(nothing, none, none, none.bool()), *parts, strict=True)
        return SampledChunk(concatenate(targets), *map(torch.cat, figures))

    def _dense(
        self, batch: Batch, chunks: "_Chunks", objective: Objective, factor: Tensor | float, with_peak: bool
    ) -> Taught:
        labels = labels_of(batch)
        chunk = CHUNK if labels.device.type == "cpu" else GPU_CHUNK
        size = min(chunk // COPIES, self._teacher.head_chunk)
        job = DenseJob(objective, batch["target_positions"], labels, chunks, factor, with_peak, size)
        entropy = torch.zeros(len(batch["input_ids"]), device=labels.device)
        return Taught(job, entropy, chunks.top_ids, chunks.logprob, _rows(batch))


class _Chunks:
    """A dense teacher's logits by chunks, of the ids that exist; it notes what the figures need on their way."""

    def __init__(self, teacher: Teacher, logits_of: LogitsOf, labels: Tensor) -> None:
        self._logits_of, self._labels, self._valid_ids = logits_of, labels, teacher.valid_ids
        self.logprob = torch.zeros(len(labels), device=labels.device)  # (P,) of the labels, at temperature 1
        self.top_ids = torch.zeros_like(labels)  # (P,)

    @torch.no_grad()
    def __call__(self, part: slice) -> Tensor:
        """Return the logits (n, U) of a range of positions, U the ids that the tokenizer can make, in float32."""
        with torch.autocast(self._labels.device.type, enabled=False):
            logits = self._logits_of(part).to(self._labels.device, torch.float32)[:, : self._valid_ids]
        of_label = logits.gather(1, self._labels[part, None])[:, 0]
        self.logprob[part] = of_label - logits.logsumexp(dim=-1)
        self.top_ids[part] = logits.argmax(dim=-1)
        return logits


def _rows(batch: Batch) -> Tensor:
    """Return the row of each position with a target, (P,)."""
    return batch["target_positions"] // batch["input_ids"].shape[1]
