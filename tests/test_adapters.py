"""Adapters on a student: what is trained, what is saved and where it loads, going on, and what is refused."""

import json
import logging
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from test_train import HELD_OUT, VOCAB, configured, run  # noqa: F401
from tiny import make_teacher, make_tokenizer, story
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_distill import adapters
from accel_distill.adapters import ADAPTER_FILES, require_peft
from accel_distill.cache import TeacherCache
from accel_distill.config import LoraSection
from accel_distill.errors import ConfigError
from accel_distill.fused_head import FullLogits, FusedHead
from accel_distill.run_record import read_run_record
from accel_distill.train import train
from accel_distill.trainer import DistillationTrainer

LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def student(run: Path) -> Path:  # noqa: F811
    """A student to be adapted: another model of the teacher's kind, with its tokenizer."""
    return make_teacher(run / "student", vocab=VOCAB, seed=5)


@pytest.fixture(scope="module")
def adapted(run: Path, student: Path) -> Path:  # noqa: F811
    """The output of a run with adapters, with a checkpoint after every second step."""
    train(with_lora(run, student, run / "adapted", training={"save_strategy": "steps", "save_steps": 2}))
    return run / "adapted"


def test_the_record_counts_adapters_apart_from_the_student(adapted: Path, student: Path) -> None:
    recorded = read_run_record(adapted)["student"]
    assert recorded["parameters"] == AutoModelForCausalLM.from_pretrained(student).num_parameters()
    assert recorded["adapter_parameters"] == recorded["trained_parameters"] > 0


def with_lora(run: Path, student: Path, output: Path, **changes: dict[str, Any]) -> Any:  # noqa: F811
    """Return a run of adapters on the student; `lora` replaces LORA's keys."""
    section = {"config": None, "model": str(student), "lora": LORA | changes.pop("lora", {})}
    training = {"learning_rate": 3e-2} | changes.pop("training", {})
    return configured(run, output, student=section, training=training, **changes)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20)[None]).logits


def adapter_weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def test_adapters_alone_are_trained_and_load_in_peft_with_the_reported_metrics(
    run: Path,  # noqa: F811
    student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = {file.name: file.read_bytes() for file in student.glob("*.safetensors")}
    with caplog.at_level(logging.INFO, logger="accel_distill"):
        metrics = train(with_lora(run, student, tmp_path, training={"num_train_epochs": 3, "max_steps": -1}))
    # of each of two layers: q, k, v and o are 16 x 16, the other three 16 x 32
    trained = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 32))
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(student).parameters()) + trained
    share = f"({100 * trained / total:.2f} %)"
    assert f"adapters: {trained:,} of {total:,} parameters are trained {share}" in caplog.text
    assert "logits of all positions" not in caplog.text  # the head is fused
    assert not (tmp_path / "model.safetensors").exists()
    assert {file.name: file.read_bytes() for file in student.glob("*.safetensors")} == before
    assert sum(weight.numel() for weight in adapter_weights(tmp_path).values()) == trained
    base = AutoModelForCausalLM.from_pretrained(student)
    plain = logits(base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(loaded))
    assert not torch.allclose(logits(loaded), plain, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path)(story(3))["input_ids"] == make_tokenizer()(story(3))["input_ids"]
    cache, kd = TeacherCache(run / "cache"), 0.0
    for item in range(HELD_OUT):
        sample = cache[item]
        if len(sample.targets):
            with torch.no_grad():
                logprobs = torch.log_softmax(loaded(input_ids=sample.input_ids[None]).logits[0, :-1], dim=-1)
            kd -= float((sample.targets.to_dense(VOCAB) * logprobs).sum()) + sample.teacher_entropy
    assert metrics["eval_kl"] == pytest.approx(kd / metrics["eval_positions"], rel=1e-5)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    epoch = len(losses) // 3
    assert sum(losses[-epoch:]) < 0.95 * sum(losses[:epoch])


