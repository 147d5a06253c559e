"""Rows of texts: the same as a cache's, and of a stream dealt to ranks and workers without loss or repetition."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from tiny import MAX_LENGTH, make_tokenizer, run_config, story, write_jsonl
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from accel_distill import hints
from accel_distill.errors import ConfigError
from accel_distill.losses import IGNORE_INDEX
from accel_distill.noted_stream import NotedStream
from accel_distill.stream import TextStream
from accel_distill.text_collator import NO_END, TextCollator
from accel_distill.text_rows import NO_SAMPLE, MapRows, StreamRows, TextRow, Texts
from accel_distill.tokens import SequenceRule, TokenSequence

COUNT, FIRST = 37, 5  # texts; the first ones are held out
TOKENIZER = make_tokenizer()


@pytest.fixture(autouse=True)
def noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of a stream are noted as soon as the one before is written, so that reading begins at them."""
    monkeypatch.setattr(hints, "EVERY", 0.0)


def open_texts(place: Path, *, vocab_size: int = 400, count: int = COUNT, **dataset: Any) -> Texts:
    """Return the rows of `count` stories, of two files."""
    files = [
        str(write_jsonl(place / f"{name}.jsonl", [story(n) for n in part]))
        for name, part in (("a", range(count // 2)), ("b", range(count // 2, count)))
    ]
    config = run_config(place, files, place, dataset={"streaming": True, **dataset}).dataset
    return Texts(TextStream(config), rule=SequenceRule.of(config), tokenizer=TOKENIZER, vocab_size=vocab_size)


def stream_rows(texts: Texts, place: Path, *, first: int, stop: int, multiple: int) -> StreamRows:
    """Return the rows of a stream; of all processes this one writes hints."""
    stream = NotedStream(texts.stream.read, place / "run", source=texts.stream.source, is_writer=True)
    return StreamRows(texts, stream, first=first, stop=stop, multiple=multiple)


def expected(first: int, stop: int) -> list[TokenSequence]:
    rule = SequenceRule(MAX_LENGTH, "truncate", True, True)
    return rule.sequences([story(n) for n in range(first, stop)], range(first, stop), tokenizer=TOKENIZER)[0]


def same(rows: Sequence[TextRow], sequences: Sequence[TokenSequence]) -> bool:
    return [(row.sequence.sample_index, row.sequence.start, row.sequence.ids.tolist()) for row in rows] == [
        (sequence.sample_index, sequence.start, sequence.ids.tolist()) for sequence in sequences
    ]


def loaders(rows: StreamRows, *, batch: int, world_size: int, skip: int = 0, workers: int = 0) -> list[DataLoader]:
    """Return what accelerate makes of the stream on each rank, `skip` batches of it passed over."""
    made = []
    for rank in range(world_size):
        shard = BatchSamplerShard(BatchSampler(SequentialSampler(rows), batch, drop_last=False), world_size, rank)
        made.append(DataLoader(rows, batch_sampler=SkipBatchSampler(shard, skip), collate_fn=list, num_workers=workers))
    return made


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
def test_a_stream_is_dealt_whole_and_without_repetition(tmp_path: Path, world_size: int, workers: int) -> None:
    texts = open_texts(tmp_path, max_samples=COUNT)
    rows = stream_rows(texts, tmp_path, first=FIRST, stop=COUNT, multiple=3 * world_size)
    found = [list(loader) for loader in loaders(rows, batch=3, world_size=world_size, workers=workers)]
    assert len({len(batches) for batches in found}) == 1  # every rank makes as many steps
    steps = list(zip(*found, strict=True))
    seen = [row for step in steps for batch in step for row in batch]
    assert same([row for row in seen if row.sequence.sample_index != NO_SAMPLE], expected(FIRST, COUNT))
    assert len(seen) == len(rows) and all(row.end is None for row in seen)
    assert all(not len(row.sequence.ids) for row in seen[COUNT - FIRST :])


def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks_nor_on_what_is_skipped(tmp_path: Path) -> None:
    texts, steps = open_texts(tmp_path, max_samples=COUNT), {}
    for batch, world_size in ((8, 1), (4, 2), (2, 4)):
        for skip in (0, 2):
            rows = stream_rows(texts, tmp_path, first=FIRST, stop=COUNT, multiple=batch * world_size)
            ranks = loaders(rows, batch=batch, world_size=world_size, skip=skip)
            steps[world_size, skip] = [
                [row.sequence.sample_index for part in step for row in part] for step in zip(*ranks, strict=True)
            ]
    whole = list(range(FIRST, COUNT))
    assert steps[1, 0] == [whole[n : n + 8] for n in range(0, 32, 8)]
    assert all(found == steps[1, 0][skip:] for (_, skip), found in steps.items())


def test_skipping_does_not_make_tokens_of_what_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    sequences = SequenceRule.sequences

    def counted(rule: SequenceRule, texts: Any, indices: Any, **named: Any) -> Any:
        made.extend(indices)
        return sequences(rule, texts, indices, **named)

    monkeypatch.setattr(SequenceRule, "sequences", counted)
    rows = stream_rows(open_texts(tmp_path, max_samples=COUNT), tmp_path, first=FIRST, stop=COUNT, multiple=4)
    (loader,) = loaders(rows, batch=4, world_size=1, skip=6)
    assert sum(len(batch) for batch in loader) == 8
    assert made == list(range(FIRST + 24, COUNT))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [13, 16, 17])
def test_every_rank_learns_where_a_stream_ended_before_any_step_that_has_nothing(
    tmp_path: Path, count: int, workers: int
) -> None:
    texts = open_texts(tmp_path, max_samples=100, count=count)
    rows = stream_rows(texts, tmp_path, first=FIRST, stop=100, multiple=4)
    ranks = loaders(rows, batch=2, world_size=2, workers=workers)
    for step, parts in enumerate(itertools.islice(zip(*ranks, strict=True), 5)):
        ends = [min((row.end for row in part if row.end is not None), default=None) for part in parts]
        said = [end is not None and end <= 4 * step for end in ends]
        assert said == [count - FIRST <= 4 * step] * 2
        assert all(end in (None, count - FIRST) for end in ends)
        there = [row.sequence.sample_index for part in parts for row in part]
        assert [index for index in there if index != NO_SAMPLE] == list(range(FIRST, count))[4 * step : 4 * step + 4]


def test_rows_at_hand_come_in_any_order_and_empty_and_short_texts_are_rows_too(tmp_path: Path) -> None:
    texts = open_texts(tmp_path, streaming=False, max_samples=None)
    rows, want = MapRows(texts, first=FIRST, stop=COUNT), expected(FIRST, COUNT)
    assert len(rows) == rows.samples == COUNT - FIRST
    assert any(len(sequence.ids) == 0 for sequence in want)
    order = np.random.default_rng(0).permutation(len(rows))
    assert same(rows.__getitems__(order.tolist()), [want[n] for n in order])
    assert same([rows[3]], [want[3]])


def test_pieces_of_long_documents_are_rows_as_in_a_cache(tmp_path: Path) -> None:
    texts = open_texts(tmp_path, streaming=False, max_samples=None, max_length=9, long_documents="split")
    rule = SequenceRule(9, "split", True, True)
    stories = [story(n) for n in range(FIRST, COUNT)]
    want, _ = rule.sequences(stories, range(FIRST, COUNT), tokenizer=TOKENIZER)
    pieces = texts.count_pieces(FIRST, COUNT)
    rows = MapRows(texts, first=FIRST, stop=COUNT, pieces=pieces)
    assert len(rows) == len(want) > 2 * rows.samples
    assert same(rows.__getitems__(range(len(rows))), want)
    assert same(rows.__getitems__([9, 8, 9]), [want[9], want[8], want[9]])


def test_the_held_out_rows_are_the_first_samples(tmp_path: Path) -> None:
    texts = open_texts(tmp_path, max_samples=COUNT)
    assert same(texts.first_rows(FIRST), expected(0, FIRST)) and texts.first_rows(0) == []


def test_an_id_that_the_teacher_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer and teacher do not belong together"):
        open_texts(tmp_path, vocab_size=50).first_rows(3)


def test_a_batch_has_a_label_for_each_position_with_a_next_token_and_says_where_its_rows_are_from() -> None:
    ids = [np.array([4, 5, 6]), np.array([], np.int64), np.array([7]), np.array([8, 9])]
    rows = [TextRow(TokenSequence(n, 10 * n, part)) for n, part in enumerate(ids)]
    batch = TextCollator(pad_token_id=2)([*rows, TextRow(TokenSequence(NO_SAMPLE, 0, ids[1]), 12)])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [2, 2, 2], [7, 2, 2], [8, 9, 2], [2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    none = IGNORE_INDEX
    assert batch["labels"].tolist() == [[none, 5, 6], [none] * 3, [none] * 3, [none, 9, none], [none] * 3]
    assert batch["target_positions"].tolist() == [0, 1, 9]
    assert torch.equal(batch["labels"].flatten()[batch["target_positions"] + 1], torch.tensor([5, 6, 9]))
    assert batch["sample_index"].tolist() == [0, 1, 2, 3, NO_SAMPLE]
    assert batch["row_start"].tolist() == [0, 10, 20, 30, 0]
    assert batch["stream_end"].tolist() == [NO_END] * 4 + [12]
