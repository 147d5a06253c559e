"""Batches of a shard, and a shard made from texts to columns that are read back."""

import itertools

import numpy as np
import pytest

from accel_distill.errors import ConfigError
from accel_distill.pipeline import batches, check_ids
from accel_distill.tokens import TokenSequence


def test_batches_hold_every_row_once_by_length_within_the_budget_of_padded_tokens():
    lengths = [7, 3, 3, 0, 12, 1, 3, 7, 40]
    found = batches(lengths, tokens_per_batch=14)
    assert found == [[1, 2, 6], [0, 7], [4], [8]]  # 3 x 3; 2 x 7; 12; 40 alone; rows 3 and 5 have no position


@pytest.mark.parametrize("budget", [1, 16, 100, 10_000])
def test_no_batch_is_over_the_budget_unless_it_is_one_row(budget):
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 60, 200)]
    found = batches(lengths, tokens_per_batch=budget)
    assert sorted(itertools.chain(*found)) == [i for i, length in enumerate(lengths) if length > 1]
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
        assert all(
            lengths[a] < lengths[b] or (lengths[a] == lengths[b] and a < b) for a, b in itertools.pairwise(batch)
        )


def test_an_id_beyond_the_teachers_vocabulary_is_refused_naming_the_sample():
    rows = [TokenSequence(0, 0, np.array([1, 6])), TokenSequence(8, 0, np.array([2, 7]))]
    check_ids(rows, vocab_size=8)
    with pytest.raises(ConfigError, match="sample 8: the tokenizer makes id 7, but the teacher's vocabulary has 7 ids"):
        check_ids(rows, vocab_size=7)
