"""The demo's teacher: a tokenizer and a small Llama, both made from the demo's text in about a minute.

The one decision: documents are packed into blocks of equal length, so that no step is spent on padding. Its cost:
a block may hold the end of one document and the start of another, which the teacher sees as one text.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accel_distill.errors import RunError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 2048  # ids, of which 256 are the bytes
BATCH = 8  # blocks
LEARNING_RATE = 6e-3
# 1 / sqrt(hidden size) in place of transformers' 0.02: held-out CE after 600 steps 4.7 instead of 5.1.
INITIALIZER_RANGE = 0.1
SEED = 0


def train_tokenizer(documents: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer that starts every text with `<s>` and can write any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def train_teacher(
    documents: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    path: Path,
    steps: int,
    block: int,
) -> None:
    """Train the teacher for `steps` on blocks of `block` tokens, and save it with its tokenizer in `path`."""
    from accel_distill.processes import quiet_deepspeed

    quiet_deepspeed()
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed
    from transformers.utils import logging

    from accel_distill.training_log import use_training_log

    logging.disable_progress_bar()  # of writing weights
    set_seed(SEED)
    teacher = LlamaForCausalLM(teacher_config(tokenizer))
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, steps // 8),
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # a bar would fill a log file
        seed=SEED,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more would each get a piece of these 8 blocks
    blocks = pack(documents, tokenizer, block=block)
    trainer = Trainer(teacher, arguments, train_dataset=blocks)
    use_training_log(trainer)
    trainer.train()
    teacher.save_pretrained(path)
    tokenizer.save_pretrained(path)


def teacher_config(tokenizer: "PreTrainedTokenizerFast") -> "LlamaConfig":
    """Return the sizes of the teacher."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pack(documents: Sequence[str], tokenizer: "PreTrainedTokenizerFast", *, block: int) -> list[dict[str, list[int]]]:
    """Return the documents' ids, each document with its start and end, cut into blocks; a last rest is dropped."""
    rows = tokenizer(list(documents))["input_ids"]
    ids = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    starts = range(0, len(ids) - block + 1, block)
    if not starts:
        raise RunError(f"the text has {len(ids):,} tokens; expected at least one block of {block}")
    return [{"input_ids": part, "labels": part} for part in (ids[start : start + block] for start in starts)]
