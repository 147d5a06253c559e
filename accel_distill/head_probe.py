"""Whether a model's head can be fused with its loss, proved on a few hidden states before the model is wrapped.

The one decision: nothing is looked up by model class. The fused loss and its gradient have to be those of the model's
own logits. The base model does not run for it, so the proof is cheap for any size, and right for weights that ZeRO-3
has divided already: the head's are put together meanwhile. It costs a forward of the head on 8 positions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accel_distill.fused_head import FusedHead
from accel_distill.head_jobs import SparseJob, sparse_chunks
from accel_distill.lm_head import described_head
from accel_distill.losses import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8
PROBE_LOGITS = 10.0  # standard deviation of the probe's logits: with less a soft cap would not show
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}  # of the largest value; in half precision:
HALF_TOLERANCE = 0.1


def fuse_head(
    model: "PreTrainedModel", agree: Callable[[str], str] = lambda reason: reason
) -> tuple[FusedHead | None, str]:
    """Return the model's fused head, or None and the reason why it has none.

    `agree` turns what this process found (nothing: the proof was right) into what all processes go by.
    Proved on a few hidden states, before the model is wrapped: the fused loss and its gradient must be those of the
    model's own logits. The base model does not run, so this is cheap for any size, and right for weights that ZeRO-3
    has already divided: the head's are put together for it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
    linear = model.get_output_embeddings()
    if hasattr(linear, "modules_to_save"):  # peft's modules_to_save: the layer that is trained in its stead
        linear = linear.modules_to_save["default"]
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return None, f"its output layer is a {type(linear).__module__}.{type(linear).__name__}, not a plain nn.Linear"
    if model.base_model is model:
        return None, "it has no base model apart from its head"
    ours = getattr(linear.__dict__.get("forward"), "__self__", None)  # of an earlier trainer
    if not isinstance(ours, FusedHead) and "forward" in linear.__dict__:
        return None, "the forward of its output layer was replaced by another library"
    plain = ours._plain if isinstance(ours, FusedHead) else linear.forward
    fused = FusedHead(described_head(model, linear))
    fused._plain = plain
    try:
        with _whole(linear):
            reason = _difference(model, linear, fused)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # of the model's own code
        reason = f"it fails without its logits: {type(error).__name__}: {' '.join(str(error).split())}"
    if reason := agree(reason):
        del linear.forward
        return None, reason
    return fused, ""


def _difference(model: "PreTrainedModel", linear: nn.Linear, fused: FusedHead) -> str:
    """Return where the fused loss is another than that of the model's logits, on probe positions; or nothing."""
    weight, generator = linear.weight, torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=generator).to(weight)
    with torch.no_grad():
        hidden *= PROBE_LOGITS / linear(hidden).float().std().clamp(min=1e-6)
    labels = torch.randint(len(weight), (PROBE_TOKENS,), generator=generator).to(weight.device)
    none = torch.zeros(PROBE_TOKENS + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    entries = none[0].to(weight.device), none[1].to(weight.device), none[2].to(weight.device)
    job = SparseJob(
        Objective(kd_weight=0.0, ce_weight=1.0),
        torch.arange(PROBE_TOKENS, device=weight.device),
        sparse_chunks(labels, entries, size=PROBE_TOKENS),
    )
    ids = {"input_ids": labels[None], "use_cache": False}
    with _instead_of_base(model, hidden.requires_grad_()), _frozen(linear), torch.enable_grad():
        logits = model(**ids).logits
        if logits.shape != (1, PROBE_TOKENS, len(weight)):
            return f"its logits for {PROBE_TOKENS} positions are {tuple(logits.shape)}, and its head has {len(weight)}"
        expected = job.objective.weigh(job.objective.sparse(logits[0], labels, entries))
        found, *_ = fused.run(model, job, **ids)
        pairs = {
            "loss": (found.detach(), expected.detach()),
            "gradient": tuple(torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)),
        }
    for name, (got, want) in pairs.items():
        largest = float(want.abs().max())
        difference = float((got - want).abs().max())
        if not difference <= TOLERANCE.get(weight.dtype, HALF_TOLERANCE) * largest:
            return (
                f"the {name} of its head is off by {difference:.3g} of {largest:.3g} on {PROBE_TOKENS} probe positions"
            )
    return ""


class _Hidden:
    """What a base model returns, as far as a head reads it: anything but the hidden states is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _instead_of_base(model: "PreTrainedModel", hidden: Tensor) -> Iterator[None]:
    """Let the base model return `hidden` (B, T, D) without running."""
    base = model.base_model
    before = base.__dict__.get("forward")
    base.forward = lambda *_, **__: _Hidden(hidden)
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient of the module's parameters be made."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _whole(module: nn.Module) -> AbstractContextManager[Any]:
    """Put the parameters together that ZeRO-3 has divided among the processes when the model was loaded."""
    divided = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)
