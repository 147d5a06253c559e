"""`TeacherCache` gives back, in the order of the stream, what was written, and refuses everything else."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_cache import Row, make_cache, make_record, make_rows, same_targets, write_shards

from accel_distill import cache as cache_module
from accel_distill.cache import TeacherCache
from accel_distill.codec import Method
from accel_distill.deal import shard_name
from accel_distill.errors import CacheMismatch, ConfigError, DamagedCache
from accel_distill.manifest import read_record, write_manifest
from accel_distill.targets import SparseTargets

LENGTHS = [[9], [0], [1], [2], [17], [5], [0], [30], [3], [8], [4], [12], [6]]  # 13 samples
FIELDS = ("head_count", "head_ids", "head_values", "tail_count", "tail_ids", "tail_values")
SPLIT = [[9], [8, 8, 3], [0], [5], [8, 2], [1], [8, 8, 8, 5], [7]]  # pieces of at most 8


def check_all(cache: TeacherCache, rows: list[Row], *, vocab: int = 50) -> None:
    assert len(cache) == len(rows) > 0
    positions = 0
    for item, row in enumerate(rows):
        found = cache[item]
        assert found.sample_index == row.sample_index
        assert (found.input_ids.dtype, found.target_mask.dtype) == (torch.int64, torch.bool)
        assert found.input_ids.tolist() == row.ids.tolist()
        expected_mask = [True] * (len(row.ids) - 1) + [False] if len(row.ids) else []
        assert found.target_mask.tolist() == expected_mask
        assert len(found.targets) == sum(expected_mask)
        assert same_targets(found.targets, row.targets, vocab=vocab)
        assert (found.teacher_entropy, found.teacher_logprob) == (row.entropy, row.logprob)
        positions += len(found.targets)
    assert positions > 0


@pytest.mark.parametrize("method", ["threshold", "top_k", "random"])
def test_samples_come_back_as_they_were_written(method: Method, tmp_path: Path) -> None:
    rows = make_rows(LENGTHS, method=method)
    make_cache(tmp_path, rows, method=method)
    check_all(TeacherCache(tmp_path), rows)


@pytest.mark.parametrize(("lanes", "samples_per_shard"), [(1, 1), (1, 100), (2, 3), (3, 2), (5, 2), (20, 1)])
@pytest.mark.parametrize("lengths", [LENGTHS, SPLIT], ids=["one row each", "split"])
def test_items_are_in_the_order_of_the_stream_for_every_layout(
    lengths: list[list[int]], lanes: int, samples_per_shard: int, tmp_path: Path
) -> None:
    rows = make_rows(lengths)
    long_documents = "split" if lengths is SPLIT else "truncate"
    make_cache(tmp_path, rows, lanes=lanes, samples_per_shard=samples_per_shard, long_documents=long_documents)
    cache = TeacherCache(tmp_path)
    check_all(cache, rows)
    assert cache.sample_indices.tolist() == [row.sample_index for row in rows]
    assert cache.has_target.tolist() == [len(row.ids) > 1 for row in rows]
    assert cache.samples == len(lengths)


@pytest.mark.parametrize("vocab", [65_536, 65_537, 151_936, 262_208])
@pytest.mark.parametrize("method", ["threshold", "top_k", "random"])
def test_large_vocabularies_keep_every_id(method: Method, vocab: int, tmp_path: Path) -> None:
    every = np.random.default_rng(0).permutation(vocab)
    heads, tails = every, np.zeros(0, np.int64)
    count, tail_count = np.ones(vocab, np.int64), np.zeros(vocab, np.int64)
    values = np.full(vocab, {"threshold": 32, "top_k": 700, "random": 20}[method])
    if method == "random":
        tails, tail_count, values = np.roll(every, 1), count, np.full(vocab, 19)
    if method == "top_k":
        heads = np.stack([every, np.roll(every, 1), np.roll(every, 2)], axis=1).flatten()
        count, values = 3 * count, np.full(3 * vocab, 7000)
    tail_values = np.ones(len(tails), np.int64)
    arrays = dict(zip(FIELDS, (count, heads, values, tail_count, tails, tail_values), strict=True))
    parameter = {"threshold": 0.05, "top_k": 3, "random": 20}[method]
    targets = SparseTargets.from_arrays(arrays, method=method, parameter=parameter)
    ids = np.concatenate([np.arange(vocab), [0]])  # one more than there are targets
    make_cache(tmp_path, [Row(0, ids, targets, 0.0, 0.0)], vocab=vocab, method=method, max_length=len(ids))
    found = TeacherCache(tmp_path)[0]
    assert torch.equal(found.input_ids, torch.from_numpy(ids))
    for name in FIELDS:
        assert torch.equal(getattr(found.targets, name), getattr(targets, name)), name
    assert set(found.targets.head_ids.tolist()) == set(range(vocab))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    make_cache(path, make_rows(LENGTHS), lanes=2, samples_per_shard=3)
    return path


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "cache")


def test_an_item_beyond_the_end_is_an_index_error_and_a_negative_one_counts_from_it(made: Path) -> None:
    cache = TeacherCache(made)
    for item in (13, 1000, -14):
        with pytest.raises(IndexError, match=f"item {item} of a cache of 13"):
            cache[item]
    assert [cache[item].sample_index for item in (-1, -13, np.int64(4))] == [12, 0, 4]
    assert [sample.sample_index for sample in cache] == list(range(13))  # the old protocol of iteration ends by it


def test_it_says_what_it_is(made: Path) -> None:
    cache, record = TeacherCache(made), read_record(made)
    assert (cache.method, cache.parameter, cache.temperature) == ("threshold", 0.05, 1.5)
    assert (cache.vocab_size, cache.tokenizer_size, cache.max_length) == (50, 50, 128)
    assert (cache.path, cache.tokenizer_path) == (made, made / "tokenizer")
    assert (cache.identity, cache.cache_id) == (record.identity, record.cache_id)


def test_it_opens_no_shard_until_an_item_is_asked_for(copied: Path) -> None:
    for path in (copied / "shards").iterdir():
        path.write_bytes(b"nothing")
    cache = TeacherCache(copied)
    assert len(cache) == 13
    assert cache.sample_indices.tolist() == list(range(13))
    with pytest.raises(DamagedCache):
        cache[0]


@pytest.mark.parametrize("by_size", [True, False])
def test_it_keeps_a_few_shards_open_and_no_more(by_size: bool, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache(made)
    if by_size:
        monkeypatch.setattr(cache_module, "OPEN_BYTES", sum(sorted(cache.shard_bytes.tolist())[:3]) - 1)
    else:
        monkeypatch.setattr(cache_module, "MOST_OPEN", 2)
    for item in [0, 12, 5, 1, 7, 0, 3, 12]:
        assert cache[item].sample_index == item
        assert len(cache._open) <= 2
    assert len(cache._open) == 2


def test_a_shard_larger_than_all_that_may_stay_open_is_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_BYTES", 1)
    cache = TeacherCache(made)
    assert [cache[item].sample_index for item in range(13)] == list(range(13))
    assert len(cache._open) == 1


@pytest.mark.parametrize("method", ["threshold", "top_k", "random"])
def test_one_of_several_processes_reads_the_same_samples_each_alone(method: Method, tmp_path: Path) -> None:
    rows = make_rows(LENGTHS, method=method)
    make_cache(tmp_path, rows, lanes=2, samples_per_shard=3, method=method)
    cache = TeacherCache(tmp_path)
    cache.processes = 2
    check_all(cache, rows)
    assert not any(shard._blocks for shard in cache._open.values())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", ["threshold", "top_k", "random"])
def test_the_samples_of_a_batch_are_those_read_one_by_one(
    method: Method, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(LENGTHS, method=method)
    make_cache(tmp_path, rows, lanes=2, samples_per_shard=3, method=method)
    monkeypatch.setattr(cache_module, "MOST_OPEN", 2)  # of 6 shards: some are closed while a batch is read
    cache, alone = TeacherCache(tmp_path), TeacherCache(tmp_path)
    cache.processes = processes
    for items in ([7, 0, 12, 3, 4, 1, 6, 9], [1], [6, 1], [2, 2], []):
        samples = cache.__getitems__(items)
        assert len(samples) == len(items)
        for found, item in zip(samples, items, strict=True):
            expected = alone[item]
            assert found.sample_index == item and found.input_ids.tolist() == rows[item].ids.tolist()
            assert found.target_mask.tolist() == expected.target_mask.tolist()
            assert all(torch.equal(getattr(found.targets, name), getattr(expected.targets, name)) for name in FIELDS)
            stats = (found.teacher_entropy, found.teacher_logprob)
            assert stats == (expected.teacher_entropy, expected.teacher_logprob)
    assert len(cache._open) <= 2


def test_lengths_are_read_without_a_sample_and_leave_no_file_open(tmp_path: Path) -> None:
    rows = make_rows(SPLIT)
    make_cache(tmp_path, rows, lanes=2, samples_per_shard=2, max_length=8, long_documents="split")
    cache = TeacherCache(tmp_path)
    assert cache.lengths.tolist() == [len(row.ids) for row in rows]
    assert not cache._open
    assert pickle.loads(pickle.dumps(cache)).__dict__["lengths"].tolist() == cache.lengths.tolist()


def test_it_pickles_also_with_shards_open_and_works_in_worker_processes(made: Path) -> None:
    cache = TeacherCache(made)
    before = [cache[item].input_ids.tolist() for item in range(13)]
    assert [pickle.loads(pickle.dumps(cache))[item].input_ids.tolist() for item in range(13)] == before
    loader: Any = torch.utils.data.DataLoader(
        cache, batch_size=None, num_workers=2, multiprocessing_context="fork", shuffle=False
    )
    assert [sample.input_ids.tolist() for sample in loader] == before


def test_an_incomplete_cache_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_shards(make_record(tmp_path), make_rows(LENGTHS))
    with pytest.raises(CacheMismatch, match="is not complete .*; run the same generate command again"):
        TeacherCache(tmp_path)


def test_a_directory_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no cache.json"):
        TeacherCache(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        TeacherCache(str(tmp_path / "nowhere"))


def read_all(path: Path) -> None:
    cache = TeacherCache(path)
    for item in range(len(cache)):
        cache[item]


def test_a_shard_of_another_cache_is_refused(copied: Path, tmp_path: Path) -> None:
    other = make_rows(LENGTHS, vocab=40)
    make_cache(tmp_path / "other", other, lanes=2, samples_per_shard=3, vocab=40)
    name = shard_name(0, 1, 3)
    shutil.copy(tmp_path / "other" / "shards" / name, copied / "shards" / name)
    with pytest.raises(DamagedCache, match=f"{name}: its header_sha256 is .*, but manifest.json says"):
        read_all(copied)


def test_two_shards_that_changed_places_are_refused(copied: Path) -> None:
    first, second = (copied / "shards" / shard_name(0, lane, 3) for lane in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(DamagedCache, match="its header_sha256 is .*, but manifest.json says"):
        read_all(copied)


def test_a_shard_that_is_gone_is_named(copied: Path) -> None:
    (copied / "shards" / shard_name(1, 0, 3)).unlink()
    with pytest.raises(DamagedCache, match=rf"{shard_name(1, 0, 3)}: it cannot be opened \(No such file"):
        read_all(copied)


def test_a_flipped_byte_is_an_error_and_never_a_sample(copied: Path) -> None:
    path = copied / "shards" / shard_name(0, 0, 3)
    data = bytearray(path.read_bytes())
    data[-700] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedCache, match="do not have the hash"):
        read_all(copied)


@pytest.mark.parametrize(
    "column", ["sample_index", "entropy", "logprob", "target_mask", "row_tokens", "row_head_ids_bits", "tail_ids_bits"]
)
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_a_column_of_the_wrong_length_is_refused(
    column: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_columns(tmp_path, monkeypatch, lambda columns: columns.update({column: resized(columns[column], change)}))
    with pytest.raises(DamagedCache, match=f"column {column} has"):
        TeacherCache(tmp_path)[0]


def resized(values: np.ndarray, change: str) -> np.ndarray:
    return values[:-1] if change == "shorter" else np.concatenate([values, values[-1:]])


def forge_columns(path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Write a cache whose shards are consistent in every hash, with changed columns."""
    from accel_distill import pipeline

    real = pipeline.shard_bytes

    def forged(fields: Any, columns: dict[str, np.ndarray]) -> bytes:
        columns = dict(columns)
        change(columns)
        return real(fields, columns)

    monkeypatch.setattr(pipeline, "shard_bytes", forged)
    make_cache(path, make_rows(LENGTHS))


