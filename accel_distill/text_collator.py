"""Rows of token ids to one training batch, for a teacher in the process: like the cache's, without targets.

The one decision: the batch says where in the text each row comes from, so that targets are sampled with the same random
numbers as for a cache. It costs three more numbers a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from accel_distill.losses import IGNORE_INDEX
from accel_distill.text_rows import TextRow
from accel_distill.worker_batch import WorkerBatch

NO_END = 2**62  # of a stream that is not known to end


@dataclass(frozen=True)
class TextCollator:
    """Pad rows on the right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[TextRow]) -> WorkerBatch:
        """Return the tensors of a batch of B rows padded to T tokens, with P positions that have a next token.

        `input_ids`, `attention_mask`, `labels` (B, T), not shifted; `target_positions` (P,) ascending, into the
        flattened (B, T) grid: there are exactly P labels, at the places `target_positions + 1`. `sample_index`,
        `row_start` (B,): the sample and the position in it of the row's first token; `stream_end` (B,): see `TextRow`.
        """
        sequences = [row.sequence for row in rows]
        width = max(1, *(len(sequence.ids) for sequence in sequences))
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, sequence in enumerate(sequences):
            length, ids = len(sequence.ids), torch.from_numpy(sequence.ids)
            input_ids[row, :length] = ids
            labels[row, 1:length] = ids[1:]
            attention_mask[row, : max(1, length)] = 1  # attention to no position at all would be NaN
        batch = {
            "input_ids": input_ids,  # first: accelerate and the Trainer read the batch size from it
            "attention_mask": attention_mask,
            "labels": labels,
            "target_positions": (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0] - 1,
            "sample_index": torch.tensor([sequence.sample_index for sequence in sequences]),
            "row_start": torch.tensor([sequence.start for sequence in sequences]),
            "stream_end": torch.tensor([NO_END if row.end is None else row.end for row in rows]),
        }
        return WorkerBatch(batch)
