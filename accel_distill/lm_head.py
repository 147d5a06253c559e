"""A causal language model taken apart: base model to hidden states, LM head to logits.

The one decision: the split is proved on probe tokens, not looked up by model class. It costs two forward passes of 8
tokens; a model that does more to its logits than the config says falls back to `model(...).logits`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8
TOLERANCE = 1e-4  # of the largest logit, and at least absolute


@dataclass(frozen=True)
class LMHead:
    """The output layer of a model and what its config says is done to the logits behind it."""

    linear: nn.Linear
    scale: float = 1.0  # logits are multiplied by it
    softcap: float | None = None  # then logits become softcap * tanh(logits / softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (n, V) of hidden states (n, D)."""
        return self.transform_(self.linear(hidden))

    def transform_(self, logits: Tensor) -> Tensor:
        """Do to the linear layer's output (n, V), in place, what the model does to it."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def chain_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Turn the gradient of the logits (n, V), in place, into that of the linear layer's output.

        `logits` are those of `transform_`; only a soft cap needs them.
        """
        if self.softcap is not None:
            assert logits is not None
            gradient.mul_((logits / self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


@torch.no_grad()
def separate_head(model: "PreTrainedModel") -> tuple[LMHead | None, str]:
    """Return the model's head, or None and the reason why it cannot be taken apart."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return None, f"its output layer is {type(linear).__name__}, not a linear layer"
    if model.base_model is model:
        return None, "it has no base model apart from its head"
    head = described_head(model, linear)
    device = device_of(linear)
    ids = (torch.arange(1, PROBE_TOKENS + 1) % linear.out_features)[None].to(device_of(model.get_input_embeddings()))
    expected = model(input_ids=ids, use_cache=False).logits[0].float().to(device)
    found = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].to(device)).float()
    if found.shape != expected.shape:
        return None, f"its head gives {tuple(found.shape)} and the model {tuple(expected.shape)}"
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        return None, f"its head differs from the model's logits by {difference:.3g} on {PROBE_TOKENS} probe tokens"
    return head, ""


def described_head(model: "PreTrainedModel", linear: nn.Linear) -> LMHead:
    """Read the settings that models of the transformers library have for their logits."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return LMHead(linear, scale, getattr(config, "final_logit_softcapping", None))  # Gemma 2 and 3


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes, which is not where accelerate keeps weights that it has moved off a device."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(module.parameters()).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
