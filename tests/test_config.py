"""What a run file may say, and the sentence that answers anything else."""

from pathlib import Path
from typing import Any

import pytest

from accel_distill.config import SECTIONS, RunConfig, load_config, resolved_yaml
from accel_distill.divergences import DIVERGENCES
from accel_distill.errors import ConfigError

MINIMAL = """
teacher: {model: org/teacher}
dataset: {name: org/text}
cache: {path: caches/a}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Return the sentence with which a run file is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_the_documented_ones(run_file: Path) -> None:
    config = load_config(run_file)
    assert (config.teacher.tokens_per_batch, config.teacher.head_chunk, config.teacher.dtype) == (16_384, 256, "auto")
    assert (config.dataset.eval_samples, config.dataset.max_length, config.dataset.max_samples) == (256, 2048, None)
    assert (config.dataset.append_eos, config.dataset.long_documents) == (True, "truncate")
    targets = config.targets
    assert (targets.method, targets.threshold, targets.top_k, targets.draws) == ("threshold", 0.03, 64, 50)
    assert (targets.temperature, targets.seed) == (1.0, 0)
    assert (config.cache.samples_per_shard, config.cache.lanes) == (1024, None)
    assert (config.loss.divergence, config.loss.kd_weight, config.loss.ce_weight) == ("forward_kl", 1.0, 0.0)
    loss = config.loss
    assert (loss.top_k_tail, loss.jsd_beta, loss.skew, loss.alpha, loss.beta) == ("bucket", 0.5, 0.1, 0.2, 0.7)
    assert (config.student, config.training) == (None, {})


def test_every_section_is_in_the_table_that_the_messages_use() -> None:
    assert set(SECTIONS) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("overrides", "parameter"),
    [
        (["targets.threshold=0.06"], 0.06),
        (["targets.method=top_k", "targets.top_k=8"], 8),
        (["targets.method=random"], 50),
    ],
)
def test_the_parameter_is_the_number_that_belongs_to_the_method(
    run_file: Path, overrides: list[str], parameter: float
) -> None:
    assert load_config(run_file, overrides).targets.parameter == parameter


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_targets_allow_every_divergence_and_draws_the_forward_one_only(run_file: Path, divergence: str) -> None:
    chosen = f"loss.divergence={divergence}"
    config = load_config(run_file, ["targets.method=top_k", chosen, "loss.top_k_tail=renormalize"])
    assert (config.loss.divergence, config.loss.top_k_tail) == (divergence, "renormalize")
    if divergence != "forward_kl":
        assert f"{divergence} cannot be taken from random targets" in refusal(run_file, "targets.method=random", chosen)


def test_overrides_replace_values_and_reach_into_the_students_config(run_file: Path) -> None:
    overrides = ["student.config.model_type=llama", "student.config.hidden_size=64", "training.learning_rate=3e-4"]
    config = load_config(run_file, [*overrides, "training.lr_scheduler_type=cosine", "dataset.max_samples=2000"])
    assert config.student is not None
    assert config.student.config == {"model_type": "llama", "hidden_size": 64}
    assert config.training == {"learning_rate": 0.0003, "lr_scheduler_type": "cosine"}
    assert config.dataset.max_samples == 2000


def test_a_stream_without_a_cap_is_refused_with_the_reason_and_the_override(run_file: Path) -> None:
    message = refusal(run_file, "dataset.streaming=true")
    assert "max_samples MUST be specified for streaming datasets!" in message
    assert "15 trillion tokens" in message
    assert "dataset.max_samples=10000" in message
    load_config(run_file, ["dataset.streaming=true", "dataset.max_samples=10000"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # unknown words, with the nearest valid one
        ("dataset.max_sample=1", "unknown key; did you mean 'max_samples'?"),
        ("dataset.threshold=0.1", "unknown key; did you mean targets.threshold?"),
        ("trainng.seed=1", "unknown key; did you mean 'training'?"),
        ("teacher.qqq=1", "unknown key; expected one of attn_implementation, dtype,"),
        ("targets.method=topk", "found 'topk' (text), expected 'threshold', 'random', 'top_k' or 'dense'"),
        ("training.learning_rat=1", "unknown key; did you mean 'learning_rate'?"),
        ("student.lora.lora_alfa=8", "unknown key; did you mean 'lora_alpha'?"),
        ("student.lora.rang=8", "unknown key; expected one of alpha_pattern, bias, exclude_modules,"),
        ("student.lora_dropout=0.1", "unknown key; did you mean student.lora.lora_dropout?"),
        ("student.lora.r=0", "found 0 (whole number), expected at least 1"),
        ("student.lora.target_modules=3", "found 3 (whole number), expected text or a list of texts"),
        ("student.lora.lora_dropout=1.0", "expected less than 1"),
        ("student.lora.bias=some", "expected 'none', 'all' or 'lora_only'"),
        # wrong types: a value is what it is written as
        ('dataset.max_samples="3"', "found '3' (text), expected a whole number (write it without quotes)"),
        ("dataset.max_samples=1e4", "found 10000.0 (number), expected a whole number (write 10000)"),
        ("dataset.max_samples=true", "found true, expected a whole number"),
        ("dataset.streaming=yes", "found 'yes' (text), expected true or false"),
        ("dataset.streaming=1", "found 1 (whole number), expected true or false"),
        ("teacher.revision=123", "found 123 (whole number), expected text (write it in quotes)"),
        ("teacher.quantization=int8", "found 'int8' (text), expected a mapping"),
        ("targets.threshold=high", "found 'high' (text), expected a number"),
        ("cache.path=3", "found 3 (whole number), expected a path"),
        ("cache.path=''", "found '' (text), expected a path"),
        ("dataset.data_files=3", "found 3 (whole number), expected text or a list of texts"),
        ("dataset.data_files=[1]", "found 1 (whole number), expected text"),
        ("dataset.data_files=[]", "found [] (list), expected at least one item"),
        ("teacher.model=''", "found '' (text), expected at least one character"),
        # values out of range
        ("targets.threshold=0", "expected at least 1e-06"),
        ("targets.threshold=1", "expected less than 1"),
        ("targets.threshold=-0.1", "expected at least 1e-06"),
        ("targets.threshold=.nan", "found nan (number), expected a finite number"),
        ("targets.top_k=0", "expected at least 1"),
        ("targets.top_k=4097", "expected at most 4096"),
        ("targets.draws=65536", "expected at most 65535"),
        ("targets.temperature=0", "expected at least 0.01"),
        ("targets.seed=-1", "expected at least 0"),
        ("targets.seed=9223372036854775808", "expected at most 9223372036854775807"),
        ("dataset.max_samples=0", "expected at least 1"),
        ("dataset.max_length=1", "expected at least 2"),
        ("dataset.eval_samples=-1", "expected at least 0"),
        ("teacher.tokens_per_batch=0", "expected at least 1"),
        ("teacher.head_chunk=0", "expected at least 1"),
        ("cache.lanes=0", "expected at least 1"),
        ("loss.kd_weight=-1", "expected at least 0"),
        ("loss.ce_weight=.inf", "expected a finite number"),
        (
            "loss.divergence=kl",
            "expected 'forward_kl', 'reverse_kl', 'jsd', 'skew_kl', 'tvd' or 'alpha_beta'",
        ),
        ("loss.jsd_beta=1", "expected less than 1"),
        ("loss.skew=0", "expected more than 0"),
        ("loss.alpha=0", "expected more than 0"),
        ("loss.beta=-0.5", "expected more than 0"),
        ("loss.top_k_tail=none", "expected 'bucket' or 'renormalize'"),
        ("loss.divergence=reverse_kl", "reverse_kl cannot be taken from threshold targets"),
        (
            "loss.divergence=tvd",
            "targets.method=top_k, which allows forward_kl, reverse_kl, jsd, skew_kl, tvd, alp",
        ),
        ("loss.top_k_tail=renormalize", "renormalize is for top_k targets"),
        # values that contradict each other
        ("loss.kd_weight=0", "loss.kd_weight and loss.ce_weight are both 0; expected one above 0"),
        ("student.model=null", "neither student.model nor student.config is there"),
        ("student.config={hidden_size: 8}", "expected an architecture, such as llama"),
        ("training.remove_unused_columns=true", "found true, expected false"),
    ],
)
def test_a_wrong_override_is_named_with_what_was_found_and_what_is_expected(
    run_file: Path, override: str, words: str
) -> None:
    message = refusal(run_file, override)
    assert words in message
    assert repr(override) in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("teacher: 3", "teacher: found 3 (whole number), expected a mapping"),
        ("teacher: {}", "teacher.model: is missing"),
        ("teacher: {modell: x}", "teacher.modell: unknown key; did you mean 'model'?"),
        ("max_samples: 3", "max_samples: unknown key; did you mean dataset.max_samples?"),
        (MINIMAL + "los:", "los: unknown key; did you mean 'loss'?"),
        (MINIMAL + "training: 3", "training: found 3 (whole number), expected a mapping"),
        (MINIMAL + "training: {seed: x}", "training.seed: found 'x' (text), expected a whole number"),
        (MINIMAL + "student: {model: x, config: {model_type: llama}}", "student.config: student.model is 'x'"),
        ("cache: {path: x}\ndataset: {name: json}\nteacher: {model: x}", "dataset.data_files: is missing"),
    ],
)
def test_a_wrong_file_is_named_with_the_dotted_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_the_last_override_of_a_key_is_the_one_that_is_blamed(run_file: Path) -> None:
    message = refusal(run_file, "targets.top_k=1", "targets.top_k=x")
    assert message.startswith("override 'targets.top_k=x': ")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.max_samples=200"], "is 256 (the default) of 200 samples"),
        (["dataset.max_samples=256"], "add for example dataset.eval_samples=25"),
        (["dataset.max_samples=500", "dataset.eval_samples=500"], "is 500 of 500 samples"),
    ],
)
def test_evaluation_must_leave_samples_to_train_on(run_file: Path, overrides: list[str], words: str) -> None:
    assert words in refusal(run_file, *overrides)
    load_config(run_file, [*overrides, "dataset.eval_samples=20"])


def test_a_section_with_nothing_in_it_is_the_section_of_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "targets:\nloss:\nstudent:\ntraining:\n")
    config = load_config(path)
    assert (config.targets.threshold, config.student, config.training) == (0.03, None, {})


def test_a_home_directory_is_expanded_and_nothing_else_is(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    overrides = ["cache.path=~/caches/a", "training.output_dir=~/runs", "teacher.model=${HOME}/m"]
    config = load_config(run_file, [*overrides, "dataset.data_files=~/x.jsonl"])
    assert config.cache.path == Path("/home/ann/caches/a")
    assert config.training["output_dir"] == "/home/ann/runs"
    assert config.teacher.model == "${HOME}/m"
    assert config.dataset.data_files == ["/home/ann/x.jsonl"]
    assert load_config(run_file).cache.path == Path("caches/a")  # relative to the current directory


def test_the_resolved_configuration_is_a_run_file_that_says_the_same(run_file: Path, tmp_path: Path) -> None:
    overrides = ["student.config={model_type: llama, eps: 1e-6, name: '3e-4', other: no}"]
    overrides += ["training.learning_rate=3e-4", "training.eval_strategy=no", "dataset.text_column='010'"]
    config = load_config(run_file, overrides)
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config
    assert "kd_weight: 1.0" in again.read_text()  # the defaults are there too


def test_a_configuration_cannot_be_changed(run_file: Path) -> None:
    config: Any = load_config(run_file)
    with pytest.raises(ValueError, match="frozen"):
        config.targets.seed = 3


def test_adapters_need_a_pretrained_student(run_file: Path) -> None:
    student = load_config(run_file, ["student.model=some/model", "student.lora.r=16"]).student
    assert student is not None and student.lora is not None and student.lora.r == 16
    scratch = ["student.config.model_type=llama", "student.lora.r=16"]
    assert "adapters train a model that is there already" in refusal(run_file, *scratch)
