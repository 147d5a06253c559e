"""Cached samples to one training batch.

The one decision: targets stay flat, in the order of the positions that carry one, with their place b * T + t
in the padded (B, T) grid; a (B, T, V) tensor never exists. It costs that a batch cannot be cut along its
first dimension, so torch.nn.DataParallel cannot be used.

A row is a sample, or several that are packed into it. Packed rows have no attention mask: positions that begin again
at 0 say where a document begins, and transformers then keeps documents apart (`packing_probe.py` proves it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel_distill.cache import CachedSample
from accel_distill.losses import IGNORE_INDEX
from accel_distill.targets import concatenate
from accel_distill.worker_batch import WorkerBatch

Row = CachedSample | Sequence[CachedSample]


@dataclass(frozen=True)
class CachedLogitCollator:
    """Pad rows on the right and join the targets of their samples."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> WorkerBatch:
        """Return the tensors of a batch of B rows padded to T tokens, with P targets of E entries in S samples.

        `input_ids`, `labels` (B, T); `target_positions` (P,) ascending, the target there is for the next token;
        `target_offsets` (P + 1,), `target_ids` (E,), `target_weights` (E,); `teacher_entropy`, `teacher_logprob` (S,),
        sums over a sample's targets in nats; `sample_index` (S,). The labels are not shifted, as transformers wants
        them: there are exactly P, at the places `target_positions + 1`. Rows that are samples have `attention_mask`
        (B, T); rows that are lists of samples have `position_ids` (B, T) in its place, which begin at 0 in each sample
        and in the padding.
        """
        packed = [[row] if isinstance(row, CachedSample) else list(row) for row in rows]
        samples = [sample for row in packed for sample in row]
        lengths = [sum(len(sample.input_ids) for sample in row) for row in packed]
        width = max(1, *lengths)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        has_target = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (row, length) in enumerate(zip(packed, lengths, strict=True)):
            input_ids[number, :length] = torch.cat([sample.input_ids for sample in row])
            has_target[number, :length] = torch.cat([sample.target_mask for sample in row])
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, 1:] = torch.where(has_target[:, :-1], input_ids[:, 1:], IGNORE_INDEX)
        offsets, ids, weights = concatenate([sample.targets for sample in samples]).entries()
        one_each = all(isinstance(row, CachedSample) for row in rows)
        batch = {
            "input_ids": input_ids,  # first: accelerate and the Trainer read the batch size from it
            **({"attention_mask": _mask(lengths, width)} if one_each else {"position_ids": _positions(packed, width)}),
            "labels": labels,
            "target_positions": has_target.flatten().nonzero()[:, 0],
            "target_offsets": offsets,
            "target_ids": ids,
            "target_weights": weights,
            "teacher_entropy": torch.tensor([sample.teacher_entropy for sample in samples]),
            "teacher_logprob": torch.tensor([sample.teacher_logprob for sample in samples]),
            "sample_index": torch.tensor([sample.sample_index for sample in samples]),
        }
        return WorkerBatch(batch)


def _mask(lengths: Sequence[int], width: int) -> Tensor:
    """Return (B, width) int64, 1 at tokens; at one place at least: attention to none at all would be NaN."""
    return (torch.arange(width) < torch.tensor(lengths).clamp(min=1)[:, None]).long()


def _positions(rows: Sequence[Sequence[CachedSample]], width: int) -> Tensor:
    """Return (B, width) int64: the place of each token in its sample, and of padding in the padding."""
    found = []
    for row in rows:
        lengths = [len(sample.input_ids) for sample in row]
        found.append(torch.cat([torch.arange(length) for length in [*lengths, width - sum(lengths)]]))
    return torch.stack(found)
