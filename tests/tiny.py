"""A tiny random teacher with its tokenizer, and run configurations that use it: what the tests of generate share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel_distill.config import RunConfig

WORDS = (
    "the a small old red dog cat bird tree house river king ran sat saw said was not and then under over of it".split()
)
VOCAB = 320  # of the model; the tokenizer makes fewer ids, as padded vocabularies do
MAX_LENGTH = 32


def story(n: int) -> str:
    """Return the n-th text: 0 to 40 words, chosen by n alone; every eleventh is empty."""
    count = 0 if n % 11 == 7 else 3 + (n * n) % 38
    return " ".join(WORDS[(n * 7 + k * k + k * (n % 5)) % len(WORDS)] for k in range(count))


def write_jsonl(path: Path, texts: Sequence[Any], column: str = "text") -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of about 300 ids; `<s>` is 0 and `</s>` is 1, and it adds neither."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([story(n) for n in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_teacher(path: Path, *, vocab: int = VOCAB, spread: float = 0.3, seed: int = 0) -> Path:
    """Save a random Llama and the tokenizer; `spread` of the weights makes it sure of some next tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def run_config(teacher: Path, data: Path | list[str], cache: Path, /, **changes: dict[str, Any]) -> RunConfig:
    """Return a run on local JSON lines; `changes` are sections, whose keys replace these."""
    files = [str(data)] if isinstance(data, Path) else data
    values: dict[str, Any] = {
        "teacher": {"model": str(teacher), "dtype": "float32", "tokens_per_batch": 128, "head_chunk": 32},
        "dataset": {
            "name": "json",
            "data_files": files,
            "streaming": True,
            "max_samples": 30,
            "max_length": MAX_LENGTH,
            "eval_samples": 2,
        },
        "targets": {"threshold": 0.05},
        "cache": {"path": cache, "samples_per_shard": 4, "lanes": 2, "min_free_disk": "10MB"},
    }
    return RunConfig.model_validate({name: values.get(name, {}) | changes.get(name, {}) for name in values | changes})


def shard_files(cache: Path) -> dict[str, bytes]:
    """Return the bytes of every shard of a cache, by name."""
    return {path.name: path.read_bytes() for path in sorted((cache / "shards").iterdir())}
