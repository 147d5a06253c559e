"""The benchmarks of targets and of reading: what they report is what was written, and a large vocabulary is small."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_distill.codec import offsets, tail_counts, total_weight
from accel_distill.shuffle import window_sampler
from bench import loader, targets
from bench.proxy import read_proxy

FIELDS = {
    *("source", "method", "parameter", "ids_per_position", "bytes_per_position", "input_ids_bytes_per_position"),
    *("variance", "mean_error_norm", "encode_positions_per_s", "decode_positions_per_s"),
}


@pytest.fixture(scope="module")
def small_proxy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 700 positions over 60 ids, in the layout of the real one; every 50th position has no head."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("proxy") / "proxy.npz"
    positions = 700
    p = rng.dirichlet(np.full(60, 0.2), positions)
    head = (p >= 0.06) & (np.arange(positions) % 50 != 0)[:, None]
    left = 1 - (p * head).sum(1)
    tail_count = np.maximum(1, np.floor(left / 0.06)).astype(np.int64)
    tails = [np.sort(rng.choice(60, min(n, 16), replace=False)) for n in tail_count]
    order = [np.flatnonzero(row)[np.argsort(-values[row])] for row, values in zip(head, p, strict=True)]
    np.savez(
        path,
        vocab_size=60,
        threshold=0.06,
        input_ids=rng.integers(0, 60, positions).astype(np.int32),
        head_count=head.sum(1).astype(np.uint8),
        head_ids=np.concatenate(order).astype(np.int32),
        head_probs=np.concatenate([values[ids] for ids, values in zip(order, p, strict=True)]).astype(np.float32),
        tail_count=np.array([len(ids) for ids in tails], np.uint8),
        tail_ids=np.concatenate(tails).astype(np.int32),
        unigram_counts=rng.integers(0, 100, 60).astype(np.int32),
    )
    return path


def test_the_proxys_ids_are_the_files_own_and_its_weights_fit_its_tails(small_proxy: Path) -> None:
    rows, file = read_proxy(small_proxy).rows, np.load(small_proxy)
    found = rows.targets
    without = file["head_count"] == 0
    assert without.sum() == 14
    assert (found["head_count"] == file["head_count"] + without).all()
    assert (found["tail_count"] == file["tail_count"] - without).all()
    heads, tails = offsets(found["head_count"]), offsets(found["tail_count"])
    theirs, their_tails = offsets(file["head_count"].astype(int)), offsets(file["tail_count"].astype(int))
    for i in range(700):
        mine = np.concatenate([found["head_ids"][heads[i] : heads[i + 1]], found["tail_ids"][tails[i] : tails[i + 1]]])
        own = [file["head_ids"][theirs[i] : theirs[i + 1]], file["tail_ids"][their_tails[i] : their_tails[i + 1]]]
        assert sorted(mine.tolist()) == sorted(np.concatenate(own).tolist())
    left = total_weight(0.06) - np.add.reduceat(found["head_values"], heads[:-1])
    assert (tail_counts(0.06)[left] == found["tail_count"]).all() and found["head_values"].min() >= 0


def test_each_row_of_the_proxy_has_one_token_more_than_targets(small_proxy: Path) -> None:
    rows, file = read_proxy(small_proxy).rows, np.load(small_proxy)
    assert np.diff(rows.tokens).tolist() == [341, 341, 21] and np.diff(rows.positions).tolist() == [340, 340, 20]
    next_ids = np.roll(rows.input_ids, -1)[rows.target_mask]
    assert next_ids.tolist() == file["input_ids"].tolist()


def test_the_bound_of_the_ids_is_the_one_worked_out_by_hand() -> None:
    arrays = {"head_ids": np.array([1, 1, 2, 3]), "tail_ids": np.array([5, 6, 7, 8]), "tail_count": np.array([3, 1])}
    assert targets.order_0_bits(arrays["head_ids"]) == pytest.approx(6)  # 2 x 1 bit, 2 x 2 bits
    assert targets.id_bound(arrays) == pytest.approx((6 + 8 - math.log2(6)) / 8)


def test_the_proxy_is_measured_from_its_own_file(small_proxy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = targets.measure_proxy(small_proxy)
    assert set(found) > FIELDS and found["variance"] is None
    rows = read_proxy(small_proxy).rows
    ids = len(rows.targets["head_ids"]) + len(rows.targets["tail_ids"])
    assert found["ids_per_position"] == ids / 700
    assert found["bytes_per_position"] > found["id_bytes_per_position"] > found["id_bound_bytes_per_position"] > 0
    assert f"{ids / 700:.2f} ids" in targets.proxy_report(found)


def test_a_large_vocabulary_takes_at_most_15_bytes_a_position_and_ids_are_near_their_bound(shared_data: Path) -> None:
    found = targets.measure_proxy(shared_data / "targets-proxy.npz")
    assert targets.total_bytes(found) <= 13.1
    assert found["id_bytes_per_position"] <= 1.1 * found["id_bound_bytes_per_position"]
    assert found["ids_per_position"] == pytest.approx(8.52, abs=0.01)


def test_the_teacher_is_measured_and_the_files_are_written(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    sweep = [("threshold", 0.06), ("threshold", 0.03), ("random", 50), ("top_k", 8)]
    monkeypatch.setattr(targets, "SWEEP", sweep)
    monkeypatch.setattr(targets, "HEAD", {"vocab_size": 600, "hidden_size": 16, "positions": 8})
    model, text = shared_data / "models" / "stories260K", shared_data / "text" / "tinystories_valid.jsonl"
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    arguments = ["--teacher", str(model), "--text", str(text), "--positions", "2500"]
    threads = torch.get_num_threads()
    assert targets.main([*arguments, "--json", str(out), "--plot", str(plot)]) == 0
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert [(row["method"], row["parameter"]) for row in found] == sweep
    assert all(set(row) > FIELDS and row["source"] == "teacher" for row in found)
    coarse, fine, draws, top = found
    assert fine["variance"] < coarse["variance"] < 1.1 * draws["variance"] and fine["variance"] < top["variance"]
    assert coarse["ids_per_position"] < 0.7 * draws["ids_per_position"]
    assert top["mean_error_norm"] > 5 * draws["mean_error_norm"]  # a bias, not a spread
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "at the variance of 50 random draws" in capsys.readouterr().out


def test_the_variance_of_draws_is_the_known_one(shared_data: Path) -> None:
    model, text = shared_data / "models" / "stories260K", shared_data / "text" / "tinystories_valid.jsonl"
    read = targets.read_text(model, text, positions=2500)
    p = read.logits.double().softmax(-1)
    found = targets.measure_teacher(read, "random", 50)
    assert found["variance"] == pytest.approx(float((1 - p.square().sum(-1)).mean()) / 50, rel=0.05)


def test_the_loaders_cache_holds_the_file_in_every_shard_and_is_read_in_trainings_order(
    small_proxy: Path, tmp_path: Path
) -> None:
    proxy = read_proxy(small_proxy)
    loader.make_cache(tmp_path / "cache", proxy, shards=3, repeat=2)
    results = loader.measure(tmp_path / "cache")
    assert {row["positions"] for row in results} == {3 * 2 * 700} and len(results) == 7
    assert all(row["positions_per_s"] > 0 and row["positions_per_cpu_s"] > 0 for row in results)
    cache = loader.TeacherCache(tmp_path / "cache")
    sampler = window_sampler(cache, seed=0, epoch=lambda: 0)
    assert sampler is not None and sorted(sampler) == list(range(18))
    sample = cache[7]  # row 1 of the first repetition, in the second shard
    assert sample.sample_index == 7
    assert sample.input_ids.tolist() == proxy.rows.input_ids[341:682].tolist()
    assert sample.targets.head_ids.tolist() == decoded_head_ids(proxy, first=340, last=680)


def test_the_loaders_student_says_for_which_part_of_its_time_it_waits(small_proxy: Path, tmp_path: Path) -> None:
    loader.make_cache(tmp_path / "cache", read_proxy(small_proxy), shards=3, repeat=2)
    for workers in (0, 1):
        found = loader.train(tmp_path / "cache", workers, steps=2, output=tmp_path / "run")
        assert found["case"].endswith(f" {workers} workers")
        assert 0 <= found["wait"] < 1 and 0 <= found["cpu_wait"] < 1 and found["positions_per_s"] > 0


def decoded_head_ids(proxy: loader.Proxy, *, first: int, last: int) -> list[int]:
    heads = offsets(proxy.rows.targets["head_count"])
    return proxy.rows.targets["head_ids"][heads[first] : heads[last]].tolist()
