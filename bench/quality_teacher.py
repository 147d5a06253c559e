"""The teacher of the quality experiment, and all that it says: text, tokenizer, weights, hidden states.

The one decision: the teacher reads every block once and its last hidden states are kept in memory, so that each method
and seed only pays for the head. It costs D floats a position (256 MB for 0.5 M positions of width 128); the logits
would be V floats.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from accel_distill.demo_corpus import python_documents
from accel_distill.demo_teacher import train_tokenizer
from accel_distill.errors import ConfigError
from accel_distill.lm_head import LMHead, separate_head
from accel_distill.losses import cross_entropy
from bench.quality_training import Schedule, Shape, block_order, fit, logits_of, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0
HELD_OUT_EVERY = 20  # documents, of a corpus without a held-out file


@dataclass(frozen=True)
class TeacherPlan:
    """Which teacher, on which text."""

    corpora: tuple[str, ...]  # of CORPORA
    tokenizer: str | None  # a directory below the data; None: trained on the text (byte-level BPE, 2,048 ids)
    model: str | None  # a directory below the data; None: trained here, as `shape` and `schedule` say
    shape: Shape | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True)
class TaughtText:
    """Blocks of text with what the teacher thinks of them."""

    ids: Tensor  # (B, T) int64
    hidden: Tensor  # (B, T - 1, D): the teacher's last hidden states at the positions that have a next token
    head: LMHead
    vocab_size: int  # of the teacher

    @property
    def positions(self) -> int:
        """How many positions of a block have a next token."""
        return self.hidden.shape[1]

    def labels(self, rows: Tensor) -> Tensor:
        """Return the true next tokens of blocks `rows` (n,): (n (T - 1),) int64."""
        return self.ids[rows, 1:].flatten()

    @torch.no_grad()
    def teacher_logits(self, rows: Tensor) -> Tensor:
        """Return the teacher's logits at blocks `rows` (n,): (n (T - 1), V) float32, a fresh tensor."""
        return self.head.logits(self.hidden[rows].flatten(0, 1)).float()


@dataclass(frozen=True)
class Lesson:
    """A teacher's text to train students on, and the text to examine them with."""

    train: TaughtText
    held_out: TaughtText
    teacher_parameters: int
    identity: str  # sha256 over all blocks and the teacher's weights


def prepare(
    plan: TeacherPlan, *, data: Path, work: Path, block: int, blocks_at_once: int, device: torch.device
) -> Lesson:
    """Read the text, load the teacher or train it (once: it is kept in `work`), and let it read all blocks."""
    train_texts, held_out_texts = read_corpora(plan.corpora, data=data)
    tokenizer = _tokenizer(plan, train_texts, data=data)
    train, held_out = (pack(texts, tokenizer, block=block) for texts in (train_texts, held_out_texts))
    model = _teacher(
        plan, train, data=data, work=work, vocab_size=len(tokenizer), at_once=blocks_at_once, device=device
    )
    head, reason = separate_head(model)
    assert head is not None, reason
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in (train, held_out)))
    for weight in model.state_dict().values():
        digest.update(weight.float().cpu().numpy().tobytes())
    taught, exam = (read_blocks(model, head, ids.to(device), at_once=blocks_at_once) for ids in (train, held_out))
    return Lesson(taught, exam, model.num_parameters(), digest.hexdigest())


def read_corpora(names: Sequence[str], *, data: Path) -> tuple[list[str], list[str]]:
    """Return the documents to train on and those held out, of all corpora one after the other."""
    parts = [CORPORA[name](data) for name in names]
    return [text for train, _ in parts for text in train], [text for _, held_out in parts for text in held_out]


def read_blocks(model: LlamaForCausalLM, head: LMHead, ids: Tensor, *, at_once: int) -> TaughtText:
    """Run the teacher once over blocks (B, T), and keep its last hidden states."""
    model.eval()
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        hidden = [model.base_model(input_ids=part, use_cache=False)[0][:, :-1] for part in ids.split(at_once)]
    weight_type = next(model.parameters()).dtype
    return TaughtText(ids, torch.cat(hidden).to(weight_type), head, model.config.vocab_size)


def _stories(data: Path) -> tuple[list[str], list[str]]:
    return _texts(data / "text/tinystories_train.jsonl"), _texts(data / "text/tinystories_valid.jsonl")


def _books(data: Path) -> tuple[list[str], list[str]]:
    return _divided(_texts(data / "text/books.jsonl"))


def _python(data: Path) -> tuple[list[str], list[str]]:
    return _divided(python_documents())


CORPORA = {"stories": _stories, "books": _books, "python": _python}


def _texts(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there; name the directory of the data with --data DIR") from error


def _divided(texts: list[str]) -> tuple[list[str], list[str]]:
    held_out = texts[::HELD_OUT_EVERY]
    return [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY], held_out


def _tokenizer(plan: TeacherPlan, texts: Sequence[str], *, data: Path) -> "PreTrainedTokenizerBase":
    return train_tokenizer(texts) if plan.tokenizer is None else AutoTokenizer.from_pretrained(data / plan.tokenizer)


def _teacher(
    plan: TeacherPlan, blocks: Tensor, *, data: Path, work: Path, vocab_size: int, at_once: int, device: torch.device
) -> LlamaForCausalLM:
    if plan.model is not None:
        return AutoModelForCausalLM.from_pretrained(data / plan.model).to(device)
    assert plan.shape is not None and plan.schedule is not None
    made_from = f"{plan.shape} {plan.schedule} {vocab_size} {device.type}".encode() + blocks.numpy().tobytes()
    path = work / f"teacher-{hashlib.sha256(made_from).hexdigest()[:12]}"
    if not path.is_dir():
        print(f"Training the teacher, once; it will be kept in {path}", flush=True)
        model = _trained(plan.shape, plan.schedule, blocks.to(device), vocab_size=vocab_size, at_once=at_once)
        _publish(model, path)
    return AutoModelForCausalLM.from_pretrained(path).to(device)


def _trained(shape: Shape, schedule: Schedule, ids: Tensor, *, vocab_size: int, at_once: int) -> LlamaForCausalLM:
    model = shape.model(vocab_size=vocab_size, block=ids.shape[1], seed=SEED).to(ids.device)
    order = block_order(len(ids), schedule, seed=SEED).to(ids.device)

    def losses(rows: Tensor) -> Tensor:
        return cross_entropy(logits_of(model, ids[rows]), ids[rows, 1:].flatten())

    fit(model, losses, order=order, learning_rate=schedule.learning_rate, blocks_at_once=at_once)
    return model


def _publish(model: LlamaForCausalLM, path: Path) -> None:
    """Save under a temporary name and rename: half a teacher is never taken for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    model.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
