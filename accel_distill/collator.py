"""Cached samples to one training batch.

The one decision: targets stay flat, in the order of the positions that carry one, with their place b * T + t
in the padded (B, T) grid; a (B, T, V) tensor never exists. It costs that a batch cannot be cut along its
first dimension, so torch.nn.DataParallel cannot be used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel_distill.cache import CachedSample
from accel_distill.losses import IGNORE_INDEX
from accel_distill.targets import concatenate


@dataclass(frozen=True)
class CachedLogitCollator:
    """Pad samples on the right and join their targets."""

    pad_token_id: int

    def __call__(self, samples: Sequence[CachedSample]) -> dict[str, Tensor]:
        """Return the tensors of a batch of B samples padded to T tokens, with P targets of E entries in all.

        `input_ids`, `attention_mask`, `labels` (B, T); `target_positions` (P,) ascending, the target there is
        for the next token; `target_offsets` (P + 1,), `target_ids` (E,), `target_weights` (E,);
        `teacher_entropy`, `teacher_logprob` (B,), sums over a sample's targets in nats; `sample_index` (B,). The
        labels are not shifted, as transformers wants them: there are exactly P, at the places `target_positions + 1`.
        """
        rows, width = len(samples), max(1, *(len(sample.input_ids) for sample in samples))
        input_ids = torch.full((rows, width), self.pad_token_id)
        attention_mask = torch.zeros(rows, width, dtype=torch.int64)
        has_target = torch.zeros(rows, width, dtype=torch.bool)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids[row, :length] = sample.input_ids
            attention_mask[row, : max(1, length)] = 1  # attention to no position at all would be NaN
            has_target[row, :length] = sample.target_mask
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, 1:] = torch.where(has_target[:, :-1], input_ids[:, 1:], IGNORE_INDEX)
        offsets, ids, weights = concatenate([sample.targets for sample in samples]).entries()
        return {
            "input_ids": input_ids,  # first: accelerate and the Trainer read the batch size from it
            "attention_mask": attention_mask,
            "labels": labels,
            "target_positions": has_target.flatten().nonzero()[:, 0],
            "target_offsets": offsets,
            "target_ids": ids,
            "target_weights": weights,
            "teacher_entropy": torch.tensor([sample.teacher_entropy for sample in samples]),
            "teacher_logprob": torch.tensor([sample.teacher_logprob for sample in samples]),
            "sample_index": torch.tensor([sample.sample_index for sample in samples]),
        }
