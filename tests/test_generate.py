"""The command that makes a cache: what is in it, resumed and grown to the same bytes, and refused in one sentence."""

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import MAX_LENGTH, make_teacher, make_tokenizer, run_config, shard_files, story, write_jsonl
from transformers import AutoModelForCausalLM

from accel_distill import generate as command
from accel_distill import shard_writer
from accel_distill.cache import TeacherCache
from accel_distill.config import RunConfig, resolved_yaml
from accel_distill.deal import shard_name
from accel_distill.errors import CacheMismatch, DiskGuard, RunError
from accel_distill.generate import generate, main
from accel_distill.inspect_cache import inspect_cache
from accel_distill.manifest import read_record, write_plan
from accel_distill.processes import World
from accel_distill.publish import sync_directory
from accel_distill.verify import verify_cache

TEXTS = [story(n) for n in range(60)]
SAMPLES = 30  # as run_config caps it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher and data."""
    path = tmp_path_factory.mktemp("generate")
    make_teacher(path / "teacher")
    write_jsonl(path / "data.jsonl", TEXTS)
    return path


@pytest.fixture
def config(place: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function from changes to a run with a cache of its own."""
    return lambda **changes: run_config(place / "teacher", place / "data.jsonl", tmp_path / "cache", **changes)


@pytest.fixture(scope="module")
def fresh(place: Path) -> Path:
    """A complete cache, for reading and copying."""
    generate(run_config(place / "teacher", place / "data.jsonl", place / "cache"))
    return place / "cache"


def expected_ids(text: str) -> list[int]:
    """The rule of the cache, written out: the tokenizer's ids and the end of text, cut at max_length."""
    return [*make_tokenizer()(text)["input_ids"], 1][:MAX_LENGTH] if text else []


def everything(cache: Path) -> dict[str, bytes]:
    """All bytes of a cache but the logs and the resolved configuration, which hold times, hosts and paths."""
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    names = {str(path.relative_to(cache)): path for path in files}
    return {n: path.read_bytes() for n, path in names.items() if not n.startswith("logs/") and n != "run.yaml"}


# ---- what is in a cache


def test_a_cache_has_every_sample_once_with_the_ids_of_the_tokenizer(fresh: Path) -> None:
    cache = TeacherCache(fresh)
    assert [sample.sample_index for sample in cache] == list(range(SAMPLES))
    for sample in cache:
        assert sample.input_ids.tolist() == expected_ids(TEXTS[sample.sample_index])
        length = len(sample.input_ids)
        assert sample.target_mask.tolist() == [True] * (length - 1) + [False] * (length > 0)
        assert len(sample.targets) == max(length - 1, 0)


def test_empty_and_cut_samples_are_counted(fresh: Path, place: Path) -> None:
    sums = json.loads((fresh / "manifest.json").read_text())["sums"]
    whole = [len(make_tokenizer()(text)["input_ids"]) + 1 for text in TEXTS[:SAMPLES] if text]
    assert sums["empty"] == sum(not text for text in TEXTS[:SAMPLES]) == 3
    assert sums["truncated"] == sum(length > MAX_LENGTH for length in whole) > 5
    assert sums["tokens"] == sum(min(length, MAX_LENGTH) for length in whole)
    assert sums["positions"] == sums["tokens"] - len(whole)
    assert sums["untargeted"] == 3


@torch.no_grad()
def teacher_logprobs(place: Path, ids: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    """(T - 1, 300) float64, from the model as the transformers library runs it, over the ids that exist."""
    model = AutoModelForCausalLM.from_pretrained(place / "teacher", dtype=torch.float32)
    logits = model(input_ids=ids[None]).logits[0, :-1, :300].double()
    return (logits / temperature).log_softmax(-1)


def test_targets_agree_with_the_teachers_own_distribution(fresh: Path, place: Path) -> None:
    cache, heads, positions = TeacherCache(fresh), 0, 0
    for sample in cache:
        if len(sample.input_ids) < 2:
            assert (sample.teacher_entropy, sample.teacher_logprob) == (0, 0)
            continue
        logprobs = teacher_logprobs(place, sample.input_ids)
        probs, weights = logprobs.exp(), sample.targets.to_dense(cache.vocab_size)
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)), rtol=0, atol=1e-6)
        assert weights[:, 300:].eq(0).all()
        large = probs >= 0.05 + 1e-5
        assert ((weights[:, :300] - probs).abs()[large] <= 1 / 32 + 1e-5).all()
        first = sample.targets.head_ids[sample.targets.head_count.cumsum(0) - sample.targets.head_count]
        assert torch.equal(first, probs.argmax(-1))
        entropy = -(probs * logprobs).sum()
        assert abs(sample.teacher_entropy - entropy) <= 1 / 512 + 1e-4
        true_next = logprobs.gather(1, sample.input_ids[1:, None]).sum()
        assert abs(sample.teacher_logprob - true_next) <= 1 / 512 + 1e-4
        heads, positions = heads + int(large.sum()), positions + len(weights)
    assert positions > 500 and heads > 400


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_targets_are_the_largest_probabilities(
    temperature: float, config: Callable[..., RunConfig], place: Path
) -> None:
    made = config(targets={"method": "top_k", "top_k": 5, "temperature": temperature}, dataset={"max_samples": 6})
    generate(made)
    cache, seen = TeacherCache(made.cache.path), 0
    assert (cache.method, cache.parameter, cache.temperature) == ("top_k", 5, temperature)
    for sample in cache:
        if len(sample.input_ids) > 1:
            probs = teacher_logprobs(place, sample.input_ids, temperature=temperature).exp()
            expected = probs.topk(5).values
            found = sample.targets.to_dense(300).double().topk(5).values
            torch.testing.assert_close(found, expected, rtol=1 / 2048, atol=1e-6)
            seen += len(expected)
    assert seen > 50


