"""Every file in configs/ loads, and says what its name promises."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from accel_distill.config import load_config
from accel_distill.sizes import FINEWEB_MEAN, PACKED, USE_CASES, cell

RUN_FILES = sorted((ROOT / "configs").glob("*.yaml"))
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
ACCELERATE_FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DEEPSPEED_FILES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))

# What `accelerate launch` starts from each file: its distributed type, and the ZeRO stage or FSDP version.
KINDS = {
    "cpu": ("MULTI_GPU", None),
    "ddp": ("MULTI_GPU", None),
    "multi_node": ("MULTI_GPU", None),
    "fsdp2": ("FSDP", 2),
    "zero1": ("DEEPSPEED", 1),
    "zero2": ("DEEPSPEED", 2),
    "zero3": ("DEEPSPEED", 3),
    "zero3_offload": ("DEEPSPEED", 3),
}


def test_every_file_is_tried() -> None:
    names = [path.stem for path in RUN_FILES]
    assert names == ["c4-en", "fineweb-online", "fineweb-qwen3", "fineweb-smollm2", "local-jsonl", "slimpajama"]
    assert {path.stem for path in PRESETS} == {"quick", "development", "small", "medium", "large"}
    assert {path.stem for path in ACCELERATE_FILES} == set(KINDS)
    assert [path.stem for path in DEEPSPEED_FILES] == ["zero1", "zero2", "zero3", "zero3_offload"]
    tried = {*RUN_FILES, *PRESETS, *ACCELERATE_FILES, *DEEPSPEED_FILES}
    assert {path for path in (ROOT / "configs").rglob("*") if path.is_file()} == tried


@pytest.mark.parametrize("path", [*RUN_FILES, *PRESETS], ids=lambda path: path.stem)
def test_a_run_file_loads_and_can_be_trained_from(path: Path) -> None:
    config = load_config(path)
    assert config.student is not None
    assert config.training["output_dir"].startswith("runs/")
    assert (config.cache is None) == (config.teacher.mode == "online") == (path.stem == "fineweb-online")
    assert config.cache is None or config.cache.path.parts[0] == "caches"
    assert load_config(path, ["dataset.max_samples=10000"]).dataset.max_samples == 10_000


@pytest.mark.parametrize("path", [*RUN_FILES, *PRESETS], ids=lambda path: path.stem)
def test_the_training_section_makes_training_arguments(path: Path, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = load_config(path).training | {"output_dir": str(tmp_path), "use_cpu": True}
    made = TrainingArguments(**arguments)
    assert made.learning_rate == arguments["learning_rate"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_it_takes_as_the_table_of_sizes_does(path: Path) -> None:
    config, text = load_config(path), path.read_text()
    samples = next(samples for case, samples in USE_CASES.items() if case.split()[0] == path.stem)
    assert config.dataset.max_samples == samples and f": {samples:,} documents of FineWeb" in text
    assert config.dataset.max_length == PACKED
    assert config.dataset.config_name == ("default" if samples > 15_000_000 else "sample-10BT")
    assert f"packed to 2,048 tokens each:  {cell(samples * PACKED, 20, 20_000)}" in text
    assert f"at a mean of 650 tokens each: {cell(samples * FINEWEB_MEAN, 20, 20_000)}" in text
    assert text.count(f"--config configs/presets/{path.name}") == 3


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=lambda path: path.stem)
def test_an_accelerate_file_is_what_accelerate_launch_makes_of_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    kind, number = KINDS[path.stem]
    assert load_config_from_file(str(path)).distributed_type == kind  # refuses unknown keys
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "4", "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == tuple(
        kind == other for other in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    assert number in (None, int(arguments.zero_stage or 0), int(arguments.fsdp_version))
    assert arguments.num_processes == 4
    assert arguments.num_machines == (2 if path.stem == "multi_node" else 1)
    assert arguments.mixed_precision == "no"
    if kind == "DEEPSPEED":
        device = "cpu" if path.stem.endswith("offload") else "none"
        assert arguments.offload_optimizer_device == arguments.offload_param_device == device
        assert bool(arguments.zero3_save_16bit_model) == (number == 3)  # or the saved student would be empty


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_a_deepspeed_file_has_the_stage_of_its_name_and_leaves_the_rest_to_training(path: Path) -> None:
    settings = json.loads(path.read_text())
    stage = int(path.stem[4])
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["bf16"] == {"enabled": "auto"}
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[name] == "auto"
    gathers = settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False)
    assert gathers == (stage == 3)  # or the saved student would be empty


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_deepspeed_takes_a_file_once_training_has_filled_it_in(path: Path, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, bf16=True
    )
    filled = HfTrainerDeepSpeedConfig(str(path))
    filled.trainer_config_process(arguments)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    filled.trainer_config_finalize(arguments, model, num_training_steps=10)
    assert "auto" not in json.dumps(filled.config)
    config = DeepSpeedConfig(filled.config)
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (4, 2)
    assert config.bfloat16_config.enabled and config.zero_config.stage == int(path.stem[4])
    offload = config.zero_config.offload_optimizer, config.zero_config.offload_param
    assert [part and part.device for part in offload] == ["cpu" if "offload" in path.stem else None] * 2
