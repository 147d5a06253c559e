"""Samples of 0 to 4 tokens to batches written by hand."""

import pickle

import torch

from accel_distill.cache import CachedSample
from accel_distill.collator import CachedLogitCollator
from accel_distill.losses import IGNORE_INDEX
from accel_distill.targets import SparseTargets

PAD = 9
NO = IGNORE_INDEX


def make_sample(tokens: list[int], has_target: list[int], targets: list[dict[int, int]]) -> CachedSample:
    """Make a sample with `random` targets of 4 draws: one {id: count} a position, the teacher's top id first."""
    assert sum(has_target) == len(targets)
    heads = [next(iter(target.items())) for target in targets]
    tails = [item for target in targets for item in list(target.items())[1:]]
    return CachedSample(
        sample_index=0,
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        target_mask=torch.tensor(has_target, dtype=torch.bool),
        targets=SparseTargets(
            "random",
            4.0,
            head_count=torch.ones(len(targets), dtype=torch.int64),
            head_ids=torch.tensor([token for token, _ in heads], dtype=torch.int64),
            head_values=torch.tensor([count for _, count in heads], dtype=torch.int64),
            tail_count=torch.tensor([len(target) - 1 for target in targets], dtype=torch.int64),
            tail_ids=torch.tensor([token for token, _ in tails], dtype=torch.int64),
            tail_values=torch.tensor([count for _, count in tails], dtype=torch.int64),
        ),
        teacher_entropy=0.5 * len(targets),
        teacher_logprob=-1.5 * len(targets),
    )


LONG = make_sample([3, 1, 4, 2], [1, 0, 1, 0], [{1: 3, 5: 1}, {2: 0, 0: 2, 6: 2}])
SHORT = make_sample([5, 6], [1, 0], [{6: 4}])
EMPTY = make_sample([], [], [])
ONE_TOKEN = make_sample([7], [0], [])


def test_a_batch_is_the_one_written_by_hand() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([SHORT, LONG])
    expected = {
        "input_ids": [[5, 6, PAD, PAD], [3, 1, 4, 2]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[NO, 6, NO, NO], [NO, 1, NO, 2]],
        "target_positions": [0, 4, 6],
        "target_offsets": [0, 1, 3, 6],
        "target_ids": [6, 1, 5, 2, 0, 6],
        "target_weights": [1.0, 0.75, 0.25, 0.0, 0.5, 0.5],
        "teacher_entropy": [0.5, 1.0],
        "teacher_logprob": [-1.5, -3.0],
        "sample_index": [0, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert list(batch) == list(expected)  # input_ids first


def test_floats_are_float32_and_everything_else_is_int64() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([SHORT, LONG])
    floats = {name for name, tensor in batch.items() if tensor.dtype == torch.float32}
    assert floats == {"target_weights", "teacher_entropy", "teacher_logprob"}
    assert {batch[name].dtype for name in batch.keys() - floats} == {torch.int64}


def test_labels_are_as_many_as_targets_and_stand_one_place_after_them() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([LONG, EMPTY, SHORT, ONE_TOKEN])
    places = (batch["labels"] != IGNORE_INDEX).flatten().nonzero()[:, 0]
    assert len(places) == 3
    assert places.tolist() == (batch["target_positions"] + 1).tolist()
    assert (batch["labels"][:, 0] == IGNORE_INDEX).all()
    assert batch["target_positions"].tolist() == [0, 2, 8]


def test_a_token_that_equals_the_padding_is_a_token() -> None:
    batch = CachedLogitCollator(pad_token_id=6)([SHORT, LONG])
    assert batch["attention_mask"].sum().item() == 6
    assert batch["labels"][0].tolist() == [NO, 6, NO, NO]


def test_samples_without_tokens_or_targets_make_a_batch_of_one_column_without_targets() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([EMPTY, ONE_TOKEN])
    assert batch["input_ids"].tolist() == [[PAD], [7]]
    assert batch["attention_mask"].tolist() == [[1], [1]]  # nothing to attend to would be NaN
    assert batch["labels"].tolist() == [[NO], [NO]]
    assert batch["target_offsets"].tolist() == [0]
    for name in ("target_positions", "target_ids", "target_weights"):
        assert batch[name].shape == (0,), name
    assert batch["target_weights"].dtype == torch.float32


def test_a_batch_of_nothing_still_has_a_column() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([EMPTY])
    assert batch["input_ids"].tolist() == [[PAD]] and batch["labels"].tolist() == [[NO]]


def test_a_collator_pickles_for_dataloader_workers() -> None:
    collator = pickle.loads(pickle.dumps(CachedLogitCollator(pad_token_id=PAD)))
    assert collator([SHORT])["input_ids"].tolist() == [[5, 6]]


def test_a_packed_batch_is_the_one_written_by_hand() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([[SHORT, ONE_TOKEN, LONG], [LONG, SHORT]])
    expected = {
        "input_ids": [[5, 6, 7, 3, 1, 4, 2], [3, 1, 4, 2, 5, 6, PAD]],
        "position_ids": [[0, 1, 0, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 0]],
        "labels": [[NO, 6, NO, NO, 1, NO, 2], [NO, 1, NO, 2, NO, 6, NO]],
        "target_positions": [0, 3, 5, 7, 9, 11],
        "target_offsets": [0, 1, 3, 6, 8, 11, 12],
        "target_ids": [6, 1, 5, 2, 0, 6, 1, 5, 2, 0, 6, 6],
        "target_weights": [1.0, 0.75, 0.25, 0.0, 0.5, 0.5, 0.75, 0.25, 0.0, 0.5, 0.5, 1.0],
        "teacher_entropy": [0.5, 0.0, 1.0, 1.0, 0.5],
        "teacher_logprob": [-1.5, 0.0, -3.0, -3.0, -1.5],
        "sample_index": [0, 0, 0, 0, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert list(batch) == list(expected)


def test_a_packed_row_of_one_or_of_no_tokens_is_packed_too() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([[EMPTY], [SHORT]])
    assert batch["position_ids"].tolist() == [[0, 1], [0, 1]] and "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [[PAD, PAD], [5, 6]]
    assert CachedLogitCollator(pad_token_id=PAD)([[EMPTY]])["position_ids"].tolist() == [[0]]


def test_padding_is_a_document_of_its_own() -> None:
    batch = CachedLogitCollator(pad_token_id=PAD)([[LONG], [SHORT, ONE_TOKEN]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    wider = CachedLogitCollator(pad_token_id=PAD)([[LONG, LONG], [SHORT, ONE_TOKEN]])
    assert wider["position_ids"][1].tolist() == [0, 1, 0, 0, 1, 2, 3, 4]