def test_random_targets_are_counts_of_draws(config: Callable[..., RunConfig]) -> None:
    made = config(targets={"method": "random", "draws": 10}, dataset={"max_samples": 6})
    generate(made)
    cache = TeacherCache(made.cache.path)
    weights = torch.cat([sample.targets.to_dense(320) for sample in cache])
    assert len(weights) > 50
    torch.testing.assert_close(weights * 10, (weights * 10).round())
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


def test_long_documents_can_be_split_and_every_next_token_has_one_target(config: Callable[..., RunConfig]) -> None:
    made = config(dataset={"long_documents": "split", "max_length": 8})
    manifest = generate(made)
    pieces: dict[int, list[int]] = {}
    for sample in TeacherCache(made.cache.path):
        ids = sample.input_ids.tolist()
        assert len(ids) <= 8
        known = pieces.setdefault(sample.sample_index, [])
        assert not known or known[-1] == ids[0]
        known += ids[1:] if known else ids
    whole = {n: [*make_tokenizer()(text)["input_ids"], 1] if text else [] for n, text in enumerate(TEXTS[:SAMPLES])}
    assert pieces == whole
    assert manifest["sums"]["sequences"] > 2 * SAMPLES == 2 * manifest["samples"]
    assert manifest["sums"]["positions"] == sum(max(len(ids) - 1, 0) for ids in whole.values())
    assert manifest["sums"]["truncated"] == 0


def test_the_ranks_of_ids_are_by_their_count_in_the_stream_whatever_the_cap(
    fresh: Path, config: Callable[..., RunConfig]
) -> None:
    counts = np.bincount([i for text in TEXTS for i in expected_ids(text)], minlength=320)
    order = sorted(range(320), key=lambda i: (-counts[i], i))
    assert read_record(fresh).ids_by_rank.tolist() == order
    made = config(dataset={"max_samples": 3, "eval_samples": 0})
    generate(made)
    assert read_record(made.cache.path).ids_by_rank.tolist() == order


def test_not_streaming_makes_the_same_samples_and_needs_no_cap(config: Callable[..., RunConfig], fresh: Path) -> None:
    made = config(dataset={"streaming": False})
    generate(made)
    assert shard_files(made.cache.path) == shard_files(fresh)


def test_without_a_cap_the_whole_dataset_is_cached(config: Callable[..., RunConfig]) -> None:
    made = config(dataset={"streaming": False, "max_samples": None})
    manifest = generate(made)
    assert (manifest["samples"], manifest["stream_end"]) == (60, "exhausted")
    assert [sample.sample_index for sample in TeacherCache(made.cache.path)] == list(range(60))


