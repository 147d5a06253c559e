"""The command `accel_distill.train`, on a cache of a tiny teacher: what it writes, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from layout_run import deepspeed_settings
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import MAX_LENGTH, make_teacher, make_tokenizer, run_config, story, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_distill import __version__
from accel_distill.cache import CachedSample, TeacherCache
from accel_distill.cached_data import objective, split_items
from accel_distill.checkpoint_record import DataRecord, check_resumable, check_same_backend
from accel_distill.collator import CachedLogitCollator
from accel_distill.config import LossConfig, RunConfig, resolved_yaml
from accel_distill.deal import shard_name
from accel_distill.errors import CacheMismatch, ConfigError, DamagedCache, RunError
from accel_distill.generate import generate
from accel_distill.processes import check_backend
from accel_distill.run_record import read_run_record
from accel_distill.train import main, samples_of_a_step, train, training_arguments
from accel_distill.trainer import DistillationTrainer
from accel_distill.training_arguments import INTEGRATIONS

VOCAB = len(make_tokenizer())
SAMPLES = 41
HELD_OUT = 9  # of which one is empty
SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, its texts and a complete cache."""
    path = tmp_path_factory.mktemp("run")
    make_teacher(path / "teacher", vocab=VOCAB)
    write_jsonl(path / "texts.jsonl", [story(n) for n in range(SAMPLES)])
    generate(configured(path, path / "none"))
    return path


def configured(run: Path, output_dir: Path, **changes: dict[str, Any]) -> RunConfig:
    """Return a short training run on the cache in `run`; `changes` are sections, whose keys replace these."""
    sections: dict[str, dict[str, Any]] = {
        "dataset": {"max_samples": SAMPLES, "eval_samples": HELD_OUT},
        "student": {"config": SIZES},
        "training": {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
        },
    }
    merged = {name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
    path = merged.get("cache", {}).get("path", run / "cache")
    return run_config(run / "teacher", run / "texts.jsonl", path, **merged)


def results(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "all_results.json").read_text())


def test_training_writes_the_student_its_tokenizer_metrics_and_the_resolved_configuration(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(run, tmp_path)
    metrics = train(config)
    assert metrics == results(tmp_path)
    cache = TeacherCache(run / "cache")
    held_out = [len(cache[n].targets) for n in range(HELD_OUT)]
    assert metrics["eval_positions"] == sum(held_out) > 50
    assert metrics["eval_samples"] == HELD_OUT and 0 in held_out
    assert metrics["train_samples"] == cache.has_target[HELD_OUT:].sum() < SAMPLES - HELD_OUT
    assert (metrics["world_size"], metrics["distributed_type"]) == (1, "NO")
    assert metrics["eval_loss"] == metrics["eval_kl"] > 0  # kd_weight 1, ce_weight 0
    assert (tmp_path / "run.yaml").read_text() == resolved_yaml(config)
    assert sum(metrics["eval_calibration"]["positions"]) == metrics["eval_positions"]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "kd" in line and "ce" in line] == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    assert f"{metrics['eval_kl']:.4f}" in printed and str(tmp_path) in printed


def test_an_evaluation_of_the_last_step_is_not_made_again(run: Path, tmp_path: Path) -> None:
    metrics = train(configured(run, tmp_path / "twice", training={"eval_strategy": "steps", "eval_steps": 2}))
    log = json.loads((tmp_path / "twice" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "eval_ce" in line] == [2, 4]
    plain = train(configured(run, tmp_path / "once"))
    same = [name for name in plain if name.startswith("eval_") and "second" not in name and name != "eval_runtime"]
    assert {"eval_ce", "eval_ece", "eval_calibration", "eval_samples"} <= set(same)
    assert {name: metrics[name] for name in same} == {name: plain[name] for name in same}
    last = [line for line in log if "eval_ce" in line][-1]
    assert metrics["eval_ce"] == last["eval_ce"] != log[2]["eval_ce"]


def test_training_records_with_what_it_ran_and_what_it_read(run: Path, tmp_path: Path) -> None:
    train(configured(run, tmp_path))
    record, cache = read_run_record(tmp_path), TeacherCache(run / "cache")
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["accel_distill"] == __version__
    assert set(record["versions"]) >= {"python", "transformers", "accelerate", "datasets", "tokenizers"}
    assert record["machine"]["cores"] == os.cpu_count() and record["machine"]["memory_bytes"] > 1e8
    assert record["machine"]["processor"] and len(record["machine"]["gpus"]) == torch.cuda.device_count()
    assert (record["world_size"], record["distributed_type"], record["full_logits"]) == (1, "NO", None)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert record["student"]["parameters"] == record["student"]["trained_parameters"] == student.num_parameters()
    assert record["cache"]["identity"] == cache.identity and record["cache"]["cache_id"] == cache.cache_id
    assert record["cache"]["samples"] == SAMPLES and record["cache"]["complete"] is True
    assert record["cache"]["positions"] == sum(len(sample.targets) for sample in cache)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["started"])
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    positions = [line["positions"] for line in log if "positions" in line]
    assert len(positions) == 4 and sum(positions) == pytest.approx(4 * 4 * 18, rel=0.5)


