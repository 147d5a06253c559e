"""Which models keep the documents of a packed row apart: by what they compute, not by their names."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from accel_distill.packing_probe import packing_fault

VOCAB = 64
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
APART: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gpt2": GPT2,
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 4},
    "mistral": SIZES | {"sliding_window": 3},
}
MIXED: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "opt": OPT,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon_h1": SIZES,  # attention and a state-space model side by side
}


def model(name: str, *, spread: float = 0.02, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**APART, **MIXED}[name]
    config = AutoConfig.for_model(name, vocab_size=VOCAB, initializer_range=spread, **sizes)
    return AutoModelForCausalLM.from_config(config, **settings).eval()


def fault(student: Any, rows: int = 2, *, half: bool = False) -> tuple[str, bool]:
    def run(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return student(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    return packing_fault(run, vocab_size=VOCAB, rows=rows, half=half, device=torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", APART)
def test_a_model_with_block_diagonal_masks_passes_as_it_is_initialised(name: str, attention: str, rows: int) -> None:
    assert fault(model(name, attn_implementation=attention), rows) == ("", True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_it_passes_in_half_precision(name: str) -> None:
    assert fault(model(name, dtype=torch.bfloat16), half=True) == ("", True)


@pytest.mark.parametrize("name", MIXED)
def test_a_model_that_mixes_documents_is_found_out(name: str) -> None:
    problem, _ = fault(model(name))
    assert problem.startswith("another document in the same row changes its logits by")


def test_a_wrong_position_is_found_out_where_positions_are_absolute() -> None:
    student = model("gpt2")

    def run(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        shifted = position_ids + (torch.arange(position_ids.shape[1]) >= 7)  # the mask still sees where each begins
        return student(input_ids=input_ids, position_ids=shifted, use_cache=False).logits

    problem, _ = packing_fault(run, vocab_size=VOCAB, rows=2, half=False, device=torch.device("cpu"))
    assert problem.startswith("a document's place in a row changes its logits by")


def test_a_model_that_is_not_a_number_is_no_proof() -> None:
    student = model("llama")
    with torch.no_grad():
        student.get_output_embeddings().weight[0, 0] = float("nan")
    assert fault(student)[0]


def test_a_model_whose_tokens_do_not_depend_on_each_other_proves_nothing() -> None:
    student = model("llama")
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert fault(student) == ("", False)
