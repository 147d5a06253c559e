"""What the command saves under FSDP2 and ZeRO-3 loads in plain transformers: weights, ties, tokenizer, generation.

Two processes are really launched, on a CPU with gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from layout_run import deepspeed_settings
from safetensors.torch import load_file
from test_train import SIZES, VOCAB, configured, run  # noqa: F401
from tiny import make_teacher, make_tokenizer, story
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_distill.config import resolved_yaml
from accel_distill.train import train

pytestmark = pytest.mark.slow

# The command, with what a backend needs on a CPU. FSDP2: accelerate takes it up on devices other than a CPU only.
MAINS = {
    "zero3": """
import deepspeed
from accel_distill.stopping import end
from accel_distill.train import main
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
end(main())
""",
    "fsdp2": """
import torch
from layout_run import prepare_fsdp2
prepare_fsdp2()
torch.distributed.init_process_group("gloo")
from accel_distill import train as command
from accel_distill.stopping import end
arguments = command.training_arguments
command.training_arguments = lambda values, has_gpu: arguments(values, has_gpu=True)
end(command.main())
""",
}
TYPES = {"zero3": "DEEPSPEED", "fsdp2": "FSDP"}
SGD = {"optim": "sgd", "learning_rate": 0.5}
TIED = {"config": SIZES | {"tie_word_embeddings": True}}
LORA = {"r": 4, "lora_alpha": 16, "modules_to_save": ["lm_head"], "merge": True}


def launched(config: Any, place: Path, backend: str) -> dict[str, Any]:
    """Run the command with two processes; return its metrics."""
    (place / "run.yaml").write_text(resolved_yaml(config))
    (place / "main.py").write_text(MAINS[backend])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(place / "main.py")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "--config", str(place / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((place / "out" / "all_results.json").read_text())
    assert (found["world_size"], found["distributed_type"]) == (2, TYPES[backend])
    return found


@pytest.mark.parametrize(
    ("backend", "kind"), [("fsdp2", "tied"), ("fsdp2", "merged"), ("zero3", "tied"), ("zero3", "merged")]
)
def test_a_student_saved_by_two_processes_is_that_of_one_and_loads_in_plain_transformers(
    backend: str,
    kind: str,
    run: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = make_teacher(tmp_path / "base", vocab=VOCAB, seed=5)
    student = TIED if kind == "tied" else {"config": None, "model": str(base), "lora": LORA}
    expected = train(configured(run, tmp_path / "one", student=student, training=SGD))
    training: dict[str, Any] = SGD | {"per_device_train_batch_size": 2}
    if backend == "zero3":
        training["deepspeed"] = deepspeed_settings(3)
    found = launched(configured(run, tmp_path / "out", student=student, training=training), tmp_path, backend)
    for key in ("eval_kl", "eval_ce", "eval_positions"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)

    stored = load_file(tmp_path / "out" / "model.safetensors")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "one"))
    assert type(ours).__name__ == "LlamaForCausalLM" and not hasattr(ours, "peft_config")
    is_tied = ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert is_tied == (kind == "tied")
    if backend == "zero3":  # FSDP2's state has tied weights twice, equal
        assert is_tied == ("lm_head.weight" not in stored)
    assert {weight.dtype for weight in [*stored.values(), *ours.parameters()]} == {torch.float32}
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), weight, rtol=0, atol=1e-5)
        if kind == "merged" and name.endswith("proj.weight"):
            assert not torch.allclose(weight, before[name], atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(story(3))["input_ids"] == make_tokenizer()(story(3))["input_ids"]
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert ours.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])  # by version
    assert ours.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert ours.generate(prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt.shape[1]