def set_first(column: str, value: int) -> Any:
    return lambda columns: columns[column].__setitem__(0, value)


def beyond_the_vocabulary(column: str) -> Any:
    """Turn a rank of 32 to 49 into one of 60 to 63, of as many bits."""

    def change(columns: dict[str, np.ndarray]) -> None:
        columns[column][np.flatnonzero(columns[column] >= 24)[0]] = 31

    return change


def one_target_more(columns: dict[str, np.ndarray]) -> None:
    """Let the last token of the first row carry a target."""
    byte, bit = divmod(int(columns["row_tokens"][0]) - 1, 8)
    columns["target_mask"][byte] |= 1 << bit


def move_the_first_target(columns: dict[str, np.ndarray]) -> None:
    """Give the last token of the first row the first one's target."""
    one_target_more(columns)
    columns["target_mask"][0] ^= 1


HOSTILE_VALUES: dict[str, tuple[Any, str]] = {
    "an input id beyond the vocabulary": (beyond_the_vocabulary("input_ids"), "column input_ids: rank 6[0-3], but"),
    "a head id beyond the vocabulary": (beyond_the_vocabulary("head_ids"), "column head_ids: rank 6[0-3], but"),
    "a symbol of more bits": (set_first("tail_ids", 160), "column tail_ids: its symbols need .* bits, and it has"),
    "a symbol of no value": (set_first("tail_ids", 255), "column tail_ids: symbol 255 stands for no value"),
    "weights above the total": (set_first("top_values", 255), "head values sum to 255 .* more than the total 32"),
    "a position without head": (set_first("head_count", 0), "head_count is 0"),
    "a head without position": (set_first("head_count", 3), "head_ids holds .* values where its counts say"),
    "other weights, so another tail": (set_first("top_values", 32), "tail_ids holds .* values where its counts say"),
    "more tokens in a row": (set_first("row_tokens", 10**9), "column row_tokens sums to .* and its header says"),
    "more heads in a row": (set_first("row_heads", 10**9), "column rest_values has 0 elements, expected 9999"),
    "more bits in a row": (set_first("row_tail_ids_bits", 2**32 - 1), "column tail_ids_bits has .* elements, expected"),
    "a target too many": (one_target_more, "target_mask says 9 targets in a row that says 8"),
    "a target at a last token": (move_the_first_target, "a row's last token carries a target, but has no next token"),
}


