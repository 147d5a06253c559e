"""From the texts of one shard to its bytes: tokens, batches, teacher, codec.

The one decision: a shard is computed whole, from settings that the cache keeps, so its bytes do not depend on who
computes it. Batches are formed inside the shard, by length, within a budget of padded tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from accel_distill.codec import invert, offsets
from accel_distill.deal import shard_name
from accel_distill.errors import ConfigError, NotFinite
from accel_distill.manifest import Record
from accel_distill.rows import Rows, encode_rows
from accel_distill.shard import shard_bytes
from accel_distill.stream import OpenShard
from accel_distill.targets import SparseTargets, concatenate, no_targets
from accel_distill.teacher import Sampling, Teacher, TeacherOutput
from accel_distill.text_hash import hash_texts
from accel_distill.tokens import SequenceRule, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShardContent:
    """Everything a shard says, before it is encoded."""

    shard: OpenShard
    rows: list[TokenSequence]
    truncated: int  # samples cut at max_length
    targets: SparseTargets  # of all positions, in the order of the rows
    entropy: np.ndarray  # (rows,) float64: sums over a row's positions, nats
    logprob: np.ndarray  # (rows,) float64
    left_out: Mapping[int, np.ndarray] = field(default_factory=dict)  # row to its positions where a logit is not finite

    @property
    def positions(self) -> int:
        """How many positions carry a target."""
        return len(self.targets)


class ShardMaker:
    """Makes shards of one cache: runs the teacher (`compute`) and writes bytes (`encode`, fit for another thread)."""

    def __init__(
        self,
        record: Record,
        *,
        teacher: Teacher,
        tokenizer: "PreTrainedTokenizerBase",
        rule: SequenceRule,
        sampling: Sampling,
        tokens_per_batch: int,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        before_forward: Callable[[], object] = lambda: None,
    ) -> None:
        """All settings are those of the cache `record`, so the same shard comes out wherever it is made.

        `before_forward` is called before the teacher runs: it may wait for ranks that share it.
        """
        self._record, self._teacher, self._tokenizer = record, teacher, tokenizer
        self._rule, self._sampling, self._tokens_per_batch = rule, sampling, tokens_per_batch
        self._on_nonfinite: Literal["stop", "skip"] = on_nonfinite
        self._before_forward = before_forward
        self._ranks = invert(record.ids_by_rank)

    def compute(self, shard: OpenShard, *, report: Callable[[int], None] | None = None) -> ShardContent:
        """Tokenise a shard's texts and run the teacher; `report` hears of finished positions."""
        layout = self._record.layout
        first = layout.first_sample(shard.group, shard.lane)
        indices = range(first, first + len(shard.texts) * layout.lanes, layout.lanes)
        rows, truncated = self._rule.sequences(shard.texts, indices, tokenizer=self._tokenizer)
        check_ids(rows, vocab_size=self._record.vocab_size)
        parts = [no_targets(self._sampling.method, self._sampling.parameter) for _ in rows]
        sums, left_out = np.zeros((2, len(rows))), {}
        for batch in batches([len(row.ids) for row in rows], tokens_per_batch=self._tokens_per_batch):
            output = self._run_teacher(shard, [rows[i] for i in batch], report=report)
            finite = np.split(output.finite, np.cumsum([len(rows[i].ids) - 1 for i in batch])[:-1])
            ends = offsets(np.array([part.sum() for part in finite]))
            for i, part, start, stop in zip(batch, finite, ends[:-1], ends[1:], strict=True):
                parts[i] = output.targets.position_slice(int(start), int(stop))
                sums[:, i] = output.entropy[start:stop].sum(), output.logprob[start:stop].sum()
                if not part.all():
                    left_out[i] = np.flatnonzero(~part)
        return ShardContent(shard, rows, truncated, concatenate(parts), sums[0], sums[1], left_out)

    def _run_teacher(
        self, shard: OpenShard, rows: list[TokenSequence], *, report: Callable[[int], None] | None
    ) -> TeacherOutput:
        self._before_forward()
        try:
            return self._teacher.targets_for(
                rows, sampling=self._sampling, on_nonfinite=self._on_nonfinite, report=report
            )
        except NotFinite as error:
            name = shard_name(shard.group, shard.lane, len(shard.texts))
            raise NotFinite(f"shard {name}: {error}") from error

    def take_part(self) -> None:
        """Take part in a forward of the ranks that share the teacher, without a batch."""
        self._teacher.take_part()

    def encode(self, content: ShardContent) -> bytes:
        """Return the bytes of a shard's file."""
        rows, shard = content.rows, content.shard
        lengths = np.array([len(row.ids) for row in rows])
        target_counts = np.maximum(lengths - 1, 0)
        for row, positions in content.left_out.items():
            target_counts[row] -= len(positions)
        fields = {
            "cache_id": self._record.cache_id,
            "group": shard.group,
            "lane": shard.lane,
            "first_sample": self._record.layout.first_sample(shard.group, shard.lane),
            "samples": len(shard.texts),
            "sequences": len(rows),
            "tokens": int(lengths.sum()),
            "positions": content.positions,
            "empty": sum(not text for text in shard.texts),
            "truncated": content.truncated,
            "untargeted": int((target_counts == 0).sum()),
            "nonfinite": sum(map(len, content.left_out.values())),
            "texts_sha256": hash_texts(shard.texts),
            "numerics": self._record.drift,
        }
        return shard_bytes(fields, self._columns(content, lengths, target_counts))

    def _columns(self, content: ShardContent, lengths: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        tokens = offsets(lengths)
        mask = np.ones(tokens[-1], bool)
        mask[tokens[1:][lengths > 0] - 1] = False  # a sequence's last token has no next one
        for row, positions in content.left_out.items():
            mask[tokens[row] + positions] = False
        rows = Rows(
            sample_index=np.array([row.sample_index for row in content.rows]),
            tokens=tokens,
            positions=offsets(targets),
            input_ids=np.concatenate([row.ids for row in content.rows]),
            target_mask=mask,
            targets=content.targets.arrays(),
            entropy=content.entropy,
            logprob=content.logprob,
        )
        return encode_rows(rows, method=self._record.method, parameter=self._record.parameter, ranks=self._ranks)


def batches(lengths: Sequence[int], *, tokens_per_batch: int) -> list[list[int]]:
    """Group rows by length into batches of at most `tokens_per_batch` padded tokens; a longer row is one of its own.

    Rows of equal length stay in their order; rows of fewer than two tokens have no position and are left out.
    """
    groups: list[list[int]] = []
    for i in sorted((i for i, length in enumerate(lengths) if length > 1), key=lambda i: lengths[i]):
        if groups and lengths[i] * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def check_ids(rows: Sequence[TokenSequence], *, vocab_size: int) -> None:
    """Raise ConfigError where the tokenizer made an id that the teacher has no embedding for."""
    for row in rows:
        if len(row.ids) and row.ids.max() >= vocab_size:
            raise ConfigError(
                f"sample {row.sample_index}: the tokenizer makes id {int(row.ids.max())}, but the teacher's "
                f"vocabulary has {vocab_size} ids; tokenizer and teacher do not belong together"
            )
