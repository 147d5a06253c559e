"""Texts to token sequences, and what identifies a tokenizer.

The one decision: a sequence is made here and nowhere else (special tokens, end of text, the cut at max_length), so that
the rule is part of the cache's identity, and training reads the ids instead of making them again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accel_distill.errors import CacheMismatch, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from accel_distill.config import DatasetConfig

CANARIES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  two  spaces\tand a tab\nand a line",
    "naïve café — “quoted” … 你好, мир! 🙂",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # code",
    "",
)


@dataclass(frozen=True)
class TokenSequence:
    """One row of the cache: a sample, or a piece of one where long documents are split."""

    sample_index: int
    start: int  # position of the first id in the document
    ids: np.ndarray  # (T,) int64; T = 0 where the sample has no text


@dataclass(frozen=True)
class SequenceRule:
    """How a text becomes token sequences."""

    max_length: int
    long_documents: str  # "truncate" or "split"
    add_special_tokens: bool
    append_eos: bool

    @classmethod
    def of(cls, config: "DatasetConfig") -> "SequenceRule":
        """Take the rule's settings from the configuration."""
        return cls(config.max_length, config.long_documents, config.add_special_tokens, config.append_eos)

    def sequences(
        self, texts: Sequence[str | None], indices: Sequence[int], *, tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[list[TokenSequence], int]:
        """Return the sequences of samples, in order, and how many samples were cut.

        An id of end of text is appended where the tokenizer has one and did not add it. Pieces of a split document
        overlap by one token, so that every token but the first is some position's next token.
        """
        known = [text or "" for text in texts]
        encoded = (
            tokenizer(known, add_special_tokens=self.add_special_tokens, verbose=False)["input_ids"] if known else []
        )
        eos = tokenizer.eos_token_id if self.append_eos else None
        rows, cut = [], 0
        for text, index, ids in zip(known, indices, encoded, strict=True):
            if not text:
                rows.append(TokenSequence(index, 0, np.zeros(0, np.int64)))
                continue
            if eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            whole = np.asarray(ids, np.int64)
            if self.long_documents == "truncate" or len(whole) <= self.max_length:
                cut += len(whole) > self.max_length
                rows.append(TokenSequence(index, 0, whole[: self.max_length]))
                continue
            for start in range(0, len(whole) - 1, self.max_length - 1):
                rows.append(TokenSequence(index, start, whole[start : start + self.max_length]))
        return rows, cut


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer by hub name or path; raise ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file can make the libraries raise anything, a bare Exception too
        reason = " ".join(str(error).split())
        raise ConfigError(f"no tokenizer can be loaded from {name}: {type(error).__name__}: {reason}") from error


def pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return an id to pad with: any does, padding is neither attended to nor a target."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in ids if number is not None)


def tokenizer_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return how many ids a tokenizer can make: its largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what identifies a tokenizer by content."""
    canaries = [tokenizer(text, verbose=False)["input_ids"] for text in CANARIES]
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    return {
        "rules_sha256": {name: _sha256_of(rule) for name, rule in sorted(_rules(tokenizer).items())},
        "vocab_sha256": _sha256_of(sorted(tokenizer.get_vocab().items())),
        "canaries_sha256": _sha256_of(canaries),
        "special_ids": special,
        "size": tokenizer_size(tokenizer),
    }


def check_same_tokenizer(cached: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", *, name: str) -> None:
    """Raise CacheMismatch, naming the first difference, where `other` does not make the ids of the cache's one."""
    ours = {index: token for token, index in cached.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    for index in sorted(ours):
        if ours[index] != theirs.get(index):
            raise CacheMismatch(
                f"{name}: its tokenizer is not the cache's: id {index} is {theirs.get(index)!r}, in the cache "
                f"{ours[index]!r}; train a student with the teacher's tokenizer"
            )
    mine, others = _rules(cached), _rules(other)
    for rule in ("normalizer", "pre_tokenizer", "merges"):
        if mine and others and mine[rule] != others[rule]:
            raise CacheMismatch(
                f"{name}: its tokenizer is not the cache's: it has the same ids, but another {rule}, so texts become "
                "other ids; train a student with the teacher's tokenizer"
            )
    for text in CANARIES:
        ours_now, found = cached(text, verbose=False)["input_ids"], other(text, verbose=False)["input_ids"]
        if ours_now != found:
            raise CacheMismatch(
                f"{name}: its tokenizer is not the cache's: {text!r} becomes {found}, in the cache {ours_now}; "
                "train a student with the teacher's tokenizer"
            )


def _rules(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what a fast tokenizer does to a text beside looking ids up; nothing for a slow one, which has canaries."""
    if not tokenizer.is_fast:
        return {}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: content.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
    return {**rules, "merges": (content.get("model") or {}).get("merges")}


def _sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
