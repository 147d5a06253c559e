"""Taking a model's head off: proved on tiny models of the kinds that transform their logits."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from accel_distill.lm_head import separate_head

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "scaled up": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "scaled down": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_on_hidden_states_gives_the_models_own_logits(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # random heads are near zero, and then nothing shows
        parameter.data.normal_(std=0.5)
    head, reason = separate_head(model)
    assert head is not None, reason
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(head.logits(hidden.flatten(0, 1)), expected.flatten(0, 1), atol=1e-4, rtol=1e-4)
    plain = head.linear(hidden).detach()
    transforms = name in ("soft-capped", "scaled up", "scaled down")
    assert transforms == (not torch.allclose(plain, expected, atol=1e-3))


def test_a_model_that_does_more_to_its_logits_is_not_taken_apart_and_the_reason_is_given():
    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1.0
            return output

    head, reason = separate_head(Shifted(LlamaConfig(**SIZES)).eval())
    assert head is None
    assert "differs from the model's logits by 1 on 8 probe tokens" in reason


def test_a_head_that_is_no_linear_layer_is_not_taken_apart():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.set_output_embeddings(nn.Sequential(nn.Linear(16, 97)))
    assert separate_head(model) == (None, "its output layer is Sequential, not a linear layer")
