"""Counting lengths: which samples are chosen, how long they are, and how far a stream was read."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny import MAX_LENGTH, VOCAB, make_tokenizer, run_config, story, write_jsonl

from accel_distill import length_sample
from accel_distill.length_sample import LengthSample, sample_lengths, spread_by_length
from accel_distill.stream import TextStream
from accel_distill.tokens import SequenceRule

TEXTS = [f"{story(n)} {n}" if n % 11 != 7 else "" for n in range(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("lengths") / "data.jsonl", TEXTS)


def count(data: Path, *, wanted: int, seconds: float = 60, rule: str = "truncate", **dataset: object) -> LengthSample:
    """Sample the lengths of the file."""
    config = run_config(Path("none"), data, Path("none"), dataset=dataset).dataset
    return sample_lengths(
        TextStream(config),
        rule=SequenceRule(MAX_LENGTH, rule, True, True),
        tokenizer=make_tokenizer(),
        vocab_size=VOCAB,
        max_samples=config.max_samples,
        wanted=wanted,
        seconds=seconds,
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_where_all_samples_are_counted_the_lengths_are_those_of_the_tokenizer(streaming: bool, data: Path) -> None:
    found = count(data, wanted=1000, streaming=streaming, max_samples=120)
    assert (found.population, found.read) == (120, 120)
    assert sorted(found.texts) == sorted(TEXTS[:120]) and found.texts != TEXTS[:120]
    ids = [[*make_tokenizer()(text)["input_ids"], 1][:MAX_LENGTH] if text else [] for text in found.texts]
    assert found.tokens.tolist() == [len(row) for row in ids]
    assert found.positions.tolist() == [max(len(row) - 1, 0) for row in ids]
    assert found.id_counts.tolist() == np.bincount(np.concatenate(ids).astype(int), minlength=VOCAB).tolist()
    assert found.text_bytes == pytest.approx(np.mean([len(text) for text in TEXTS[:120]]))


@pytest.mark.parametrize("streaming", [True, False])
def test_the_chosen_samples_are_spread_over_the_whole_run(streaming: bool, data: Path) -> None:
    found = count(data, wanted=60, streaming=streaming, max_samples=250)
    assert (found.population, found.read, len(found.texts)) == (250, 250, 60)
    places = [TEXTS.index(text) for text in found.texts if text]
    assert max(places) < 250
    thirds = Counter(place * 3 // 250 for place in places)
    assert min(thirds.values()) >= 8 and len(thirds) == 3  # 20 expected of each


def test_a_stream_that_ends_before_the_cap_has_as_many_samples_as_it_has(data: Path) -> None:
    found = count(data, wanted=50, max_samples=10_000)
    assert (found.population, found.read) == (300, 300)


def test_where_the_time_is_up_the_rest_of_a_stream_is_taken_to_be_there(data: Path) -> None:
    found = count(data, wanted=1000, seconds=0, max_samples=10_000)
    assert (found.population, found.read) == (10_000, length_sample.LOOK_EVERY)
    assert len(found.row_lengths) == len(found.texts) == length_sample.TOKENISED_AT_ONCE


def test_a_split_document_has_the_positions_of_all_its_pieces(data: Path) -> None:
    whole, split = (count(data, wanted=1000, rule=rule) for rule in ("truncate", "split"))
    assert whole.texts == split.texts
    lengths = [len(make_tokenizer()(text)["input_ids"]) + 1 if text else 0 for text in split.texts]
    assert split.positions.tolist() == [max(length - 1, 0) for length in lengths]
    assert max(len(rows) for rows in split.row_lengths) > 1 and whole.positions.sum() < split.positions.sum()


def test_samples_are_taken_from_every_stratum_of_length() -> None:
    lengths = [50, 10, 40, 20, 30, 60, 80, 70]
    assert spread_by_length(lengths, 8) == [1, 3, 4, 2, 0, 5, 7, 6]
    assert [lengths[k] for k in spread_by_length(lengths, 4)] == [20, 40, 60, 80]
    assert [lengths[k] for k in spread_by_length(lengths, 1)] == [50]
    assert spread_by_length(lengths, 100) == spread_by_length(lengths, 8)
    assert spread_by_length([], 5) == []
