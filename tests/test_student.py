"""The student: what of `student.config` it keeps, and which checkpoints it refuses."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from accel_distill.config import StudentConfig
from accel_distill.errors import ConfigError
from accel_distill.student import load_student
from tests.tiny import MAX_LENGTH, VOCAB, make_teacher, make_tokenizer

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def made(**student: Any) -> PreTrainedModel:
    return load_student(StudentConfig(**student), make_tokenizer(), vocab_size=VOCAB, max_length=MAX_LENGTH, seed=0)


@pytest.mark.parametrize("name", ["n_positions", "max_position_embeddings"])
def test_a_number_of_positions_is_kept_under_either_name(name: str) -> None:
    student = made(config=GPT2 | {name: 64})
    assert student.config.n_positions == student.config.max_position_embeddings == 64
    assert student.transformer.wpe.weight.shape == (64, 16)


def test_sizes_that_are_not_given_follow_from_the_cache() -> None:
    student = made(config=GPT2)
    assert student.config.n_positions == 1024  # its own default, as it is longer than the samples
    assert student.config.vocab_size == VOCAB
    assert student.config.eos_token_id == 1


@pytest.mark.parametrize("name", ["n_positions", "max_position_embeddings"])
def test_too_few_positions_are_refused_under_either_name(name: str) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings is 16, but .* up to 32 tokens"):
        made(config=GPT2 | {name: 16})


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_positions": 64, "max_position_embeddings": 128},
        {"n_embd": 16, "hidden_size": 32},
    ],
)
def test_two_names_of_one_size_with_two_values_are_refused(sizes: dict[str, int]) -> None:
    first, second = sizes
    with pytest.raises(ConfigError, match=f"student.config.{first}: found {sizes[first]}, .* has {sizes[second]}"):
        made(config=GPT2 | sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"rope_theta": 5000.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"num_key_value_heads": None, "dtype": "float32"},
        {"eos_token_id": [1, 2], "tie_word_embeddings": True},
    ],
)
def test_values_that_a_configuration_only_spells_anew_are_taken(sizes: dict[str, Any]) -> None:
    before = deepcopy(sizes)
    assert made(config=LLAMA | sizes).config.hidden_size == 16
    assert sizes == before  # which is what the resolved configuration will say


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def drop(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    assert len(weights) - len(kept) == 3
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def widen(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "cannot be loaded: .*incomplete"),
        (drop, r"3 weights of the model are not in its files, the first is model.layers.1.mlp.down_proj.weight;"),
        (widen, r"6 weights have .* model.layers.0.mlp.down_proj.weight: found \(16, 32\), expected \(16, 48\)"),
    ],
)
def test_a_checkpoint_without_all_its_weights_is_refused(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = make_teacher(tmp_path / "student")
    made(model=str(path))
    spoil(path)
    with pytest.raises(ConfigError, match=words):
        made(model=str(path))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    made(config=GPT2).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    student = made(model=str(tmp_path))
    assert torch.equal(student.lm_head.weight, student.transformer.wte.weight)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(RuntimeError("size mismatch"), ConfigError), (torch.OutOfMemoryError("full"), torch.OutOfMemoryError)],
)
def test_only_a_lack_of_memory_is_no_fault_of_the_checkpoint(
    raised: Exception, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    path = make_teacher(tmp_path / "student")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(expected, match=str(raised)):
        made(model=str(path))
