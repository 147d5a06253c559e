"""The methods that the quality experiment compares (targets, what they take, losses), and how students are examined.

The one decision: targets come from the product's sampler, losses and codec, and are drawn once for a block and used in
every epoch, as a cache is; uniforms depend on (run's seed, block, position). It costs memory for a run's targets
(0.5 M positions x 64 ids x 12 bytes = 384 MB at worst on the CPU).
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from accel_distill.codec import Method, invert, rank_tokens
from accel_distill.losses import Entries, Objective, cross_entropy, student_logprobs
from accel_distill.rows import RowReader, Rows, encode_rows
from accel_distill.shard import ShardHeader, shard_bytes
from accel_distill.targets import SparseTargets, concatenate, read_logits, sample
from bench.quality_teacher import TaughtText
from bench.quality_training import logits_of

BINS = 15  # of equal width, for the expected calibration error, as the Trainer has them
SHARD_BLOCKS = 512  # the first so many blocks of a text are encoded as one shard, to weigh it

Losses = Callable[[Tensor, Tensor], Tensor]
"""From logits (P, V) of some blocks, and these blocks (n,), to a loss per position (P,)."""


@dataclass(frozen=True)
class Arm:
    """One method of the comparison."""

    name: str
    objective: Objective
    parameter: float = 0.0  # of the sampler; no meaning where targets are dense

    @property
    def method(self) -> Method | None:
        """The sampler; None for a student that learns from the true token or from the dense teacher."""
        return None if self.objective.kind == "dense" else self.objective.kind


CE_ONLY = Arm("CE only", Objective(kind="dense", kd_weight=0.0, ce_weight=1.0))
DENSE = Arm("dense KD", Objective(kind="dense"))
RANDOM = Arm("random N=50", Objective(kind="random"), 50)
THRESHOLDS = tuple(Arm(f"threshold {t:g}", Objective(kind="threshold"), t) for t in (0.06, 0.03, 0.02))
ARMS = (
    CE_ONLY,
    DENSE,
    Arm("top-12 renormalised", Objective(kind="top_k", top_k_tail="renormalize"), 12),  # what many tools do
    Arm("top-64 with tail bucket", Objective(kind="top_k"), 64),
    RANDOM,
    *THRESHOLDS,
)


@dataclass(frozen=True)
class DrawnTargets:
    """The sparse targets of some blocks of a text, as a run's cache would hold them."""

    by_block: dict[int, tuple[Tensor, Tensor, Tensor]]  # ids a position (T - 1,), ids (E,), weights (E,)

    def entries(self, rows: Tensor) -> Entries:
        """Return the entries of blocks `rows` (n,), position after position."""
        counts, ids, weights = zip(*(self.by_block[row] for row in rows.tolist()), strict=True)
        offsets = F.pad(torch.cat(counts).cumsum(0), (1, 0))
        return offsets, torch.cat(ids), torch.cat(weights)


@torch.no_grad()
def draw(arm: Arm, text: TaughtText, rows: Tensor, *, seed: int, at_once: int) -> DrawnTargets:
    """Draw the targets of blocks `rows` (n,), `at_once` at a time."""
    by_block = {}
    for part in rows.split(at_once):
        offsets, ids, weights = sample_blocks(arm, text, part, seed=seed).entries()
        bounds = offsets[:: text.positions].tolist()
        for at, row in enumerate(part.tolist()):
            inside = slice(bounds[at], bounds[at + 1])
            counts = offsets[at * text.positions : (at + 1) * text.positions + 1].diff()
            by_block[row] = counts, ids[inside], weights[inside]
    return DrawnTargets(by_block)


def sample_blocks(arm: Arm, text: TaughtText, rows: Tensor, *, seed: int) -> SparseTargets:
    """Sample the targets of every position of blocks `rows` (n,) with the product's sampler."""
    assert arm.method is not None
    return sample(
        read_logits(text.teacher_logits(rows), next_ids=text.labels(rows)),
        method=arm.method,
        parameter=arm.parameter,
        seed=seed,
        sample_index=rows.repeat_interleave(text.positions),
        position=torch.arange(text.positions, device=rows.device).repeat(len(rows)),
    )


