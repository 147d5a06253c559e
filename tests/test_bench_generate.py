"""The benchmark of generation: what it writes, and that its pipeline's batches are those of its bare forward."""

import json
from pathlib import Path

import pytest
import torch

from accel_distill.teacher import Teacher
from bench import generate
from bench.generate import Sizes, main, make_shard, make_teacher, make_tokenizer, padded_batches, report

TINY = Sizes(vocab_size=700, hidden_size=12, layers=1, tokens_per_batch=256, head_chunk=64, samples=4)


def test_the_command_measures_both_and_writes_a_list_of_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process of the tests
    words = [word for name, value in vars(TINY).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["--json", str(tmp_path / "generate.json"), "--rounds", "2", "--shards", "2", *words]) == 0
    ratio, one, two = records = json.loads((tmp_path / "generate.json").read_text())
    assert [record["case"] for record in records] == ["generation_to_forward", "processes_1", "processes_2"]
    assert ratio["ratio"] == ratio["generation_seconds"] / ratio["forward_seconds"] > 0
    assert ratio["cpu_ratio"] == ratio["generation_cpu_seconds"] / ratio["forward_cpu_seconds"] > 0
    assert one["positions"] == two["positions"] == 2 * ratio["positions"] > 1000
    assert one["positions_per_second"] == one["positions"] / one["seconds"]
    assert capsys.readouterr().out.strip() == report(records)


def test_the_bare_forward_has_the_batches_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_teacher(TINY), make_tokenizer(TINY.vocab_size)
    seen: list[list[int]] = []
    run = Teacher.targets_for
    monkeypatch.setattr(
        Teacher,
        "targets_for",
        lambda self, rows, **named: seen.append([len(r.ids) for r in rows]) or run(self, rows, **named),
    )
    maker, record = generate.make_maker(tmp_path, TINY, model, tokenizer)
    assert generate.publish([make_shard(0, TINY)], maker, record) == sum(map(sum, seen)) - sum(map(len, seen))
    assert len(list(record.path.glob("shards/*.h5"))) == 1
    inputs = padded_batches(make_shard(0, TINY), TINY, tokenizer)
    assert [batch["attention_mask"].sum(dim=1).tolist() for batch in inputs] == seen
    deviation = float(model(**inputs[0]).logits.std(dim=-1).mean())
    assert 3 < deviation < 5