@pytest.mark.parametrize("kind", HOSTILE_VALUES)
def test_values_that_contradict_each_other_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = HOSTILE_VALUES[kind]
    forge_columns(tmp_path, monkeypatch, change)
    with pytest.raises(DamagedCache, match=words):
        read_all(tmp_path)
    several = TeacherCache(tmp_path)
    several.processes = 2
    with pytest.raises(DamagedCache, match=words):
        several.__getitems__(range(13))


def test_a_manifest_of_another_cache_is_refused(copied: Path, tmp_path: Path) -> None:
    record = make_cache(tmp_path / "other", make_rows(LENGTHS), samples_per_shard=5)
    write_manifest(record, total=13, stream_end="exhausted")
    shutil.copy(tmp_path / "other" / "manifest.json", copied / "manifest.json")
    with pytest.raises(DamagedCache, match=r"manifest.json: it belongs to the cache"):
        TeacherCache(copied)


def test_a_manifest_that_says_something_else_than_a_shard_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["shards"][0]["sequences"] += 1
    manifest["sums"]["sequences"] += 1
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCache, match="its sequences is 3, but manifest.json says 4"):
        read_all(copied)


@pytest.mark.parametrize("key", ["samples", "shards", "stream_end"])
def test_a_manifest_without_one_of_its_keys_is_refused(key: str, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest[key]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCache, match="manifest.json: it has not the keys of a manifest; delete it"):
        TeacherCache(copied)