def test_merged_adapters_are_a_whole_student_for_plain_transformers(
    run: Path,  # noqa: F811
    student: Path,
    adapted: Path,
    tmp_path: Path,
) -> None:
    train(with_lora(run, student, tmp_path, lora={"merge": True}))
    assert not [name for name in ADAPTER_FILES if (tmp_path / name).exists()]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(merged, "peft_config") and type(merged).__name__ == "LlamaForCausalLM"
    names = set(load_file(student / "model.safetensors"))
    assert set(load_file(tmp_path / "model.safetensors")) == names
    torch.testing.assert_close(
        logits(merged), logits(AutoPeftModelForCausalLM.from_pretrained(adapted)), rtol=0, atol=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = merged.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert text.shape[1] > 2 and (tmp_path / "generation_config.json").exists()


def test_a_resumed_run_of_adapters_ends_as_an_uninterrupted_one(
    run: Path,  # noqa: F811
    student: Path,
    adapted: Path,
    tmp_path: Path,
) -> None:
    checkpoint = adapted / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    train(with_lora(run, student, tmp_path, training={"resume_from_checkpoint": str(checkpoint)}))
    whole, again, halfway = (adapter_weights(path) for path in (adapted, tmp_path, checkpoint))
    assert any(not torch.equal(whole[name], halfway[name]) for name in whole)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 8}, "student.lora.r is 8 in this run, and was 4 in "),
        ({"lora_alpha": 8}, "student.lora.lora_alpha is 8 in this run, and was 16 in "),
        ({"target_modules": ["q_proj"]}, r"student.lora.target_modules is \['q_proj'\] in this run, and was \['model"),
        (None, "has adapters, and this run has no student.lora; set it back"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(
    lora: dict[str, Any] | None,
    words: str,
    run: Path,  # noqa: F811
    student: Path,
    adapted: Path,
    tmp_path: Path,
) -> None:
    config = with_lora(run, student, tmp_path, lora=lora or {}, training={"resume_from_checkpoint": str(adapted)})
    if lora is None:
        config = config.model_copy(update={"student": config.student.model_copy(update={"lora": None})})
    with pytest.raises(ConfigError, match=words):
        train(config)


def heads_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that is given the head of every trainer."""
    heads: list[Any] = []
    make = DistillationTrainer._make_head
    monkeypatch.setattr(DistillationTrainer, "_make_head", lambda self: heads.append(make(self)) or heads[-1])
    return heads


def test_an_adapter_on_the_head_trains_through_full_logits_and_says_so(
    run: Path,  # noqa: F811
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    heads = heads_of(monkeypatch)
    train(with_lora(run, student, tmp_path, lora={"target_modules": ["q_proj", "lm_head"]}))
    assert [type(head) for head in heads] == [FullLogits]
    said = [record.getMessage() for record in caplog.records if "logits of all positions" in record.getMessage()]
    assert len(said) == 1 and "peft.tuners.lora.layer.Linear, not a plain nn.Linear" in said[0]
    trained = {name: float(w.abs().max()) for name, w in adapter_weights(tmp_path).items() if "lm_head.lora_B" in name}
    assert len(trained) == 1 and min(trained.values()) > 0
    assert logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)).shape == (1, 20, VOCAB)


def test_a_head_that_is_trained_whole_beside_adapters_is_fused_and_saved(
    run: Path,  # noqa: F811
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads, lora = heads_of(monkeypatch), {"modules_to_save": ["lm_head"], "lora_dropout": 0.0}
    fused = train(with_lora(run, student, tmp_path / "fused", lora=lora))
    monkeypatch.setattr("accel_distill.trainer.fuse_head", lambda *_: (None, "it is asked for"))
    full = train(with_lora(run, student, tmp_path / "full", lora=lora))
    assert [type(head) for head in heads] == [FusedHead, FullLogits]
    assert fused["eval_kl"] == pytest.approx(full["eval_kl"], rel=1e-5)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "fused")
    before = load_file(student / "model.safetensors")["lm_head.weight"]
    assert not torch.allclose(loaded.get_output_embeddings().weight, before, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing_in_the_adapters(
    reentrant: bool,
    run: Path,  # noqa: F811
    student: Path,
    adapted: Path,
    tmp_path: Path,
) -> None:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(with_lora(run, student, tmp_path, training=checkpointing))
    found, expected = adapter_weights(tmp_path), adapter_weights(adapted)
    largest = max(float(weight.abs().max()) for weight in expected.values())
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= 1e-6 * largest


def test_the_section_has_names_and_defaults_of_peft() -> None:
    theirs = {field.name: field for field in fields(LoraConfig)}
    for name, ours in LoraSection().model_dump(exclude={"merge", "target_modules"}).items():
        field = theirs[name]
        assert ours == (field.default_factory() if field.default is MISSING else field.default), name  # type: ignore[misc]


def test_modules_that_are_not_there_are_refused_in_a_sentence(
    run: Path,  # noqa: F811
    student: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="student.lora: Target modules .*qqq.* not found in the base model"):
        train(with_lora(run, student, tmp_path, lora={"target_modules": ["qqq"]}))


def test_without_peft_it_is_refused_with_the_command_that_installs_it(
    run: Path,  # noqa: F811
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_peft()
    monkeypatch.setattr(adapters, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs peft, which is not installed: pip install 'accel-distill\[lora\]'"):
        train(with_lora(run, student, tmp_path))


def test_the_base_is_named_so_that_it_is_found_from_everywhere(adapted: Path, student: Path) -> None:
    saved = json.loads((adapted / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(student.resolve())
    assert saved["task_type"] == "CAUSAL_LM"
