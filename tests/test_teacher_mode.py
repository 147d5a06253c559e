"""What a run file may say with an online teacher, and the sentence that answers anything else; no model is loaded."""

from pathlib import Path

import pytest

from accel_distill.cli import main
from accel_distill.config import load_config, resolved_yaml
from accel_distill.divergences import DIVERGENCES
from accel_distill.errors import ConfigError
from accel_distill.estimate import estimate
from accel_distill.generate import generate
from accel_distill.online_data import _look

ONLINE = "teacher: {model: org/teacher, mode: online}\ndataset: {name: org/text, streaming: true, max_samples: 1000}\n"
CACHED = "teacher: {model: org/teacher}\ndataset: {name: org/text}\ncache: {path: caches/a}\n"


@pytest.fixture
def online(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(ONLINE)
    return path


def test_an_online_teacher_needs_no_cache_and_its_run_file_is_written_and_read_again(online: Path) -> None:
    config = load_config(online, ["targets.method=dense"])
    assert config.cache is None
    online.write_text(resolved_yaml(config))
    assert load_config(online) == config


def test_one_override_turns_a_run_file_with_a_cache_into_one_without(online: Path) -> None:
    online.write_text(CACHED)
    assert load_config(online, ["teacher.mode=online"]).targets.method == "threshold"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_targets_allow_every_divergence(online: Path, divergence: str) -> None:
    config = load_config(online, ["targets.method=dense", f"loss.divergence={divergence}"])
    assert config.loss.divergence == divergence


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        (ONLINE, ["teacher.mode=cached"], "cache.path: is missing"),
        (
            CACHED,
            ["targets.method=dense"],
            "no cache holds; expected threshold, top_k or random, or teacher.mode=online",
        ),
        (ONLINE, ["loss.divergence=jsd"], "jsd cannot be taken from threshold targets"),
        (ONLINE, ["targets.method=dense", "loss.top_k_tail=renormalize"], "renormalize is for top_k targets"),
        (ONLINE, ["teacher.mode=live"], "expected 'cached' or 'online'"),
        (ONLINE, ["teacher.on_nonfinite=skip"], "skip leaves positions out of a cache"),
        (ONLINE, ["dataset.long_documents=split"], "expected truncate, or dataset.streaming=false"),
        (ONLINE, ["dataset.max_samples=null"], "max_samples MUST be specified"),
        (ONLINE, ["training.num_train_epochs=3"], "a stream is trained on once, in its order, and not read again"),
        (ONLINE, ["training.train_sampling_strategy=random"], "a stream is trained on in its order"),
        (ONLINE, ["training.dataloader_drop_last=true"], "no sample of a stream is left out"),
        (ONLINE, ["training.ignore_data_skip=true"], "would train on the samples of before again"),
        (ONLINE, ["training.packing=true"], "packs the samples of a cache"),
        (
            ONLINE,
            ["training.train_sampling_strategy=group_by_length"],
            "the lengths of texts are known of a cache only",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(online: Path, text: str, overrides: list[str], sentence: str) -> None:
    online.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(online, overrides)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_one_epoch_of_a_stream_and_several_of_a_dataset_at_hand_are_right(online: Path) -> None:
    load_config(online, ["training.num_train_epochs=1"])
    load_config(online, ["dataset.streaming=false", "training.num_train_epochs=3", "dataset.long_documents=split"])


def test_generate_and_estimate_refuse_a_run_without_a_cache(online: Path) -> None:
    config = load_config(online)
    with pytest.raises(ConfigError, match="there is no cache for generate; run train"):
        generate(config)
    with pytest.raises(ConfigError, match="there is no cache for estimate"):
        estimate(config, probe=None, processes=1)


def test_a_teacher_that_one_process_spreads_over_its_devices_is_refused_for_two_before_anything_is_opened(
    online: Path,
) -> None:
    config = load_config(online, ["teacher.parallelism=auto"])
    with pytest.raises(ConfigError, match="is auto, .* but 2 processes were started; start one, or take fsdp or zero3"):
        _look(config, world_size=2)


def test_check_says_that_there_is_no_cache(online: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(online), "targets.method=dense"]) == 0
    assert "dense, without a cache: the teacher is online" in capsys.readouterr().out
