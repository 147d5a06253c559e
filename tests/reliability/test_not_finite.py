"""Numbers that are not numbers: in the teacher's logits they stop the run or are left out, in training they stop it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl
from torch import Tensor
from trainer_run import cached_samples, make_trainer, ragged_ids, tiny_llama

from accel_distill.cache import TeacherCache
from accel_distill.collator import CachedLogitCollator
from accel_distill.config import RunConfig
from accel_distill.errors import NotFinite
from accel_distill.generate import generate
from accel_distill.losses import IGNORE_INDEX
from accel_distill.teacher import Teacher

TEXTS = [story(n) for n in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher and data."""
    place = tmp_path_factory.mktemp("not_finite")
    write_jsonl(place / "data.jsonl", TEXTS)
    make_teacher(place / "teacher")
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The cache of the teacher without a fault."""
    generate(config(place, place / "cache"))
    return place / "cache"


@pytest.fixture
def broken(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, but the teacher's logits are NaN, or one of them infinite, after the word "king"."""
    forward = Teacher.read

    def spoiled(self: Teacher, ids: Tensor, mask: Tensor, wanted: Tensor) -> Callable[[slice], Tensor]:
        logits_of, bad = forward(self, ids, mask, wanted), ids[:, :-1][wanted] == word()

        def spoil(part: slice) -> Tensor:
            logits = logits_of(part)
            logits[bad[part]] = float("nan")
            logits[bad[part], 5] = float("inf")
            return logits

        return spoil

    monkeypatch.setattr(Teacher, "read", spoiled)
    return place


def word() -> int:
    """Return the first id of " king", which some of the texts have."""
    return make_tokenizer()(" king")["input_ids"][0]


def config(place: Path, cache: Path, **teacher: str) -> RunConfig:
    dataset = {"max_samples": len(TEXTS), "eval_samples": 0}
    return run_config(place / "teacher", place / "data.jsonl", cache, teacher=teacher, dataset=dataset)


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
    broken: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotFinite):
        generate(config(broken, tmp_path / "cache"))
    with caplog.at_level("INFO"):
        manifest = generate(config(broken, tmp_path / "cache", on_nonfinite="skip"))
    generate(config(broken, tmp_path / "fresh", on_nonfinite="skip"))
    for name in ("manifest.json", "cache.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()

    left_out, samples = 0, list(TeacherCache(tmp_path / "cache"))
    for sample, good in zip(samples, TeacherCache(whole), strict=True):
        is_bad = sample.input_ids == word()
        assert torch.equal(sample.target_mask, good.target_mask & ~is_bad)
        kept = ~is_bad[:-1]
        assert torch.equal(sample.targets.to_dense(320), good.targets.to_dense(320)[kept])
        assert sample.teacher_entropy <= good.teacher_entropy
        left_out += int((good.target_mask & is_bad).sum())
    assert left_out > 5
    assert manifest["sums"]["nonfinite"] == left_out
    assert f", {left_out:,} left out for a logit that was not finite" in caplog.text

    batch = CachedLogitCollator(pad_token_id=0)(samples)
    after = (batch["input_ids"][:, :-1] == word()).nonzero()
    assert len(after) >= left_out
    assert (batch["labels"][after[:, 0], after[:, 1] + 1] == IGNORE_INDEX).all()


def test_where_all_is_finite_skip_makes_the_bytes_of_stop(place: Path, tmp_path: Path) -> None:
    manifests = []
    for how in ("stop", "skip"):
        generate(config(place, tmp_path / how, on_nonfinite=how))
        manifests.append((tmp_path / how / "manifest.json").read_bytes())
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
