"""What teacher and students of the quality experiment have in common: a Llama from scratch, blocks of text, one loop.

The one decision: documents are packed into blocks of equal length, so that every step has the same number of positions
and methods differ in their loss alone. Its cost: a block may hold the end of one document and the start of another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup, set_seed

from accel_distill.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int

    def model(self, *, vocab_size: int, block: int, seed: int) -> LlamaForCausalLM:
        """Return a model on the CPU whose weights depend on sizes and seed alone."""
        set_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=block,
                tie_word_embeddings=True,
                initializer_range=self.hidden_size**-0.5,
            )
        )


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a model is trained; tokens a step are `batch` times the length of a block."""

    steps: int
    batch: int  # blocks
    learning_rate: float  # the peak; warmed up over a tenth of the steps, then a cosine to zero


def pack(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, block: int) -> Tensor:
    """Return the texts' ids cut into blocks (B, block) int64; the last rest is dropped.

    A text starts with the tokenizer's own start, or else ends with its end of text.
    """
    ids: list[int] = []
    for row in tokenizer(list(texts))["input_ids"]:
        ids.extend(row if row[:1] == [tokenizer.bos_token_id] else [*row, tokenizer.eos_token_id])
    if len(ids) < block:
        raise RunError(f"the text has {len(ids):,} tokens; expected at least one block of {block}")
    whole = len(ids) // block * block
    return torch.from_numpy(np.array(ids[:whole], np.int64).reshape(-1, block))


def block_order(blocks: int, schedule: Schedule, *, seed: int) -> Tensor:
    """Return the blocks of each step, (steps, batch) int64: epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    wanted = schedule.steps * schedule.batch
    epochs = [torch.randperm(blocks, generator=generator) for _ in range(-(-wanted // blocks))]
    return torch.cat(epochs)[:wanted].view(schedule.steps, schedule.batch)


def fit(
    model: LlamaForCausalLM,
    losses: Callable[[Tensor], Tensor],
    *,
    order: Tensor,
    learning_rate: float,
    blocks_at_once: int,
) -> None:
    """Train on the mean over positions of `losses`, which turns blocks (n,) into a loss per position (P,).

    `order` (steps, batch) holds the blocks of each step; `blocks_at_once` of them are in memory, no more.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(order) // 10, len(order))
    model.train()
    for rows in order:
        for part in rows.split(blocks_at_once):
            values = losses(part)
            (values.sum() / (len(values) // len(part) * len(rows))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return the logits of every position that has a next token: ids (n, T) to (n (T - 1), V); bfloat16 on a GPU."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
