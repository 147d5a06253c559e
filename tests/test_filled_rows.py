"""An epoch's last batches are filled with nothing: no process repeats a sample, or has a batch less."""

from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from made_cache import make_cache, make_rows
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from accel_distill.cache import CachedSample, TeacherCache
from accel_distill.collator import CachedLogitCollator
from accel_distill.filled_rows import FilledSampler, filled
from accel_distill.packs import PackedCache
from accel_distill.text_rows import NO_SAMPLE


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("cache")
    make_cache(path, make_rows([[n % 5 + 3] for n in range(17)]))
    return TeacherCache(path)


def batches(dataset: Any, *, batch: int, world_size: int) -> list[list[dict[str, torch.Tensor]]]:
    """Return the batches of each rank, as accelerate deals them."""
    made = filled(dataset, multiple=batch * world_size)
    sampler = FilledSampler(SequentialSampler(made.rows), made)
    assert len(sampler) == len(made) == len(list(sampler))
    ranks = []
    for rank in range(world_size):
        shard = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), world_size, rank)
        loader = DataLoader(made, batch_sampler=shard, collate_fn=CachedLogitCollator(pad_token_id=0))
        ranks.append(list(loader))
    return ranks


@pytest.mark.parametrize(("batch", "world_size"), [(4, 2), (3, 2), (1, 3), (2, 4), (8, 3)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_every_sample_comes_once_and_every_process_has_as_many_batches(
    cache: TeacherCache, batch: int, world_size: int, is_packed: bool
) -> None:
    items = list(range(2, 15))
    dataset = PackedCache(cache, items, most=cache.max_length) if is_packed else Subset(cache, items)  # type: ignore[type-var]
    ranks = batches(dataset, batch=batch, world_size=world_size)
    assert len({len(rank) for rank in ranks}) == 1
    seen = torch.cat([part["sample_index"] for rank in ranks for part in rank])
    assert sorted(seen[seen != NO_SAMPLE].tolist()) == sorted(cache.sample_indices[items].tolist())
    rows = sum(len(part["input_ids"]) for rank in ranks for part in rank)
    assert rows == len(filled(dataset, multiple=batch * world_size)) and rows % (batch * world_size) == 0
    positions = sum(len(part["target_positions"]) for rank in ranks for part in rank)
    assert positions == sum(len(cache[n].targets) for n in items)


def test_what_is_filled_in_has_no_token_and_the_rest_is_untouched(cache: TeacherCache) -> None:
    made = filled(cache, multiple=len(cache) + 2)
    assert len(made) == len(cache) + 2
    nothing: CachedSample = made[len(cache)]
    assert len(nothing.input_ids) == len(nothing.target_mask) == len(nothing.targets) == 0
    last, filled_in = made.__getitems__([len(cache) - 1, len(cache) + 1])
    assert last.sample_index == cache[len(cache) - 1].sample_index and filled_in.sample_index == NO_SAMPLE


def test_a_dataset_of_the_users_own_is_left_as_it_is() -> None:
    class Own(Dataset):
        def __len__(self) -> int:
            return 3

    own = Own()
    assert filled(own, multiple=2) is own
