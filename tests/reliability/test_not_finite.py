"""Numbers that are not numbers: in the teacher's logits they stop the run or are left out, in training they stop it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl
from trainer_run import cached_samples, make_trainer, ragged_ids, tiny_llama
from transformers import AutoModelForCausalLM

from accel_distill.cache import TeacherCache
from accel_distill.collator import CachedLogitCollator
from accel_distill.errors import NotFinite
from accel_distill.generate import generate
from accel_distill.losses import IGNORE_INDEX

TEXTS = [story(n) for n in range(12)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that says NaN from the word "king" on, and one without fault, and data."""
    place = tmp_path_factory.mktemp("broken")
    write_jsonl(place / "data.jsonl", TEXTS)
    model = AutoModelForCausalLM.from_pretrained(make_teacher(place / "good"))
    model.get_input_embeddings().weight.data[word()] = float("nan")
    model.save_pretrained(place / "teacher")
    make_tokenizer().save_pretrained(place / "teacher")
    return place


def word() -> int:
    """Return the first id of " king", which some of the texts have."""
    return make_tokenizer()(" king")["input_ids"][0]


def config(place: Path, cache: Path, teacher: str = "teacher", **settings: str):
    dataset = {"max_samples": len(TEXTS), "eval_samples": 0}
    return run_config(place / teacher, place / "data.jsonl", cache, teacher=settings, dataset=dataset)


def test_logits_that_are_not_finite_stop_the_run_naming_shard_sample_and_position(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFinite) as caught:
        generate(config(broken, tmp_path / "cache"))
    message = str(caught.value)
    assert message.startswith("shard shard-00000")
    sample = int(message.split("of sample ")[1].split()[0])
    position = int(message.split("at position ")[1].split()[0])
    assert make_tokenizer()(TEXTS[sample])["input_ids"][position] == word()
    assert "teacher.on_nonfinite=skip" in message
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_run_that_stopped_goes_on_with_skip_and_leaves_the_positions_out(
    broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotFinite):
        generate(config(broken, tmp_path / "cache"))
    with caplog.at_level("INFO"):
        manifest = generate(config(broken, tmp_path / "cache", on_nonfinite="skip"))
    generate(config(broken, tmp_path / "fresh", on_nonfinite="skip"))
    for name in ("manifest.json", "cache.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()

    left_out, kept = 0, []
    for sample, good in zip(TeacherCache(tmp_path / "cache"), whole(broken, tmp_path), strict=True):
        ids = sample.input_ids.tolist()
        first = ids.index(word()) if word() in ids else len(ids)  # attention spreads NaN to all that comes after
        expected = [n < min(first, len(ids) - 1) for n in range(len(ids))]
        assert sample.target_mask.tolist() == expected
        left_out += sum(good.target_mask.tolist()) - sum(expected)
        assert sample.teacher_entropy == sample.teacher_entropy
        same = slice(0, sum(expected))
        found, want = sample.targets.to_dense(320), good.targets.to_dense(320)[same]
        torch.testing.assert_close(found.argmax(-1), want.argmax(-1))
        kept.append(sample)
    assert left_out > 20
    assert manifest["sums"]["nonfinite"] == left_out
    headers = json.loads((tmp_path / "cache" / "manifest.json").read_text())["shards"]
    assert sum(shard["nonfinite"] for shard in headers) == left_out
    assert f"{left_out:,} left out for a logit that was not finite" in caplog.text

    batch = CachedLogitCollator(pad_token_id=0)(kept)
    masked = [ids.index(word()) for ids in batch["input_ids"].tolist() if word() in ids]
    rows = [row for row, ids in enumerate(batch["input_ids"].tolist()) if word() in ids]
    assert rows
    for row, first in zip(rows, masked, strict=True):
        assert (batch["labels"][row, first + 1 :] == IGNORE_INDEX).all()


def whole(broken: Path, tmp_path: Path) -> TeacherCache:
    """Return the cache of the same teacher without its fault."""
    generate(config(broken, tmp_path / "good", teacher="good"))
    return TeacherCache(tmp_path / "good")


def test_where_all_is_finite_skip_makes_the_bytes_of_stop(broken: Path, tmp_path: Path) -> None:
    caches = {how: tmp_path / how for how in ("stop", "skip")}
    for how, cache in caches.items():
        generate(config(broken, cache, teacher="good", on_nonfinite=how))
    manifests = [(cache / "manifest.json").read_bytes() for cache in caches.values()]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_stops_training_and_names_its_samples(logging_steps: int, tmp_path: Path) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(16))
    samples[6] = replace(samples[6], teacher_entropy=float("nan"))
    trainer = make_trainer(tmp_path, batch=2, accumulation=2, steps=4, train=samples)
    trainer.args.logging_steps = logging_steps
    with pytest.raises(NotFinite, match=r"the loss is nan at step \d, on the samples \[(6, \d+|\d+, 6)\] of the cache"):
        trainer.train()


def test_no_checkpoint_is_saved_of_what_is_not_finite(tmp_path: Path) -> None:
    samples = cached_samples(tiny_llama(spread=0.3), ragged_ids(8))
    samples = [replace(sample, teacher_entropy=float("inf")) for sample in samples]
    trainer = make_trainer(tmp_path, batch=4, steps=2, train=samples)
    trainer.args.logging_steps = 100
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.state.save_steps = 1
    with pytest.raises(NotFinite, match="at step"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