@torch.no_grad()
def weigh(arm: Arm, text: TaughtText, *, at_once: int) -> dict[str, float | None]:
    """Return ids and bytes per position of a method's targets as one shard of a cache; None where it stores nothing.

    The bytes are those of a whole file, its header and HDF5's own included, without the columns of `input_ids`. Ranks
    are counted over the whole text.
    """
    if arm.method is None:
        return {"ids_per_position": None, "bytes_per_position": None, "input_ids_bytes_per_position": None}
    rows = torch.arange(min(SHARD_BLOCKS, len(text.ids)), device=text.ids.device)
    targets = concatenate([sample_blocks(arm, text, part, seed=0).cpu() for part in rows.split(at_once)])
    ids_by_rank = rank_tokens(np.bincount(text.ids.flatten().cpu().numpy(), minlength=text.vocab_size))
    stored, size = _stored(targets, text.ids[rows].cpu().numpy(), ids_by_rank=ids_by_rank)
    inputs = sum(count for name, count in stored.items() if "input_ids" in name)
    return {
        "ids_per_position": (len(targets.head_ids) + len(targets.tail_ids)) / len(targets),
        "bytes_per_position": (size - inputs) / len(targets),
        "input_ids_bytes_per_position": inputs / len(targets),
    }


def _stored(targets: SparseTargets, ids: np.ndarray, *, ids_by_rank: np.ndarray) -> tuple[dict[str, int], int]:
    """Write blocks of ids (n, T) with their targets as a shard; return the bytes of its columns, and of the file."""
    count, width = ids.shape
    positions = len(targets) // count
    rows = Rows(
        sample_index=np.arange(count),
        tokens=np.arange(count + 1) * width,
        positions=np.arange(count + 1) * positions,
        input_ids=ids.flatten(),
        target_mask=np.tile(np.arange(width) < positions, count),
        targets=targets.arrays(),
        entropy=np.zeros(count),
        logprob=np.zeros(count),
    )
    settings: dict[str, Any] = {"method": targets.method, "parameter": targets.parameter}
    blank = {field.name: field.type() for field in fields(ShardHeader) if field.name != "format"}  # type: ignore[operator]
    header = blank | {"samples": count, "sequences": count, "tokens": ids.size, "positions": len(targets)}
    data = shard_bytes(header, encode_rows(rows, **settings, ranks=invert(ids_by_rank)))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard.h5"
        path.write_bytes(data)
        reader = RowReader(path, **settings, ids_by_rank=ids_by_rank)
        stored = reader.stored_bytes()
        reader.close()
    return stored, len(data)


def losses_of(arm: Arm, text: TaughtText, targets: DrawnTargets | None) -> Losses:
    """Return the training loss of a method; `targets` are those that it draws, if it does."""
    objective = arm.objective
    if targets is not None:
        return lambda logits, rows: objective.sparse(logits, text.labels(rows), targets.entries(rows)).kd
    if arm == DENSE:
        return lambda logits, rows: objective.dense(logits, text.labels(rows), text.teacher_logits(rows)).kd
    return lambda logits, rows: cross_entropy(logits, text.labels(rows))


@torch.no_grad()
def examine(student: LlamaForCausalLM, text: TaughtText, *, at_once: int) -> dict[str, float]:
    """Measure a student on held-out text against the dense teacher: CE and KL in nats, agreement and ECE as shares."""
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    for rows in torch.arange(len(text.ids), device=text.ids.device).split(at_once):
        logits, teacher, labels = logits_of(student, text.ids[rows]), text.teacher_logits(rows), text.labels(rows)
        confidence, top_id = student_logprobs(logits).max(dim=-1)
        confidence = confidence.exp()
        exact = DENSE.objective.dense(logits, labels, teacher)
        values = [exact.ce, exact.kl, top_id == teacher.argmax(dim=-1)]
        sums += torch.stack([value.double().sum() for value in values]).cpu()
        in_bin = (confidence * BINS).long().clamp(max=BINS - 1)
        counted = torch.stack([torch.ones_like(confidence), confidence, top_id == labels], dim=1).double()
        bins.index_add_(0, in_bin.cpu(), counted.cpu())
    positions = len(text.ids) * text.positions
    ce, kl, agreed = (sums / positions).tolist()
    error = float((bins[:, 1] - bins[:, 2]).abs().sum() / positions)
    return {"ce": ce, "kl": kl, "top1_agreement": agreed, "ece": error}


@torch.no_grad()
def teacher_figures(text: TaughtText, *, at_once: int) -> tuple[float, float]:
    """Return the teacher's own mean cross-entropy and entropy on a text, in nats."""
    ce = entropy = 0.0
    for rows in torch.arange(len(text.ids), device=text.ids.device).split(at_once):
        chunk = read_logits(text.teacher_logits(rows), next_ids=text.labels(rows))
        ce, entropy = ce - float(chunk.logprob.sum()), entropy + float(chunk.entropy.sum())
    positions = len(text.ids) * text.positions
    return ce / positions, entropy / positions
