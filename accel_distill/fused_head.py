"""An LM head that makes its loss where it would make logits, chunk by chunk: (positions, vocab_size) never exists.

The one decision: the gradient is made in forward, in the buffer that held the chunk's logits. It costs a float32 copy
of the head's gradient between forward and backward, and that a loss can be taken backward once only.

It runs inside the head module's own `forward`, where DDP, FSDP2 and ZeRO-3 see to it that the weight is there and that
its gradient is reduced. What comes out in the place of the logits is a zero that carries the gradient: whatever a model
does to its logits afterwards, soft-capping included, has a known derivative at zero.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accel_distill.head_jobs import DenseJob, Peak, SparseJob, Taken, Watch, largest_gradient, peak_of
from accel_distill.lm_head import LMHead
from accel_distill.losses import Losses

WEIGHT_ROWS = 32_768  # rows of a half-precision head whose gradient is made at once, before it is added in float32

Job = SparseJob | DenseJob


class Ran(NamedTuple):
    """What a model made of a job."""

    loss: Tensor  # a scalar, with its gradient where gradients are enabled
    losses: Losses  # of all positions, (P,) each, without a gradient
    peak: Peak | None


class FusedHead:
    """The output layer of a model, which makes the loss of a job where it would make logits."""

    def __init__(self, head: LMHead) -> None:
        """Replace the layer's `forward`; without a job it gives logits as before."""
        self._head = head
        self._plain = head.linear.forward
        self._job: Job | None = None
        self._taken: list[Taken] = []
        self.watch: Watch | None = None  # is given the loss's gradient, of hidden states, in backward
        self.watch_kd: Watch | None = None  # is told the largest gradient by logits of KD alone, of each chunk
        head.linear.forward = self._forward  # type: ignore[method-assign, assignment]

    def run(self, model: nn.Module, job: Job, **inputs: Any) -> Ran:
        """Run the model, wrapped as it may be, on `inputs` without labels, and take the losses of the job."""
        self._job, self._taken = job, []
        try:
            carrier = model(**inputs).logits
            taken = self._taken
        finally:
            self._job, self._taken = None, []
        losses, peak = _joined(taken, job, carrier.device)
        loss = job.objective.weigh(losses) * job.factor
        return Ran(loss + carrier.float().sum() / self._head.scale, losses, peak)

    def _forward(self, hidden: Tensor) -> Tensor:
        return self._plain(hidden) if self._job is None else self._fused(hidden, self._job)

    @torch.compiler.disable
    def _fused(self, hidden: Tensor, job: Job) -> Tensor:
        """Return a zero (1, 1, 1) with the gradient of the job's loss, by hidden states (B, T, D) and parameters."""
        rows = hidden.flatten(0, -2).index_select(0, job.positions)
        linear = self._head.linear
        if torch.is_grad_enabled():
            return _Loss.apply(rows, linear.weight, linear.bias, self, job)
        self.take(rows, linear.weight, linear.bias, job=job, wanted=(False, False, False))
        return rows.new_zeros(1, 1, 1, dtype=torch.float32)

    def take(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, job: Job, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Take the losses of rows of hidden states (P, D), keep them for `run`; return the gradients that are wanted.

        They are those by hidden, weight and bias of the unscaled sum, in float32.
        """
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            return self._take(hidden.to(dtype), weight.to(dtype), bias, job=job, wanted=wanted)

    def _take(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, job: Job, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        half = hidden.dtype != exact
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        gradients = [
            torch.zeros(shape, dtype=exact, device=hidden.device) if want else None
            for shape, want in zip(shapes, wanted, strict=True)
        ]
        of_hidden, of_weight, of_bias = gradients
        longest = max((part.stop - part.start for part in job.parts), default=0)
        buffer = hidden.new_empty(longest, len(weight), dtype=exact)
        rounded = hidden.new_empty(longest, len(weight)) if half else buffer
        for index, part in enumerate(job.parts):
            rows = hidden[part]
            logits, matrix = buffer[: len(rows)], rounded[: len(rows)]
            torch.mm(rows, weight.t(), out=matrix)
            if half:
                logits.copy_(matrix)
            if bias is not None:
                logits.add_(bias)
            self._head.transform_(logits)
            capped = logits.clone() if any(wanted) and self._head.softcap is not None else None
            self._taken.append(job.take(logits, index, with_gradient=any(wanted), watch_kd=self.watch_kd))
            if not any(wanted):
                continue
            self._head.chain_(logits, capped)
            if half:
                matrix.copy_(logits)
            if of_hidden is not None:
                of_hidden[part] = matrix @ weight
            if of_bias is not None:
                of_bias += logits.sum(dim=0)
            if of_weight is not None:
                _add_product(of_weight, matrix.t(), rows)
        return gradients


class FullLogits:
    """What stands in for `FusedHead` where a model cannot have one: losses from the model's own logits (B, T, V).

    Chunks are computed again in backward, so that one chunk's float32 log-probabilities live at a time.
    """

    watch: Watch | None = None
    watch_kd: Watch | None = None

    def run(self, model: nn.Module, job: Job, **inputs: Any) -> Ran:
        """Run the model on `inputs` without labels, and take the losses of the job."""
        rows = model(**inputs).logits.flatten(0, -2).index_select(0, job.positions)
        if self.watch is not None:
            rows.register_hook(self.watch)
        taken: list[Taken] = []
        total = (
            rows[:0].float().sum()
        )  # without a position: a gradient, of zero, that every process takes part in reducing
        for index, part in enumerate(job.parts):
            if self.watch_kd is not None:
                leaf = rows[part].detach().requires_grad_()
                self.watch_kd(largest_gradient(job.plain(leaf, index).kd, [leaf]))
            losses = checkpoint(job.plain, rows[part], index, use_reentrant=False, preserve_rng_state=False)
            total = total + job.objective.weigh(losses)
            peak = peak_of(rows[part]) if job.with_peak else None
            taken.append((Losses(*(loss.detach() for loss in losses)), peak))
        losses, peak = _joined(taken, job, rows.device)
        return Ran(total * job.factor, losses, peak)


class _Loss(torch.autograd.Function):
    """A zero whose gradient is the job's loss's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, fused: FusedHead, job: Job) -> Tensor:
        ctx.gradients = fused.take(hidden, weight, bias, job=job, wanted=ctx.needs_input_grad[:3])
        ctx.fused, ctx.factor, ctx.dtypes = fused, job.factor, [part.dtype for part in (hidden, weight, weight)]
        return hidden.new_zeros(1, 1, 1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the gradients would silently count as constants
            raise RuntimeError("the fused loss has no second derivative; use FullLogits for it")
        if ctx.gradients is None:
            raise RuntimeError("the fused loss was taken backward before, and its gradients are gone; run it again")
        scale, gradients = outer.sum() * ctx.factor, ctx.gradients
        ctx.gradients = None
        found = [part if part is None else part.mul_(scale) for part in gradients]
        if ctx.fused.watch is not None:
            ctx.fused.watch(next(part for part in found if part is not None))
        return *(part if part is None else part.to(d) for part, d in zip(found, ctx.dtypes, strict=True)), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`; in float32 also where the two are half precision, some rows at a time."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, len(total), WEIGHT_ROWS):
        total[start : start + WEIGHT_ROWS] += left[start : start + WEIGHT_ROWS] @ right


def _joined(taken: Sequence[Taken], job: Job, device: torch.device) -> Taken:
    """Join what was taken from all chunks, field by field; no chunk gives empty tensors."""
    none = torch.zeros(0, device=device)
    losses = [found for found, _ in taken] or [Losses(none, none, none)]
    peaks = [peak for _, peak in taken if peak is not None] or [Peak(none, none.long())]
    joined = Losses(*map(torch.cat, zip(*losses, strict=True)))
    return joined, Peak(*map(torch.cat, zip(*peaks, strict=True))) if job.with_peak else None