def test_the_log_covers_the_last_steps_although_they_are_fewer_than_logging_steps(run: Path, tmp_path: Path) -> None:
    found = []
    for every in (1, 3, 10):
        training = {"logging_steps": every, "data_seed": 1}
        metrics = train(configured(run, tmp_path / str(every), training=training))
        assert "positions" not in metrics and "kd" not in metrics
        log = json.loads((tmp_path / str(every) / "trainer_state.json").read_text())["log_history"]
        lines = [(line["step"], line["positions"]) for line in log if "positions" in line]
        found.append((lines[-1][0], sum(count for _, count in lines)))
    assert found[0][0] == 4 and found[0] == found[1] == found[2]


def test_the_saved_student_loads_in_plain_transformers_and_has_the_reported_metrics(run: Path, tmp_path: Path) -> None:
    metrics = train(configured(run, tmp_path, loss={"kd_weight": 0.5, "ce_weight": 0.5}))
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert student.config.vocab_size == VOCAB
    assert student.config.eos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer(story(3))["input_ids"] == make_tokenizer()(story(3))["input_ids"]
    cache = TeacherCache(run / "cache")
    kd = ce = 0.0
    for item in range(HELD_OUT):
        sample = cache[item]
        if len(sample.targets):
            with torch.no_grad():
                logprobs = torch.log_softmax(student(input_ids=sample.input_ids[None]).logits[0, :-1], dim=-1)
            kd -= float((sample.targets.to_dense(VOCAB) * logprobs).sum()) + sample.teacher_entropy
            ce -= float(logprobs.gather(1, sample.input_ids[1:, None]).sum())
    assert metrics["eval_kl"] == pytest.approx(kd / metrics["eval_positions"], rel=1e-5)
    assert metrics["eval_ce"] == pytest.approx(ce / metrics["eval_positions"], rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx((metrics["eval_kl"] + metrics["eval_ce"]) / 2)


def test_two_launched_processes_end_with_the_weights_and_metrics_of_one(run: Path, tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 2}
    expected = train(configured(run, tmp_path / "one", training=epochs))
    assert expected["train_samples"] % 4 == 1  # so that in an epoch's last step one process has nothing
    config = configured(run, tmp_path / "two", training={"per_device_train_batch_size": 2, **epochs})
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "accel_distill.train", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path / "two")
    assert (found["world_size"], found["distributed_type"]) == (2, "MULTI_CPU")
    for key in ("kl", "ce", "teacher_ce", "top1_agreement", "ece", "loss", "positions"):
        assert found[f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-4), key
    one = load_file(tmp_path / "one" / "model.safetensors")
    two = load_file(tmp_path / "two" / "model.safetensors")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)  # AdamW makes much of rounding
    assert done.stdout.count("KL(teacher || student)") == 1  # the table: rank 0 only


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_an_accelerate_file_as_it_is_trains_in_bfloat16_as_one_process_does(
    name: str, run: Path, tmp_path: Path
) -> None:
    expected = train(configured(run, tmp_path / "one", training={"bf16": True}))
    config = configured(run, tmp_path / "two", training={"per_device_train_batch_size": 2, "bf16": True})
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    command = [str(ROOT / "launch" / "train.sh"), "2", "--config", str(tmp_path / "run.yaml")]
    file = str(ROOT / "configs" / "accelerate" / f"{name}.yaml")
    environment = {**os.environ, "ACCELERATE_CONFIG": file, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(tmp_path / "two")
    assert (found["world_size"], found["distributed_type"]) == (2, "DEEPSPEED")
    first, same = (
        json.loads((tmp_path / path / "trainer_state.json").read_text())["log_history"][0] for path in ("two", "one")
    )
    for key in ("kd", "ce", "kl", "teacher_ce"):  # targets and sums stay float32
        assert first[key] == pytest.approx(same[key], rel=2e-3), key
    for key in ("kl", "ce", "teacher_ce"):
        assert found[f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-2), key


WITHOUT_COMPILING = """
import deepspeed
from accel_distill.stopping import end
from accel_distill.train import main
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
end(main())
"""


@pytest.mark.slow
def test_zero3_asked_for_in_the_run_file_starts_and_ends_with_the_weights_of_one_process(
    run: Path, tmp_path: Path
) -> None:
    plain = {"optim": "sgd", "learning_rate": 0.5}
    expected = train(configured(run, tmp_path / "one", training=plain))
    deepspeed = deepspeed_settings(3)
    training = plain | {"per_device_train_batch_size": 2, "deepspeed": deepspeed}
    for name, changes in [
        ("scratch", {}),
        ("pretrained", {"student": {"config": None, "model": str(tmp_path / "one")}}),
    ]:
        settings = training if name == "scratch" else training | {"learning_rate": 0.0, "max_steps": 1}
        config = configured(run, tmp_path / name, training=settings, **changes)
        (tmp_path / f"{name}.yaml").write_text(resolved_yaml(config))
        (tmp_path / "main.py").write_text(WITHOUT_COMPILING)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "main.py")]
        command = [sys.executable, *launch, "--config", str(tmp_path / f"{name}.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found = results(tmp_path / name)
        assert (found["world_size"], found["distributed_type"]) == (2, "DEEPSPEED")
        assert found["eval_kl"] == pytest.approx(expected["eval_kl"], rel=1e-5)
        one = load_file(tmp_path / "one" / "model.safetensors")
        two = load_file(tmp_path / name / "model.safetensors")
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=0, atol=1e-5)


def test_a_student_that_is_the_teacher_has_its_cross_entropy_and_almost_no_kl(run: Path, tmp_path: Path) -> None:
    teacher = {"config": None, "model": str(run / "teacher")}
    metrics = train(configured(run, tmp_path, student=teacher, training={"learning_rate": 0.0, "max_steps": 1}))
    assert metrics["eval_top1_agreement"] == 1.0
    assert metrics["eval_ce"] == pytest.approx(metrics["eval_teacher_ce"], abs=1e-3)
    assert abs(metrics["eval_kl"]) < 0.1  # by sampling; an untrained student has more than 0.5
    stranger = train(configured(run, tmp_path, training={"learning_rate": 0.0, "max_steps": 1}))
    assert stranger["eval_kl"] > 0.5


def test_temperature_and_method_are_taken_from_the_cache(run: Path, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "targets": {"method": "top_k", "top_k": 16, "temperature": 2.0},
        "cache": {"path": tmp_path / "cache"},
        "student": {"config": None, "model": str(run / "teacher")},
        "training": {"learning_rate": 0.0, "max_steps": 1},
    }
    generate(configured(run, tmp_path, **changes))
    metrics = train(configured(run, tmp_path / "out", **changes | {"targets": {}}))
    assert metrics["eval_positions"] > 50
    assert abs(metrics["eval_kl"]) < 1e-3  # another temperature or divergence gives the teacher more than 0.1


def test_a_top_k_cache_allows_other_divergences_and_the_run_file_has_to_say_top_k(run: Path, tmp_path: Path) -> None:
    made: dict[str, dict[str, Any]] = {
        "targets": {"method": "top_k", "top_k": 16},
        "cache": {"path": tmp_path / "cache"},
        "loss": {"divergence": "jsd", "jsd_beta": 0.3, "ce_weight": 0.1},
    }
    generate(configured(run, tmp_path, **made))
    metrics = train(configured(run, tmp_path / "out", **made))
    assert 0 < metrics["eval_kd"] < metrics["eval_kl"]
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd"] + 0.1 * metrics["eval_ce"])
    with pytest.raises(ValidationError, match="jsd cannot be taken from threshold targets"):
        configured(run, tmp_path / "out", **made | {"targets": {}})
    with pytest.raises(CacheMismatch, match="targets.method is top_k, but the cache .* threshold"):
        train(configured(run, tmp_path / "out", **made | {"cache": {}}))
    pair = LossConfig(divergence="tvd"), TeacherCache(run / "cache")
    with pytest.raises(ConfigError, match="section loss: tvd cannot be taken from threshold targets"):
        objective(*pair)


def test_distillation_and_the_ce_baseline_both_learn_what_they_are_asked_to(run: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 30}
    kd = train(configured(run, tmp_path, training=settings))
    ce = train(configured(run, tmp_path, loss={"kd_weight": 0.0, "ce_weight": 1.0}, training=settings))
    start = train(configured(run, tmp_path, training={"learning_rate": 0.0, "max_steps": 1}))
    assert kd["eval_kl"] < start["eval_kl"] - 0.1 and ce["eval_ce"] < start["eval_ce"] - 0.1
    assert kd["eval_kl"] < ce["eval_kl"]


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert train(configured(run, tmp_path / "whole", training=saving))["train_runtime_before"] == 0
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = saving | {"resume_from_checkpoint": checkpoint}
    metrics = train(configured(run, tmp_path / "resumed", training=resumed))
    assert 0 < metrics["train_runtime_before"] < metrics["train_runtime"]  # of all steps, and not of the last ones
    assert "s of them before the checkpoint); the student is in" in capsys.readouterr().out
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halfway = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    again = load_file(tmp_path / "resumed" / "model.safetensors")
    assert any(not torch.equal(whole[name], halfway[name]) for name in whole)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_student_from_scratch_takes_vocabulary_special_ids_and_seed_from_cache_and_training(
    run: Path, tmp_path: Path
) -> None:
    frozen = {"learning_rate": 0.0, "max_steps": 1}
    weights = []
    for seed in (1, 1, 2):
        train(configured(run, tmp_path, training=frozen | {"seed": seed}))
        weights.append(load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    assert weights[0].shape == (VOCAB, 16)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_wider_padded_vocabulary_trains(run: Path, tmp_path: Path) -> None:
    metrics = train(configured(run, tmp_path, student={"config": SIZES | {"vocab_size": VOCAB + 64}}))
    assert metrics["eval_positions"] > 50
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.out_features == VOCAB + 64


def test_without_held_out_samples_it_trains_on_all_and_reports_no_evaluation(run: Path, tmp_path: Path) -> None:
    (tmp_path / "all_results.json").write_text('{"eval_kl": 0.5}')  # of an older run
    metrics = train(configured(run, tmp_path, dataset={"eval_samples": 0}))
    assert metrics == results(tmp_path)
    assert not [key for key in metrics if key.startswith("eval_") and key != "eval_samples"]
    assert metrics["eval_samples"] == 0 and (tmp_path / "model.safetensors").exists()


def test_held_out_samples_and_samples_without_targets_are_never_trained_on(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TeacherCache(run / "cache")
    with caplog.at_level("INFO", logger="accel_distill"):
        training, held_out = split_items(cache, eval_samples=HELD_OUT)
    assert {int(cache.sample_indices[item]) for item in held_out} == set(range(HELD_OUT))
    assert all(cache.sample_indices[item] >= HELD_OUT and len(cache[item].targets) for item in training)
    left_out = SAMPLES - len(training) - len(held_out)
    assert left_out == 3  # the empty texts 18, 29 and 40
    assert f"{len(training)} samples to train on ({left_out} without a target left out)" in caplog.text


def other_tokenizer(path: Path) -> Path:
    """Save a teacher whose tokenizer has two words swapped."""
    make_teacher(path)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    return path


def test_a_student_with_another_tokenizer_is_refused_naming_the_first_difference(run: Path, tmp_path: Path) -> None:
    student = {"config": None, "model": str(other_tokenizer(tmp_path / "student"))}
    with pytest.raises(CacheMismatch, match=r"id \d+ is 'b', in the cache 'a'"):
        train(configured(run, tmp_path / "out", student=student))
    assert not (tmp_path / "out").exists()


def test_a_pretrained_student_without_a_tokenizer_is_taken_with_a_word(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_teacher(tmp_path / "student", seed=5)
    for file in path.glob("tokenizer*"):
        file.unlink()
    with caplog.at_level("WARNING", logger="accel_distill"):
        train(configured(run, tmp_path / "out", student={"config": None, "model": str(path)}))
    assert "has no tokenizer" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 1


REFUSED: list[tuple[dict[str, dict[str, Any]], type[RunError], str]] = [
    ({"student": {"config": None, "model": "/nowhere/model"}}, ConfigError, "/nowhere/model: there is no such"),
    ({"student": {"config": SIZES | {"model_type": "lama"}}}, ConfigError, "did you mean 'llama'"),
    ({"student": {"config": SIZES | {"model_type": "vit"}}}, ConfigError, "'vit' is no causal language model"),
    ({"student": {"config": SIZES | {"hiden_size": 4}}}, ConfigError, "hiden_size: unknown key; did you mean"),
    ({"student": {"config": SIZES | {"hidden_size": "x"}}}, ConfigError, "hidden_size' expected int"),
    ({"student": {"config": SIZES | {"hidden_size": 15}}}, ConfigError, "not a multiple of the number"),
    ({"student": {"config": SIZES | {"hidden_size": -4}}}, ConfigError, "negative dimension -4"),
    ({"student": {"config": SIZES | {"vocab_size": 200}}}, CacheMismatch, "vocab_size is 200"),
    (
        {"student": {"config": SIZES | {"max_position_embeddings": MAX_LENGTH - 1}}},
        ConfigError,
        f"max_position_embeddings is {MAX_LENGTH - 1}, but the samples of the cache have up to {MAX_LENGTH}",
    ),
    ({"targets": {"threshold": 0.06}}, CacheMismatch, "targets.threshold is 0.06, but the cache .* 0.05"),
    ({"targets": {"method": "top_k"}}, CacheMismatch, "targets.method is top_k, but .* threshold"),
    ({"targets": {"temperature": 2.0}}, CacheMismatch, "targets.temperature is 2.0"),
    ({"dataset": {"eval_samples": SAMPLES - 1, "max_samples": 99}}, ConfigError, "none is left to train on"),
    (
        {"dataset": {"eval_samples": 0}, "training": {"eval_strategy": "epoch"}},
        ConfigError,
        "training.eval_strategy is epoch, but no sample is held out",
    ),
    ({"training": {"resume_from_checkpoint": "/nowhere/c"}}, ConfigError, "no directory /nowhere/c"),
    ({"training": {"batch_eval_metrics": True}}, ConfigError, "training.batch_eval_metrics: is True"),
    (
        {"training": {"load_best_model_at_end": True, "save_strategy": "epoch"}},
        ConfigError,
        "section training: .*load_best_model_at_end",
    ),
    ({"training": {"accelerator_config": {"even_batches": False}}}, ConfigError, "even_batches"),
    ({"training": {"accelerator_config": {"dispatch_batches": True}}}, ConfigError, "dispatch_batches"),
    ({"training": {"accelerator_config": {"split_batches": True}}}, ConfigError, "split_batches"),
    ({"training": {"output_dir": "/dev/null/x"}}, ConfigError, "training.output_dir: /dev/null/x cannot be"),
]


@pytest.mark.parametrize(("changes", "error", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_is_refused_in_one_sentence(
    run: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], error: type[RunError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as raised:
        train(configured(run, tmp_path, **changes))
    assert "\n" not in str(raised.value)


def test_a_cache_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    student = {"config": SIZES}
    config = run_config(run / "teacher", run / "texts.jsonl", tmp_path / "nothing", student=student)
    with pytest.raises(ConfigError, match=str(tmp_path / "nothing")):
        train(config)


def test_a_run_file_without_a_student_is_refused(run: Path) -> None:
    config = run_config(run / "teacher", run / "texts.jsonl", run / "cache")
    with pytest.raises(ConfigError, match="student: is missing"):
        train(config)


def test_a_backend_that_was_not_taken_up_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched_with_fsdp(environment: dict[str, str], *, distributed_type: str) -> None:
        check_backend(environment | {"ACCELERATE_USE_FSDP": "true"}, distributed_type=distributed_type)

    monkeypatch.setattr("accel_distill.train.check_backend", launched_with_fsdp)
    with pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP is set, but the run is NO"):
        train(configured(run, tmp_path))


def test_the_command_reads_overrides_and_turns_an_error_into_a_sentence_and_a_status(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(resolved_yaml(configured(run, tmp_path / "out")))
    assert main(["--config", str(path), "training.max_steps=1"]) == 0
    assert results(tmp_path / "out")["train_loss"] > 0
    assert main(["--config", str(path), "targets.threshold=0.1"]) == 5
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith("error: targets.threshold is 0.1, but the cache")


def test_a_real_student_that_is_its_teacher_has_kl_zero_within_sampling_error(
    shared_data: Path, tmp_path: Path
) -> None:
    teacher = shared_data / "models" / "stories260K"
    texts = (shared_data / "text" / "tinystories_valid.jsonl").read_text().splitlines()[:60]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n")
    dataset = {"max_samples": 60, "eval_samples": 2, "max_length": 128}
    generate(run_config(teacher, tmp_path / "texts.jsonl", tmp_path / "cache", dataset=dataset))
    cache = TeacherCache(tmp_path / "cache")
    student = AutoModelForCausalLM.from_pretrained(teacher)
    arguments = training_arguments({"output_dir": str(tmp_path / "out")}, has_gpu=torch.cuda.is_available())
    trainer = DistillationTrainer(student, arguments, data_collator=CachedLogitCollator(pad_token_id=0))
    metrics = trainer.evaluate(cache)
    samples = [trainer.evaluate([cache[item]])["eval_kl"] for item in range(0, 60, 3)]
    error = torch.tensor(samples).std().item() / 60**0.5
    assert metrics["eval_positions"] > 5000 and 0 < error < 0.01
    assert abs(metrics["eval_kl"]) < 4 * error
    assert metrics["eval_top1_agreement"] > 0.9999
    assert metrics["eval_ce"] == pytest.approx(metrics["eval_teacher_ce"], abs=1e-3)


def test_a_tokenizer_that_was_changed_in_the_cache_is_damage(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(run / "cache", copy)
    file = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedCache, match="is not the tokenizer that the cache was made with"):
        train(configured(run, tmp_path / "out", cache={"path": copy}))


@pytest.mark.parametrize(
    ("key", "value"), [("max_length", 16), ("append_eos", False), ("text_column", "story"), ("name", "org/other")]
)
def test_text_settings_that_are_not_the_caches_are_refused(run: Path, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CacheMismatch, match=f"dataset.{key} is {value}, but the cache .* was made with"):
        train(configured(run, tmp_path, dataset={"eval_samples": HELD_OUT, key: value}))


def test_a_smaller_cap_than_the_caches_is_said_and_not_obeyed(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = train(configured(run, tmp_path, dataset={"max_samples": SAMPLES - 5, "eval_samples": HELD_OUT}))
    assert f"dataset.max_samples is {SAMPLES - 5}, but training uses the whole cache: {SAMPLES} samples" in caplog.text
    assert metrics["train_samples"] + HELD_OUT > SAMPLES - 5


@pytest.mark.parametrize(
    ("saved_by", "distributed_type", "world_size", "words"),
    [
        (2, "DEEPSPEED", 1, "saved by 2 processes with DeepSpeed, .* cannot be read by 1 process with it"),
        (2, "DEEPSPEED", 4, "saved by 2 processes with DeepSpeed, .* cannot be read by 4 processes with it"),
        (2, "MULTI_GPU", 2, "saved by 2 processes with DeepSpeed, .* cannot be read by 2 processes without it"),
        (0, "DEEPSPEED", 2, "saved without DeepSpeed, .* cannot be read by 2 processes with it"),
        (2, "DEEPSPEED", 2, None),
        (0, "MULTI_GPU", 2, None),
        (0, "NO", 1, None),
    ],
)
def test_a_checkpoint_whose_optimizer_this_run_cannot_read_is_refused(
    saved_by: int, distributed_type: str, world_size: int, words: str | None, tmp_path: Path
) -> None:
    (tmp_path / "global_step2").mkdir()
    for rank in range(saved_by):
        (tmp_path / "global_step2" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        check_same_backend(tmp_path, distributed_type=distributed_type, world_size=world_size)
    if saved_by and distributed_type == "DEEPSPEED":  # the parts of one node of several
        check_same_backend(tmp_path, distributed_type=distributed_type, world_size=world_size, on_each_node=True)


def test_resume_true_goes_on_from_the_last_checkpoint_and_leaving_it_out_is_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = {**configured(run, tmp_path / "out").training, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ConfigError, match="resume_from_checkpoint is true, but .* holds no checkpoint"):
        train(configured(run, tmp_path / "out", training=training | {"resume_from_checkpoint": True}))
    train(configured(run, tmp_path / "out", training=training))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train(configured(run, tmp_path / "out", training=training | {"resume_from_checkpoint": True, "max_steps": 3}))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert log["global_step"] == 3 and [line["step"] for line in log["log_history"] if "loss" in line] == [1, 2, 3]
    assert "training starts anew" not in caplog.text
    train(configured(run, tmp_path / "out", training=training | {"max_steps": 1}))
    assert "training starts anew; to go on: training.resume_from_checkpoint=true" in caplog.text


# ---- an incomplete cache, and checkpoints of other data


def test_an_incomplete_cache_is_refused_or_trained_on_with_a_word(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(run / "cache", copy)
    (copy / "manifest.json").unlink()
    (copy / "shards" / shard_name(2, 1, 4)).unlink()
    cache = {"path": copy}
    with pytest.raises(CacheMismatch, match="it is not complete .* or train on what is there with cache.allow_partial"):
        train(configured(run, tmp_path / "out", cache=cache))
    metrics = train(configured(run, tmp_path / "out", cache=cache | {"allow_partial": True}))
    assert f"is not complete: training uses the {SAMPLES - 4} of {SAMPLES} samples that are there now" in caplog.text
    whole = TeacherCache(run / "cache").has_target
    assert metrics["train_samples"] == sum(whole[HELD_OUT:]) - sum(whole[[17, 19, 21, 23]])


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def checkpoint(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of 2 steps of 4 samples."""
    path = tmp_path_factory.mktemp("saved")
    train(configured(run, path, training=SAVING))
    return path / "checkpoint-2"


def resumed(run: Path, output_dir: Path, checkpoint: Path, **changes: dict[str, Any]) -> RunConfig:
    training = SAVING | {"max_steps": 4, "resume_from_checkpoint": str(checkpoint)} | changes.pop("training", {})
    return configured(run, output_dir, training=training, **changes)


def test_the_checkpoint_says_what_it_was_trained_on(run: Path, checkpoint: Path) -> None:
    cache = TeacherCache(run / "cache")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["CheckpointRecord"]["args"] == {
        "cache_id": cache.cache_id,
        "samples": SAMPLES,
        "content_sha256": cache.content_sha256,
        "eval_samples": HELD_OUT,
        "global_batch": 4,
        "packing": False,
        "sampling": "random",
    }


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"training": {"per_device_train_batch_size": 2}},
            ConfigError,
            "a step takes 2 rows in this run .* and took 4 in .*checkpoint-2",
        ),
        ({"training": {"gradient_accumulation_steps": 3}}, ConfigError, "a step takes 12 rows .* and took 4"),
        (
            {"dataset": {"eval_samples": 5, "max_samples": SAMPLES}},
            ConfigError,
            f"dataset.eval_samples is 5 in this run and {HELD_OUT} in",
        ),
        ({"training": {"packing": True}}, ConfigError, "training.packing is true in this run and false in .*; set it"),
        (
            {"training": {"train_sampling_strategy": "group_by_length"}},
            ConfigError,
            "train_sampling_strategy is group_by_length in this run and random in",
        ),
    ],
)
def test_a_checkpoint_of_another_batch_or_split_is_refused_with_both_values(
    run: Path,
    tmp_path: Path,
    checkpoint: Path,
    changes: dict[str, dict[str, Any]],
    error: type[RunError],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        train(resumed(run, tmp_path / "out", checkpoint, **changes))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_cache_is_refused_with_both_ids(run: Path, tmp_path: Path, checkpoint: Path) -> None:
    other = {"cache": {"path": tmp_path / "cache"}, "targets": {"threshold": 0.1}}
    generate(configured(run, tmp_path, **other))
    ids = [TeacherCache(path).cache_id for path in (tmp_path / "cache", run / "cache")]
    with pytest.raises(CacheMismatch, match=f"it is the cache {ids[0]}, and in .*checkpoint-2 it was {ids[1]}"):
        train(resumed(run, tmp_path / "out", checkpoint, **other))


def test_a_checkpoint_of_a_cache_with_other_samples_is_refused_with_both_numbers(run: Path, tmp_path: Path) -> None:
    """A cache that was not complete has grown since."""
    path = shutil.copytree(run / "cache", tmp_path / "cache")
    (path / "manifest.json").unlink()
    (path / "shards" / shard_name(2, 1, 4)).unlink()
    partial = {"path": path, "allow_partial": True}
    train(configured(run, tmp_path / "first", cache=partial, training=SAVING))
    last = tmp_path / "first" / "checkpoint-2"
    shutil.copy(run / "cache" / "shards" / shard_name(2, 1, 4), path / "shards")
    sentence = f"the cache has grown from {SAMPLES - 4} samples, as .*checkpoint-2 went over them, to {SAMPLES}; bring"
    with pytest.raises(CacheMismatch, match=sentence):
        train(resumed(run, tmp_path / "out", last, cache=partial))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 32}, "the cache has grown from 26 samples, .* to 32; bring back .*, or start anew"),
        ({"samples": 20}, "the cache has shrunk from 26 samples, .* to 20; bring back .*, or start anew"),
        ({"content_sha256": "b"}, "the shards of the cache are not those .*; bring back .*, or start anew"),
        ({"cache_id": "b"}, "it is the cache b, and in .* it was a; set it back, or start anew"),
    ],
)
def test_the_advice_about_another_cache_can_be_followed(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    then = DataRecord(cache_id="a", samples=26, content_sha256="a", eval_samples=2, global_batch=4)
    state = {"stateful_callbacks": {"CheckpointRecord": {"args": asdict(then)}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    check_resumable(tmp_path, then)
    now = {"content_sha256": "c"} | changes  # of other samples the hash is another one too
    with pytest.raises(CacheMismatch, match=sentence) as caught:
        check_resumable(tmp_path, replace(then, **now))
    assert ("set it back" in str(caught.value)) == ("cache_id" in changes)


def test_a_record_without_the_newer_fields_is_one_of_plain_rows(tmp_path: Path) -> None:
    then = DataRecord(cache_id="a", samples=26, content_sha256="a", eval_samples=2, global_batch=4)
    older = {name: value for name, value in asdict(then).items() if name not in ("packing", "sampling")}
    state = {"stateful_callbacks": {"CheckpointRecord": {"args": older}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    check_resumable(tmp_path, then)
    check_resumable(tmp_path, replace(then, sampling="sequential"))
    for now in ({"packing": True}, {"sampling": "group_by_length"}):
        with pytest.raises(ConfigError, match="set it back"):
            check_resumable(tmp_path, replace(then, **now))


def test_batch_and_accumulation_may_change_where_their_product_stays(
    run: Path, tmp_path: Path, checkpoint: Path
) -> None:
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert train(resumed(run, tmp_path / "out", checkpoint, training=parts))["train_loss"] > 0


def test_a_checkpoint_of_an_older_version_is_gone_on_from_with_a_word_and_saves_the_record(
    run: Path, tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = shutil.copytree(checkpoint, tmp_path / "old" / "checkpoint-2")
    state = json.loads((old / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["CheckpointRecord"]
    (old / "trainer_state.json").write_text(json.dumps(state))
    train(resumed(run, tmp_path / "out", old))
    assert "does not say what it was trained on" in caplog.text
    saved = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["CheckpointRecord"]["args"]["global_batch"] == 4


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"<html>"])
def test_a_checkpoint_whose_state_cannot_be_read_is_one_sentence(
    run: Path, tmp_path: Path, checkpoint: Path, content: bytes | None
) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    (broken / "trainer_state.json").unlink()
    if content is not None:
        (broken / "trainer_state.json").write_bytes(content)
    with pytest.raises(ConfigError, match="trainer_state.json cannot be read .*; name another checkpoint"):
        train(resumed(run, tmp_path / "out", broken))


@pytest.mark.parametrize(("world_size", "global_batch"), [(1, 12), (2, 24), (8, 96)])
def test_the_global_batch_counts_devices_accumulation_and_processes(
    run: Path, tmp_path: Path, world_size: int, global_batch: int
) -> None:
    config = configured(run, tmp_path, training={"gradient_accumulation_steps": 3})
    arguments = training_arguments(config.training, has_gpu=torch.cuda.is_available())
    assert samples_of_a_step(arguments, world_size=world_size) == global_batch


def test_the_log_goes_to_tensorboard_below_the_output_directory_unless_the_run_file_says_otherwise(
    run: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configured(run, tmp_path))
    (events,) = (tmp_path / "runs").iterdir()
    read = EventAccumulator(str(events))
    read.Reload()
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for name in ("kd", "kl", "ce", "loss"):
        written = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert written == [(line["step"], pytest.approx(line[name])) for line in log if "kd" in line]
        assert len(written) == 4
    assert [event.step for event in read.Scalars("eval/top1_agreement")] == [4]
    train(configured(run, tmp_path / "none", training={"max_steps": 1, "report_to": "none"}))
    assert not (tmp_path / "none" / "runs").exists()


def test_another_integration_of_the_trainer_is_taken_by_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    heard: list[dict[str, float]] = []

    class Heard(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Heard)
    monkeypatch.setitem(INTEGRATIONS, "trackio", ("trackio", ()))  # as if it were installed
    train(configured(run, tmp_path, training={"max_steps": 2, "logging_steps": 1, "report_to": ["trackio"]}))
    assert [logs["kl"] > 0 for logs in heard if "kl" in logs] == [True, True]
    assert any("eval_top1_agreement" in logs for logs in heard)
    assert not (tmp_path / "runs").exists()


def test_a_signal_ends_training_with_its_status_and_one_sentence(run: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    endless = {"max_steps": 1_000_000, "logging_steps": 10, "per_device_train_batch_size": 2}
    path.write_text(resolved_yaml(configured(run, out, training={"output_dir": str(out), **endless})))
    command = [sys.executable, "-m", "accel_distill.train", "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(out.glob("runs/*/events*")):  # it is past its first steps
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said
    assert said.count("stopped by SIGTERM; what was published or saved is kept") == 1


def test_a_worker_that_is_killed_ends_training_in_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, trainers = TeacherCache.__getitems__, os.getpid()

    def read_or_die(cache: TeacherCache, items: Sequence[int]) -> list[CachedSample]:
        if os.getpid() != trainers:
            os.kill(os.getpid(), signal.SIGKILL)  # as a machine without memory does
        return read(cache, items)

    monkeypatch.setattr(TeacherCache, "__getitems__", read_or_die)
    with pytest.raises(RunError, match="a process that reads for training ended .* training.dataloader_num_workers=0"):
        train(configured(run, tmp_path, training={"dataloader_num_workers": 1}))
    train(configured(run, tmp_path, training={"dataloader_num_workers": 0, "max_steps": 1}))


def test_packed_training_says_what_it_saves_and_counts_samples(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = train(configured(run, tmp_path, training={"packing": True, "max_steps": -1, "num_train_epochs": 1}))
    cache = TeacherCache(run / "cache")
    training = [item for item in range(HELD_OUT, len(cache)) if cache.has_target[item]]
    assert metrics["train_samples"] == len(training) and metrics["eval_samples"] == HELD_OUT
    said = re.search(r"packed (\d+) samples into (\d+) rows of at most (\d+) tokens: ([\d.]+)% of the", caplog.text)
    assert said is not None
    assert int(said[1]) == len(training) > int(said[2]) and int(said[3]) == MAX_LENGTH
    steps = [line for line in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] if "kd" in line]
    assert len(steps) == -(-int(said[2]) // 4)
    plain = train(configured(run, tmp_path / "plain", training={"max_steps": 1}))
    assert metrics["eval_positions"] == plain["eval_positions"]


def test_grouped_training_says_what_it_saves(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(configured(run, tmp_path, training={"train_sampling_strategy": "group_by_length"}))
    said = re.search(r"grouped \d+ samples by length: ([\d.]+)% of the batches is padding, ([\d.]+)%", caplog.text)
    assert said is not None and float(said[1]) < float(said[2])
