"""Held-out positions as text: what stands before, what came next, what teacher and student say.

The one decision: the student is run on the CPU over the beginnings of a few held-out samples, and of all their
positions ten are shown that are spread evenly over the ranks of their divergence, from the nearest to the farthest. The
divergence is that of the ids that the teacher always keeps with one bucket for all others: a lower bound of the KL,
which no sampling of the tail disturbs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from accel_distill.cache import CachedSample, TeacherCache
from accel_distill.codec import weight_scale
from accel_distill.errors import ConfigError
from accel_distill.targets import SparseTargets
from accel_distill.tokens import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 10
SAMPLES = 16  # of the held-out ones, spread evenly
TOKENS = 128  # of each: with a student of 0.6 B parameters, half a minute on a CPU
LEAST_BEFORE = 8  # tokens before a position that is shown
CONTEXT = 40  # tokens that are shown before it
TOP = 6  # ids that are shown of teacher and student
TINY = 1e-9  # a probability of the student is taken for at least that


@dataclass(frozen=True)
class Choice:
    """One id that teacher or student may say next."""

    text: str
    probability: float
    is_true: bool  # it is what came next
    is_drawn: bool = False  # of the teacher's tail: it was sampled, and stands for others too


@dataclass(frozen=True)
class Position:
    """One position of a held-out sample."""

    sample_index: int
    position: int  # in the sample: the token after it is meant
    rank: int  # by divergence, from 0
    divergence: float  # nats
    context: str
    true: str
    teacher: list[Choice]
    student: list[Choice]
    student_true: float  # the student's probability of what came next


@dataclass(frozen=True)
class Selection:
    """The positions that are shown, and out of how many."""

    positions: list[Position]
    of_positions: int
    of_samples: int
    tokens: int  # of each sample, at most
    temperature: float
    rounding: str  # of the teacher's probabilities, in a sentence; empty: none to speak of


@dataclass(frozen=True)
class _Found:
    """A position before it is chosen."""

    item: int
    position: int
    target: int  # its place among the targets of the sample
    divergence: float


def sample_positions(student: Path, cache: TeacherCache, *, eval_samples: int, shown: int = SHOWN) -> Selection:
    """Return `shown` positions of the samples held out from `cache`, as the model in `student` sees them.

    The same run and cache give the same positions. Raises ConfigError where there is no student that loads or nothing
    is held out, and the errors of the cache.
    """
    held_out = np.flatnonzero((cache.sample_indices < eval_samples) & cache.has_target)
    if not len(held_out):
        raise ConfigError("no sample with a target was held out")
    items = held_out[np.unique(np.linspace(0, len(held_out) - 1, SAMPLES).round().astype(int))].tolist()
    model = _load(student)
    found = [each for item in items for each in _divergences(model, cache[item], item, cache.temperature)]
    wanted = [each for each in found if each.position >= LEAST_BEFORE] or found
    ordered = sorted(wanted, key=lambda each: (each.divergence, each.item, each.position))
    ranks = np.unique(np.linspace(0, len(ordered) - 1, shown).round().astype(int)).tolist()
    tokenizer = load_tokenizer(cache.tokenizer_path)
    positions = [_described(model, tokenizer, cache, ordered[rank], rank) for rank in ranks]
    return Selection(positions, len(ordered), len(items), TOKENS, cache.temperature, _rounding(cache))


def _rounding(cache: TeacherCache) -> str:
    if cache.method == "random":
        return f"The teacher's probabilities are shares of {cache.parameter:g} draws."
    if cache.method == "top_k":
        return ""
    steps = weight_scale(cache.method, cache.parameter)
    how = "rounded up or down at random so that their mean is exact"
    return f"The teacher's probabilities are whole steps of 1/{steps}, {how}."


def bucket_divergence(targets: SparseTargets, logprobs: Tensor) -> Tensor:
    """Return KL(teacher || student) (P,) of the head ids and one outcome for all others; logprobs are (P, V)."""
    rows = torch.arange(len(targets)).repeat_interleave(targets.head_count)
    offsets, _, weights = targets.entries()
    starts = offsets[:-1][rows]
    inside = torch.arange(len(rows)) - (targets.head_count.cumsum(0) - targets.head_count)[rows]
    teacher = weights[starts + inside].double()
    student = logprobs[rows, targets.head_ids].double().exp().clamp(min=TINY)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(targets), dtype=torch.float64).index_add_(0, rows, values)

    rest, students_rest = (1 - total(teacher)).clamp(min=0), (1 - total(student)).clamp(min=TINY)
    return total(torch.xlogy(teacher, teacher / student)) + torch.xlogy(rest, rest / students_rest)


def _load(student: Path) -> "PreTrainedModel":
    try:
        return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ConfigError(f"the student in {student} cannot be loaded: {' '.join(str(error).split())}") from error


def _beginning(sample: CachedSample) -> tuple[Tensor, Tensor, SparseTargets]:
    """Return the first ids, the positions among them that have a target and a next token, and their targets."""
    mask = sample.target_mask[:TOKENS]
    return sample.input_ids[:TOKENS], mask.nonzero()[:, 0], sample.targets.position_slice(0, int(mask.sum()))


def _logprobs(model: "PreTrainedModel", ids: Tensor, *, temperature: float) -> Tensor:
    """Return the student's log-probabilities (T, V) at the temperature of the targets."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].float()
    return torch.log_softmax(logits / temperature, dim=-1)


def _divergences(model: "PreTrainedModel", sample: CachedSample, item: int, temperature: float) -> list[_Found]:
    ids, positions, targets = _beginning(sample)
    if not len(targets):
        return []
    each = bucket_divergence(targets, _logprobs(model, ids, temperature=temperature)[positions])
    pairs = zip(positions.tolist(), each.tolist(), strict=True)
    return [_Found(item, position, place, divergence) for place, (position, divergence) in enumerate(pairs)]


def _described(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", cache: TeacherCache, found: _Found, rank: int
) -> Position:
    """Return a chosen position with its texts."""
    sample = cache[found.item]
    before, true = sample.input_ids[: found.position + 1], int(sample.input_ids[found.position + 1])
    logprobs = _logprobs(model, before, temperature=cache.temperature)[-1]
    target = sample.targets.position_slice(found.target, found.target + 1)
    _, ids, weights = target.entries()
    heads, shown = int(target.head_count), before[-CONTEXT:].tolist()
    order = sorted(range(len(ids)), key=lambda place: (place >= heads, -float(weights[place])))[:TOP]
    best = logprobs.topk(min(TOP, len(logprobs)))

    def choice(token: int, probability: float, *, is_drawn: bool = False) -> Choice:
        return Choice(token_text(tokenizer, shown, token), probability, token == true, is_drawn)

    return Position(
        sample_index=sample.sample_index,
        position=found.position,
        rank=rank,
        divergence=found.divergence,
        context=("" if len(before) <= CONTEXT else "… ") + _decode(tokenizer, shown),
        true=token_text(tokenizer, shown, true),
        teacher=[choice(int(ids[place]), float(weights[place]), is_drawn=place >= heads) for place in order],
        student=[choice(*pair) for pair in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)],
        student_true=float(logprobs[true].exp()),
    )


def token_text(tokenizer: "PreTrainedTokenizerBase", before: Sequence[int], token: int) -> str:
    """Return what a token adds to the text before it; its name where that is not whole characters."""
    earlier, with_it = _decode(tokenizer, before), _decode(tokenizer, [*before, token])
    text = with_it[len(earlier) :] if with_it.startswith(earlier) else ""
    if text and "\ufffd" not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token) or f"id {token}"


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
