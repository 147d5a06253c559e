"""How much of a run's batches is padding, packed or grouped by length, and as it would be without; for the log.

The one decision: it is counted over the batches of the first epoch, in their order, from lengths alone: no sample is
decoded for it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from accel_distill.packs import PackedCache
from accel_distill.shuffle import training_sampler, window_sampler
from accel_distill.training_arguments import BY_LENGTH

if TYPE_CHECKING:
    from torch.utils.data import Subset
    from transformers import TrainingArguments


def padding_report(rows: Any, samples: "Subset[Any]", args: "TrainingArguments") -> str | None:
    """Return a sentence on what training reads: `rows`, packs of `samples` of a cache or these themselves.

    None where they are neither packed nor grouped by length.
    """
    is_grouped = args.train_sampling_strategy == BY_LENGTH
    if not is_grouped and not isinstance(rows, PackedCache):
        return None
    plain, batch = window_sampler(samples, seed=args.seed, epoch=lambda: 0), args.per_device_train_batch_size
    assert plain is not None
    lengths = samples.dataset.lengths[samples.indices]  # type: ignore[attr-defined]
    without = padding_share(lengths[list(plain)], batch=batch)
    made = f"grouped {len(samples):,} samples by length"
    if isinstance(rows, PackedCache):
        made = f"packed {len(samples):,} samples into {len(rows):,} rows of at most {rows.most:,} tokens"
        lengths = rows.lengths
    order = training_sampler(rows, args, epoch=lambda: 0) or range(len(rows))
    share = padding_share(lengths[list(order)], batch=batch)
    return f"{made}: {share:.1%} of the batches is padding, {without:.1%} without"


def padding_share(lengths: np.ndarray, *, batch: int) -> float:
    """Return which part of the tokens is padding, for rows of `lengths` in order, padded to the longest of a batch."""
    starts = np.arange(0, len(lengths), batch)
    rows = np.diff(np.append(starts, len(lengths)))
    return 1 - float(lengths.sum()) / max(1.0, float((np.maximum.reduceat(lengths, starts) * rows).sum()))