def test_a_cache_depends_on_no_path(place: Path, fresh: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "teacher", tmp_path / "moved")
    shutil.copy(place / "data.jsonl", tmp_path)
    generate(run_config(tmp_path / "moved", tmp_path / "data.jsonl", tmp_path / "cache"))
    assert everything(tmp_path / "cache") == everything(fresh)
    assert str(place).encode() not in b"".join(everything(fresh).values())


def test_the_resolved_configuration_is_written_beside_the_shards(fresh: Path, place: Path) -> None:
    expected = resolved_yaml(run_config(place / "teacher", place / "data.jsonl", fresh))
    assert (fresh / "run.yaml").read_text() == expected


def test_generate_opens_no_connection(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert generate(config())["samples"] == SAMPLES


# ---- any number of processes, in threads of this one


class ThreadWorld(World):
    """A rank that is a thread: what rank 0 makes is handed over in memory."""

    def from_main(self, make: Callable[[], Any]) -> Any:
        if self.is_main:
            try:
                HANDED["value"] = make()
            finally:
                HANDED["ready"].set()
        assert HANDED["ready"].wait(60)
        return HANDED["value"]

    def leave(self) -> None:
        pass


HANDED: dict[str, Any] = {}
Run = Callable[[RunConfig, int], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the transformers library loads a model it patches torch, which is not for threads."""
    lock, load_teacher = threading.Lock(), command.load_teacher

    def load(*arguments: Any, **settings: Any) -> Any:
        with lock:
            return load_teacher(*arguments, **settings)

    monkeypatch.setattr(command, "load_teacher", load)


@pytest.fixture
def generate_on(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `generate` on so many ranks at once and returns what each returned."""
    here = threading.local()
    monkeypatch.setattr(command, "start_processes", lambda: here.world)

    def one(config: RunConfig, rank: int, world_size: int) -> dict[str, Any]:
        here.world = ThreadWorld(rank, world_size, torch.device("cpu"), "NO")
        try:
            return generate(config)
        except BaseException:
            monkeypatch.setattr(command, "STALLED_AFTER", 0.0)  # as a launcher ends the others
            raise

    def on(config: RunConfig, world_size: int) -> list[dict[str, Any]]:
        HANDED.update(value=None, ready=threading.Event())
        with ThreadPoolExecutor(world_size) as pool:
            ranks = [pool.submit(one, config, rank, world_size) for rank in range(world_size)]
        failures = [str(rank.exception()) for rank in ranks if rank.exception()]
        assert not failures, failures
        return [rank.result() for rank in ranks]

    return on


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_world_size_makes_the_same_bytes(
    world_size: int, config: Callable[..., RunConfig], fresh: Path, generate_on: Run
) -> None:
    manifests = generate_on(config(), world_size)
    assert everything(config().cache.path) == everything(fresh)
    assert manifests == [manifests[0]] * world_size


def test_lanes_are_the_processes_of_the_first_run_and_stay(
    config: Callable[..., RunConfig], place: Path, tmp_path: Path, generate_on: Run
) -> None:
    made = config(cache={"lanes": None})
    generate_on(made, 3)
    assert read_record(made.cache.path).layout.lanes == 3
    before = everything(made.cache.path)
    for name in [shard_name(0, 1, 4), shard_name(2, 2, 2), "../manifest.json"]:
        (made.cache.path / "shards" / name).unlink()
    generate_on(made, 2)
    assert everything(made.cache.path) == before


# ---- resumed


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("gone", [[0], [7], [1, 2, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_a_run_that_died_is_finished_to_the_same_bytes_and_touches_nothing_else(
    gone: list[int], world_size: int, config: Callable[..., RunConfig], fresh: Path, generate_on: Run
) -> None:
    cache = config().cache.path
    shutil.copytree(fresh, cache)
    (cache / "manifest.json").unlink()
    shards = sorted((cache / "shards").iterdir())
    assert len(shards) == 8
    for n in gone:
        shards[n].unlink()
    kept = {path.name: path.stat().st_mtime_ns for n, path in enumerate(shards) if n not in gone}
    generate_on(config(), world_size)
    assert everything(cache) == everything(fresh)
    assert {name: (cache / "shards" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_crash_before_the_manifest_needs_no_teacher(
    config: Callable[..., RunConfig], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = config().cache.path
    shutil.copytree(fresh, cache)
    (cache / "manifest.json").unlink()
    monkeypatch.setattr(command, "load_teacher", None)
    generate(config())
    assert everything(cache) == everything(fresh)


def test_shards_deleted_from_a_complete_cache_are_made_anew(
    config: Callable[..., RunConfig], fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the message about a damaged shard says: delete it and run generate again."""
    cache = config().cache.path
    shutil.copytree(fresh, cache)
    (cache / "shards" / shard_name(1, 1, 4)).unlink()
    with caplog.at_level(logging.INFO):
        generate(config())
    assert everything(cache) == everything(fresh)
    assert "1 shard of the complete cache no longer there: made anew" in caplog.messages


def test_what_a_run_says(config: Callable[..., RunConfig], fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = config().cache.path
    shutil.copytree(fresh, cache)
    (cache / "manifest.json").unlink()
    (cache / "shards" / shard_name(1, 1, 4)).unlink()
    with caplog.at_level(logging.INFO):
        generate(config())
    first, second, last = caplog.messages
    assert first == f"1 process on cpu: opening {cache}"
    assert second == "already there: 7 shards with 26 samples"
    lines = last.splitlines()
    assert lines[0] == f"complete: {cache}"
    assert lines[1] == "  30 samples (to the sample cap): 3 empty, 17 cut at max_length"
    assert lines[2] == "  728 tokens, 701 positions with a target"
    assert lines[3].startswith("  8 shards, ")


def test_two_runs_at_once_on_one_cache_agree(config: Callable[..., RunConfig], fresh: Path) -> None:
    made = config()
    with ThreadPoolExecutor(2) as pool:
        manifests = [run.result() for run in [pool.submit(generate, made) for _ in range(2)]]
    assert manifests[0] == manifests[1]
    assert everything(made.cache.path) == everything(fresh)


def test_another_shard_under_the_name_of_ours_is_an_error(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = config(), shard_writer.publish

    def meanwhile(data: bytes, path: Path, *, scratch: Path) -> bool:
        if path.name == shard_name(1, 0, 4):
            path.write_bytes(b"another run was here")
        return real(data, path, scratch=scratch)

    monkeypatch.setattr(shard_writer, "publish", meanwhile)
    with pytest.raises(CacheMismatch, match=f"{shard_name(1, 0, 4)}: another run published it with other content"):
        generate(made)


def test_a_stream_that_changed_is_refused_on_resume(
    config: Callable[..., RunConfig], place: Path, tmp_path: Path
) -> None:
    """A dataset whose identity stays and whose text does not: here, by a changed record of it."""
    data = write_jsonl(tmp_path / "data.jsonl", TEXTS)
    made = run_config(place / "teacher", data, tmp_path / "cache")
    generate(made)
    (tmp_path / "cache" / "manifest.json").unlink()
    write_jsonl(data, [*TEXTS[:9], "changed", *TEXTS[10:]])
    with pytest.raises(
        CacheMismatch, match=r"dataset.data_files\[0\] is \['data.jsonl', .* in the cache and \['data.jsonl', "
    ):
        generate(made)
    same = run_config(place / "teacher", data, tmp_path / "other")
    source = json.loads((tmp_path / "cache" / "cache.json").read_text())["identity"]["dataset"]["source"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accel_distill.stream.TextStream.source", source)
        with pytest.raises(CacheMismatch, match=r"the stream changed: samples 9 to 15 \(lane 1, every 2\)"):
            generate(made)
    assert same.cache.path != made.cache.path


def test_ranks_that_never_publish_are_named_after_a_while(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "STALLED_AFTER", 0.5)
    alone = ThreadWorld(0, 2, torch.device("cpu"), "NO")
    monkeypatch.setattr(command, "start_processes", lambda: alone)
    HANDED.update(value=None, ready=threading.Event())
    with pytest.raises(RunError, match=r"4 of 8 shards are missing \(shard-000000-001-4.h5, .*run the same command"):
        generate(config())
    assert len(shard_files(config().cache.path)) == 4


# ---- grown


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("before", "after"), [(3, 30), (8, 9), (13, 30), (16, 24), (29, 60), (30, 1000)])
def test_a_cache_that_grew_is_that_of_a_fresh_run(
    before: int, after: int, world_size: int, config: Callable[..., RunConfig], tmp_path: Path, generate_on: Run
) -> None:
    cap: Callable[[int], RunConfig] = lambda n: config(dataset={"max_samples": n, "eval_samples": 0})  # noqa: E731
    generate_on(cap(before), 1)
    generate_on(cap(after), world_size)
    grown = everything(cap(after).cache.path)
    shutil.rmtree(cap(after).cache.path)
    generate_on(cap(after), 1)
    assert grown == everything(cap(after).cache.path)


def test_short_shards_left_by_a_crash_at_the_end_are_removed_by_the_next_run(
    config: Callable[..., RunConfig], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config(dataset={"max_samples": 5, "eval_samples": 0})
    generate(small)
    with monkeypatch.context() as patch:
        patch.setattr(command, "remove_superseded", lambda *_: [])
        generate(config())
    cache = config().cache.path
    assert set(shard_files(cache)) - set(shard_files(fresh)) == {shard_name(0, 0, 3), shard_name(0, 1, 2)}
    assert len(TeacherCache(cache)) == SAMPLES
    generate(config())
    assert everything(cache) == everything(fresh)


def test_a_manifest_of_less_than_the_plan_is_withdrawn_and_costs_no_shard(
    config: Callable[..., RunConfig], fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with a smaller cap, held before its manifest while another let the cache grow, may leave this."""
    cache = config().cache.path
    generate(config(dataset={"max_samples": 5, "eval_samples": 0}))
    for name, data in shard_files(fresh).items():
        (cache / "shards" / name).write_bytes(data)
    (cache / "plan.json").write_bytes((fresh / "plan.json").read_bytes())
    found = verify_cache(cache)
    assert (found["ok"], found["complete"]) == (True, False)
    assert "manifest.json is of 5 samples, plan.json of 30: not complete for its plan" in found["notes"]
    assert (inspect_cache(cache)["complete"], inspect_cache(cache)["samples"]) == (False, SAMPLES)
    monkeypatch.setattr(command, "load_teacher", None)
    assert generate(config())["samples"] == SAMPLES
    assert inspect_cache(cache)["complete"]
    assert everything(cache) == everything(fresh)
    assert "manifest.json says 5 samples, fewer than planned: withdrawn" in caplog.messages


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_whose_cache_grew_meanwhile_stops_before_its_manifest_and_deletes_nothing(
    goes_on: bool, config: Callable[..., RunConfig], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 5 samples is held between its last shard and its manifest while one of 30 begins, or ends too."""
    cache, sync = config().cache.path, command.sync_directory

    def meanwhile(path: Path) -> None:
        monkeypatch.setattr(command, "sync_directory", sync)
        sync(path)
        if goes_on:
            generate(config())
        else:
            write_plan(cache, max_samples=SAMPLES)

    monkeypatch.setattr(command, "sync_directory", meanwhile)
    with pytest.raises(CacheMismatch, match=r"another run lets it grow to max_samples 30 while this one made 5, which"):
        generate(config(dataset={"max_samples": 5, "eval_samples": 0}))
    assert (cache / "manifest.json").exists() == goes_on
    generate(config())
    assert everything(cache) == everything(fresh)


def test_a_run_does_not_wait_for_a_short_shard_that_a_larger_run_has_removed(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, listed = config().cache.path, command.listed_shards

    def grown(path: Path) -> set[tuple[int, int, int]]:
        if listed(path):
            write_plan(cache, max_samples=SAMPLES)
        return set()

    monkeypatch.setattr(command, "listed_shards", grown)
    monkeypatch.setattr(command, "STALLED_AFTER", 5.0)
    with pytest.raises(CacheMismatch, match="another run lets it grow to max_samples 30"):
        generate(config(dataset={"max_samples": 5, "eval_samples": 0}))


def test_a_short_shard_that_another_run_removes_while_it_is_looked_at_is_passed_over(
    config: Callable[..., RunConfig], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, asked = command.listed_shards, 0

    def shown(path: Path) -> set[tuple[int, int, int]]:
        nonlocal asked
        asked += 1
        return listed(path) | ({(0, 0, 1)} if asked > 1 else set())

    monkeypatch.setattr(command, "listed_shards", shown)
    assert generate(config())["samples"] == SAMPLES
    assert asked > 2
    assert everything(config().cache.path) == everything(fresh)


def test_a_manifest_that_a_smaller_run_wrote_at_the_last_moment_gives_way(
    config: Callable[..., RunConfig], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, cache, sync = config(dataset={"max_samples": 5, "eval_samples": 0}), config().cache.path, sync_directory
    generate(small)
    manifest = (cache / "manifest.json").read_bytes()

    def meanwhile(path: Path) -> None:
        (cache / "manifest.json").write_bytes(manifest)
        sync(path)

    monkeypatch.setattr(command, "sync_directory", meanwhile)
    assert generate(config())["samples"] == SAMPLES
    assert everything(cache) == everything(fresh)


def test_a_smaller_cap_is_refused_with_both_numbers(config: Callable[..., RunConfig], fresh: Path) -> None:
    shutil.copytree(fresh, config().cache.path)
    with pytest.raises(
        CacheMismatch, match=r"max_samples is 29, but cache .* was begun with 30, and a cache only grows"
    ):
        generate(config(dataset={"max_samples": 29}))
    assert everything(config().cache.path) == everything(fresh)


def test_a_cap_on_a_cache_begun_without_one_is_refused(config: Callable[..., RunConfig]) -> None:
    generate(config(dataset={"streaming": False, "max_samples": None}))
    with pytest.raises(CacheMismatch, match="max_samples is 50, but cache .* was begun with no limit"):
        generate(config(dataset={"max_samples": 50}))


def test_a_cache_whose_dataset_ended_cannot_grow(config: Callable[..., RunConfig]) -> None:
    generate(config(dataset={"max_samples": 100}))
    with pytest.raises(CacheMismatch, match="max_samples is 200, but the dataset ended after 60 samples"):
        generate(config(dataset={"max_samples": 200}))
    assert len(TeacherCache(config().cache.path)) == 60


# ---- other settings


OTHER: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "teacher.dtype": ({"teacher": {"dtype": "bfloat16"}}, "teacher.dtype is 'float32' in the cache and 'bfloat16'"),
    "teacher.tokens_per_batch": ({"teacher": {"tokens_per_batch": 64}}, "tokens_per_batch is 128 in the cache and 64"),
    "teacher.head_chunk": ({"teacher": {"head_chunk": 16}}, "head_chunk is 32 in the cache and 16"),
    "teacher.attn": (
        {"teacher": {"attn_implementation": "eager"}},
        "attn_implementation is None in the cache and 'eager'",
    ),
    "dataset.split": (
        {"dataset": {"split": "train[:40]", "streaming": False}},
        "split is 'train' in the cache and 'train[",
    ),
    "dataset.shuffle": ({"dataset": {"shuffle_files": 3}}, "shuffle_files is None in the cache and 3"),
    "dataset.max_length": ({"dataset": {"max_length": 16}}, "dataset.max_length is 32 in the cache and 16"),
    "dataset.long": ({"dataset": {"long_documents": "split"}}, "long_documents is 'truncate' in the cache and 'split'"),
    "dataset.eos": ({"dataset": {"append_eos": False}}, "append_eos is True in the cache and False"),
    "dataset.special": (
        {"dataset": {"add_special_tokens": False}},
        "add_special_tokens is True in the cache and False",
    ),
    "targets.method": ({"targets": {"method": "top_k"}}, "targets.method is 'threshold' in the cache and 'top_k'"),
    "targets.threshold": ({"targets": {"threshold": 0.06}}, "targets.threshold is 0.05 in the cache and 0.06"),
    "targets.temperature": ({"targets": {"temperature": 2.0}}, "targets.temperature is 1.0 in the cache and 2.0"),
    "targets.seed": ({"targets": {"seed": 1}}, "targets.seed is 0 in the cache and 1"),
    "cache.lanes": ({"cache": {"lanes": 3}}, "cache.lanes is 2 in the cache and 3"),
    "cache.shards": ({"cache": {"samples_per_shard": 5}}, "cache.samples_per_shard is 4 in the cache and 5"),
}


@pytest.mark.parametrize("key", OTHER)
def test_other_settings_are_refused_by_name_with_both_values(
    key: str, config: Callable[..., RunConfig], fresh: Path
) -> None:
    changes, words = OTHER[key]
    shutil.copytree(fresh, config().cache.path)
    with pytest.raises(CacheMismatch) as caught:
        generate(config(**changes))
    assert words in str(caught.value) and "name another cache.path" in str(caught.value)
    assert everything(config().cache.path) == everything(fresh)


def test_other_weights_data_or_tokenizers_are_refused(place: Path, fresh: Path, tmp_path: Path) -> None:
    shutil.copytree(fresh, tmp_path / "cache")
    make_teacher(tmp_path / "teacher", seed=1)
    for teacher, data, words in [
        (tmp_path / "teacher", place / "data.jsonl", "teacher.files"),
        (place / "teacher", write_jsonl(tmp_path / "data.jsonl", ["x"]), "dataset.data_files"),
        (place / "teacher", write_jsonl(tmp_path / "other.jsonl", TEXTS), "other.jsonl"),
    ]:
        with pytest.raises(CacheMismatch, match=words):
            generate(run_config(teacher, data, tmp_path / "cache"))
    same_weights = shutil.copytree(place / "teacher", tmp_path / "same")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(same_weights)
    with pytest.raises(CacheMismatch, match="tokenizer.size is 300 in the cache and 301"):
        generate(run_config(same_weights, place / "data.jsonl", tmp_path / "cache"))


def test_settings_that_change_no_number_may_change(config: Callable[..., RunConfig], fresh: Path) -> None:
    shutil.copytree(fresh, config().cache.path)
    changes: dict[str, dict[str, Any]] = {
        "dataset": {"eval_samples": 5, "streaming": False},
        "loss": {"ce_weight": 0.5},
    }
    generate(config(**changes, training={"learning_rate": 0.1}))
    assert everything(config().cache.path) == everything(fresh)


# ---- failures


def test_a_failure_of_the_writer_stops_the_run_with_its_own_error(
    config: Callable[..., RunConfig], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, published = shard_writer.publish, []

    def full(data: bytes, path: Path, *, scratch: Path) -> bool:
        published.append(path.name)
        if len(published) == 3:
            raise DiskGuard(f"{path}: no space is left on the disk")
        return real(data, path, scratch=scratch)

    monkeypatch.setattr(shard_writer, "publish", full)
    with pytest.raises(DiskGuard, match=f"{shard_name(1, 0, 4)}: no space is left"):
        generate(config())
    cache = config().cache.path
    assert list(shard_files(cache)) == [shard_name(0, 0, 4), shard_name(0, 1, 4)]
    assert not (cache / "manifest.json").exists()
    monkeypatch.undo()
    generate(config())
    assert everything(cache) == everything(fresh)


def test_a_failure_of_the_writer_is_seen_while_the_teacher_still_runs(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, computed = command.ShardMaker.compute, []

    def slow(self: Any, shard: Any, *, report: Callable[[int], None]) -> Any:
        computed.append(shard)
        for _ in range(500 if len(computed) == 2 else 0):  # the second shard takes 10 s, but is told of the first
            time.sleep(0.02)
            report(1)
        return real(self, shard, report=report)

    def broken(*_: Any, **__: Any) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command.ShardMaker, "compute", slow)
    monkeypatch.setattr(shard_writer, "publish", broken)
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        generate(config())
    assert len(computed) == 2 and time.monotonic() - begun < 8


def test_logits_that_are_not_finite_stop_the_run_naming_the_sample(
    place: Path, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    word = expected_ids(TEXTS[5])[0]
    model.get_input_embeddings().weight.data[word] = float("nan")
    model.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    with pytest.raises(RunError, match=r"the teacher's logits are not finite at position \d+ of sample \d+"):
        generate(run_config(tmp_path / "teacher", place / "data.jsonl", tmp_path / "cache"))
    assert not (tmp_path / "cache" / "manifest.json").exists()


# ---- the command


def write_run(config: RunConfig, path: Path) -> str:
    path.write_text(resolved_yaml(config))
    return str(path)


def test_the_command_makes_the_cache_and_returns_0(
    config: Callable[..., RunConfig], fresh: Path, tmp_path: Path
) -> None:
    assert main(["--config", write_run(config(), tmp_path / "run.yaml")]) == 0
    assert everything(config().cache.path) == everything(fresh)


BAD_INPUT: dict[str, tuple[list[str], int, str]] = {
    "run file": (["--config", "{place}/nowhere.yaml"], 2, "{place}/nowhere.yaml"),
    "data file": (["dataset.data_files={place}/nowhere.jsonl"], 2, "{place}/nowhere.jsonl"),
    "dataset directory": (["dataset.name={place}/nowhere", "dataset.data_files=null"], 2, "{place}/nowhere"),
    "column": (["dataset.text_column=body"], 2, "'body' is not there; the columns are ['text']"),
    "chat column": (["dataset.data_files={place}/chat.jsonl"], 2, "'text' holds a list (a chat?)"),
    "split": (["dataset.split=validation"], 2, "validation"),
    "empty dataset": (["dataset.data_files={place}/empty.jsonl"], 2, "empty"),
    "model path": (["teacher.model={place}/nowhere"], 2, "{place}/nowhere"),
    "no model": (["teacher.model={place}/bare"], 2, "{place}/bare"),
    "no tokenizer": (["teacher.model={place}/untold"], 2, "no tokenizer can be loaded from {place}/untold"),
    "max_length": (["dataset.max_length=65"], 2, "dataset.max_length is 65, but the teacher"),
    "cache path": (["cache.path={place}/data.jsonl/cache"], 2, "cache.path: {place}/data.jsonl/cache cannot be made"),
    "cache file": (["cache.path={place}/data.jsonl"], 2, "cache.path: {place}/data.jsonl cannot be made"),
    "other settings": (["targets.seed=7"], 5, "targets.seed is 0 in the cache and 7 in this run"),
    "smaller cap": (["dataset.max_samples=20"], 5, "dataset.max_samples is 20"),
    "no cap": (["dataset.max_samples=null"], 2, "max_samples MUST be specified for streaming datasets!"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_sentence_with_the_offending_word_and_its_exit_status(
    kind: str, place: Path, fresh: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "chat.jsonl").write_text(json.dumps({"text": [{"role": "user", "content": "hi"}]}) + "\n")
    (place / "empty.jsonl").write_text("")
    (place / "bare").mkdir(exist_ok=True)
    if not (place / "untold").exists():
        shutil.copytree(place / "teacher", place / "untold", ignore=shutil.ignore_patterns("tokenizer*"))
    run_file = write_run(run_config(place / "teacher", place / "data.jsonl", fresh), tmp_path / "run.yaml")
    arguments, status, words = BAD_INPUT[kind]
    before = everything(fresh)
    given = [argument.format(place=place) for argument in arguments]
    assert main(given if "--config" in given else ["--config", run_file, *given]) == status
    errors = capfd.readouterr().err
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words.format(place=place) in said[0]
    assert "Traceback" not in errors
    assert everything(fresh) == before


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_a_sharded_teacher_is_refused_before_anything_starts(
    name: str, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    monkeypatch.setattr(command, "start_processes", None)
    with pytest.raises(RunError, match=f"ACCELERATE_USE_{name} is set, but teacher.parallelism is replicate"):
        generate(config())


def test_settings_may_change_until_the_first_shard_is_there(
    config: Callable[..., RunConfig], fresh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = config().cache.path
    shutil.copytree(fresh, cache)
    (cache / "manifest.json").unlink()
    for shard in (cache / "shards").iterdir():
        shard.unlink()
    with caplog.at_level(logging.WARNING):
        generate(config(targets={"threshold": 0.06}, dataset={"max_samples": 8}))
    assert "the cache begins anew" in caplog.text
    assert len(list((cache / "shards").iterdir())) == 2


def test_only_empty_texts_are_a_cache_with_a_warning(
    config: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_jsonl(tmp_path / "empty.jsonl", ["", None, "", ""])
    with caplog.at_level(logging.WARNING):
        manifest = generate(config(dataset={"data_files": [str(data)]}))
    assert manifest["sums"]["positions"] == 0
    assert "no position carries a target" in caplog.text
