"""Batches are the same whoever makes them, and what goes wrong in a worker is told as if there were none."""

import copy
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from made_cache import make_cache, make_rows
from test_text_rows import open_texts, stream_rows
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from accel_distill.cache import TeacherCache
from accel_distill.collator import CachedLogitCollator
from accel_distill.errors import DamagedCache, RunError
from accel_distill.packs import PackedCache
from accel_distill.shuffle import window_sampler
from accel_distill.text_collator import TextCollator
from accel_distill.text_rows import MapRows, StreamRows
from accel_distill.worker_batch import WorkerBatch

BATCH = 4
LENGTHS = [[1 + 7 * n % 23] for n in range(42)]


def plain(path: Path) -> Any:
    make_cache(path, make_rows(LENGTHS), samples_per_shard=8)
    return Subset(TeacherCache(path), range(3, 42))  # type: ignore[arg-type]


def packed(path: Path) -> Any:
    dataset = plain(path)
    return PackedCache(dataset.dataset, list(dataset.indices), most=30)


def texts(path: Path) -> Any:
    path.mkdir()
    return MapRows(open_texts(path, streaming=False), first=5, stop=37)


def stream(path: Path) -> Any:
    path.mkdir()
    return stream_rows(open_texts(path, max_samples=37), path, first=5, stop=37, multiple=BATCH)


MADE: dict[str, tuple[Callable[[Path], Any], int | None]] = {  # the dataset, and samples of a step by length
    "plain": (plain, None),
    "grouped": (plain, BATCH),
    "packed": (packed, None),
    "texts": (texts, None),
    "stream": (stream, None),
}


def loaded(name: str, path: Path, *, workers: int, **settings: Any) -> Any:
    """Return the loader that training would read of."""
    make, group = MADE[name]
    dataset = make(path)
    sampler = window_sampler(dataset, seed=0, epoch=lambda: 0, group=group)
    is_text = isinstance(dataset, MapRows | StreamRows)
    collate: Any = (TextCollator if is_text else CachedLogitCollator)(pad_token_id=0)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=workers, collate_fn=collate, **settings)
    return prepare_data_loader(loader, torch.device("cpu"), put_on_device=True)


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    """Whether two lists of batches are equal, bit for bit, in the order of their tensors too."""
    return len(found) == len(expected) and all(
        list(one) == list(other)
        and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", MADE)
def test_batches_are_the_same_with_and_without_workers_in_two_epochs_and_from_their_middle(
    name: str, tmp_path: Path
) -> None:
    alone = loaded(name, tmp_path / "0", workers=0)
    expected = list(alone)
    assert len(expected) >= 5 and all(batch["input_ids"].numel() for batch in expected)
    assert ("target_ids" in expected[0]) != (name in ("texts", "stream"))
    assert same(list(skip_first_batches(alone, 3)), expected[3:])
    for workers in (1, 2):
        loader = loaded(name, tmp_path / str(workers), workers=workers, persistent_workers=True)
        assert same(list(loader), expected)
        assert same(list(loader), expected)
        assert same(list(skip_first_batches(loader, 3)), expected[3:])


def test_a_pickled_batch_is_arrays_and_no_shared_memory() -> None:
    batch = WorkerBatch(ids=torch.arange(6).view(2, 3), weights=torch.rand(5)[::2], none=torch.zeros(0))
    for data in (bytes(ForkingPickler.dumps(batch)), pickle.dumps(batch)):
        assert b"torch.multiprocessing" not in data and b"rebuild" not in data
        found = pickle.loads(data)
        assert same([found], [batch])
        found["ids"] += 1  # memory of its own, that may be written to
        assert int(batch["ids"][0, 0]) == 0


def test_a_batch_can_be_pinned_and_moved_as_a_dict() -> None:
    batch = WorkerBatch(ids=torch.arange(3))  # what torch's pinning and accelerate's moving do with a mapping:
    assert same([copy.copy(batch)], [batch]) and copy.copy(batch)["ids"].data_ptr() == batch["ids"].data_ptr()
    assert same([type(batch)({name: tensor.to("cpu") for name, tensor in batch.items()})], [batch])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_one_sentence_also_from_a_worker(workers: int, tmp_path: Path) -> None:
    loader = loaded("plain", tmp_path / "cache", workers=workers)
    shard = sorted((tmp_path / "cache").rglob("*.h5"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCache) as raised:
        list(loader)
    assert str(raised.value).startswith(f"shard {shard}: its data do not have the hash")
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)


def test_an_error_of_several_lines_and_with_a_cause_keeps_its_own_message() -> None:
    error = RunError("Caught a cold")
    assert str(error) == "Caught a cold"
    try:
        try:
            raise DamagedCache("the cause")
        except DamagedCache as cause:
            raise DamagedCache("what: came\nof it") from cause
    except DamagedCache:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 3")
    with pytest.raises(DamagedCache, match=r"^what: came\nof it$"):
        wrapped.reraise()