# ---- of a cache that is not complete


def partial(path: Path, *gone: str, max_samples: int | None = 13) -> Path:
    """Take the manifest and some shards away."""
    (path / "manifest.json").unlink()
    for name in gone:
        (path / "shards" / name).unlink()
    (path / "plan.json").write_text(json.dumps({"max_samples": max_samples}))
    return path


def test_an_incomplete_cache_is_refused_unless_asked_for_and_then_has_what_is_there(copied: Path, made: Path) -> None:
    path = partial(copied, shard_name(0, 1, 3))  # samples 1, 3 and 5
    with pytest.raises(CacheMismatch, match="or train on what is there with cache.allow_partial=true"):
        TeacherCache(path)
    cache, whole = TeacherCache(path, allow_partial=True), TeacherCache(made)
    assert (cache.complete, whole.complete) == (False, True)
    assert (len(cache), cache.samples) == (10, 10)
    assert cache.sample_indices.tolist() == [0, 2, 4, 6, 7, 8, 9, 10, 11, 12]
    for item in range(len(cache)):
        expected = whole[cache[item].sample_index]
        assert torch.equal(cache[item].input_ids, expected.input_ids)
    assert cache.has_target.tolist() == [len(cache[item].targets) > 0 for item in range(len(cache))]


def test_a_complete_cache_is_the_same_with_and_without_allow_partial(made: Path) -> None:
    first, second = TeacherCache(made), TeacherCache(made, allow_partial=True)
    assert second.complete and first.content_sha256 == second.content_sha256 and len(first) == len(second) == 13


def test_a_partial_cache_is_pinned_to_what_was_there_at_the_start(copied: Path, made: Path) -> None:
    name = shard_name(0, 1, 3)
    cache = TeacherCache(partial(copied, name), allow_partial=True)
    shutil.copy(made / "shards" / name, copied / "shards" / name)
    for same in (cache, pickle.loads(pickle.dumps(cache))):
        assert (len(same), same.content_sha256) == (10, cache.content_sha256)
        assert [same[item].sample_index for item in range(10)] == [0, 2, 4, 6, 7, 8, 9, 10, 11, 12]
    later = TeacherCache(copied, allow_partial=True)
    assert len(later) == 13 and later.content_sha256 != cache.content_sha256
    assert later.content_sha256 == TeacherCache(made).content_sha256


@pytest.mark.parametrize(("max_samples", "samples"), [(13, 13), (14, 13), (15, 12), (None, 12)])
def test_a_short_shard_that_a_later_run_replaces_is_left_out(
    max_samples: int | None, samples: int, copied: Path
) -> None:
    """The last shard has 1 of 3 samples: it stays only if the plan ends the stream there."""
    cache = TeacherCache(partial(copied, max_samples=max_samples), allow_partial=True)
    assert cache.samples == samples


def test_a_cache_without_any_shard_is_refused_also_where_a_partial_one_is_allowed(tmp_path: Path) -> None:
    make_record(tmp_path)
    with pytest.raises(CacheMismatch, match="it has no shard"):
        TeacherCache(tmp_path, allow_partial=True)


def test_a_damaged_shard_of_a_partial_cache_is_named(copied: Path) -> None:
    (partial(copied) / "shards" / shard_name(0, 1, 3)).write_bytes(b"")
    with pytest.raises(DamagedCache, match=shard_name(0, 1, 3)):
        TeacherCache(copied, allow_partial=True)
