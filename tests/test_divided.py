"""A teacher larger than a device: two ranks that share one make the bytes of `replicate`, and hold half of it each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from conftest import ROOT
from divided_run import BACKENDS, CASES, TEACHERS, case_config
from reliability.test_launched import free_port
from test_teacher import THRESHOLD, rows
from tiny import VOCAB, make_teacher, make_tokenizer, run_config, shard_files, story, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from accel_distill import lookout
from accel_distill.config import TeacherConfig, load_config, resolved_yaml
from accel_distill.disk_space import DiskSpace
from accel_distill.divided import check_parallelism, divide, held_bytes, is_divided
from accel_distill.errors import ConfigError, RankStopped
from accel_distill.generate import generate
from accel_distill.teacher import Teacher, load_teacher
from accel_distill.turns import Turns

CPU = torch.device("cpu")
RANK = """
import os, sys
from accel_distill import generate, teacher
from accel_distill.stopping import end
forwards, run = [], teacher.Teacher.hidden_states
def hidden_states(self, *arguments, **named):
    forwards.append(1)
    if len(forwards) == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), {number})
    return run(self, *arguments, **named)
teacher.Teacher.hidden_states = hidden_states
end(generate.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data and three teachers: one with its head tied to its embeddings, one a mixture of experts."""
    place = tmp_path_factory.mktemp("divided")
    write_jsonl(place / "data.jsonl", [story(n) for n in range(60)])
    make_teacher(place / "plain")
    settings = json.loads((place / "plain" / "config.json").read_text())
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**settings, "tie_word_embeddings": True})).save_pretrained(place / "tied")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = Qwen3MoeConfig(**{name: settings[name] for name in names}, **experts, num_key_value_heads=1)
    Qwen3MoeForCausalLM(config).save_pretrained(place / "experts")
    for name in ("tied", "experts"):
        make_tokenizer().save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def launched(place: Path) -> Path:
    """The caches of all cases and backends, made by two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "divided_run.py"), str(place)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, dict[str, bytes]]:
    """The shards of each case that one process makes with its whole teacher."""
    found = {}
    for case in CASES:
        config = case_config(place, case, "replicate")
        generate(config)
        found[case] = shard_files(config.cache.path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_a_teacher_make_the_bytes_of_one_with_a_whole_one(
    case: str, backend: str, launched: Path, whole: dict[str, dict[str, bytes]]
) -> None:
    assert len(whole[case]) == {"one-shard": 1, "three-shards": 3, "eight-shards": 8}[case]
    cache = case_config(launched, case, backend).cache.path
    assert shard_files(cache) == whole[case]
    for name in ("cache.json", "manifest.json"):  # how it was divided is no part of what a cache is
        assert (cache / name).read_bytes() == (launched / f"replicate-{case}" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_of_two_ranks_holds_half_of_the_base_model_and_the_head(backend: str, case: str, launched: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(launched / TEACHERS[case], dtype=torch.float32)
    base, head = held_bytes(model.base_model), model.get_output_embeddings().weight
    for number in range(2):
        rank = json.loads((launched / f"{backend}-{case}-{number}.json").read_text())
        assert rank["held_bytes"] == base // 2 + head.nbytes
        assert rank["head"] == list(head.shape)
        assert rank["parameters"] == len(list(model.base_model.parameters())) > 0
        assert rank["sharded"] == (rank["parameters"] if backend == "fsdp" else 0)
        assert rank["divided"] == (rank["parameters"] if backend == "zero3" else 0)


@pytest.mark.parametrize("parallelism", ["auto", *BACKENDS])
def test_one_process_makes_the_same_bytes_however_its_teacher_is_to_be_divided(
    parallelism: str, place: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = case_config(place, "three-shards", parallelism)
    caplog.set_level("INFO", logger="accel_distill")
    generate(config.model_copy(update={"cache": config.cache.model_copy(update={"path": tmp_path / "cache"})}))
    assert shard_files(tmp_path / "cache") == whole["three-shards"]
    assert f"teacher.parallelism is {parallelism}" in caplog.text


def test_a_teacher_whose_parts_are_on_the_cpu_and_on_the_disk_says_the_same(place: Path, tmp_path: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    batch, settings = rows(9, 4, 30), {"head_chunk": 7, "valid_ids": VOCAB}
    expected = Teacher(load(place / "plain", dtype=torch.float32), **settings).targets_for(batch, sampling=THRESHOLD)
    parts = {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    spread = dispatch_model(
        load(place / "plain", dtype=torch.float32),
        device_map={**parts, "model.layers.1": "disk", "lm_head": "disk"},
        offload_dir=tmp_path,
        main_device="cpu",
        force_hooks=True,
    )
    assert sum(weight.device.type == "meta" for weight in spread.parameters()) == 10
    found = Teacher(spread, **settings).targets_for(batch, sampling=THRESHOLD)
    for name, values in expected.targets.arrays().items():
        assert (found.targets.arrays()[name] == values).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "statuses", "said"),
    [
        (signal.SIGKILL, (1, -9), "error: rank 1 (process"),
        pytest.param(signal.SIGTERM, (143, 143), "error: rank 1 was stopped by SIGTERM", marks=pytest.mark.slow_sweep),
    ],
)
def test_a_rank_whose_partner_ends_in_a_forward_ends_within_a_minute(
    number: signal.Signals, statuses: tuple[int, int], said: str, place: Path, tmp_path: Path
) -> None:
    """Started by hand, as srun does: no launcher looks after them."""
    config = run_config(place / "plain", place / "data.jsonl", tmp_path / "cache", teacher={"parallelism": "fsdp"})
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "ACCELERATE_USE_CPU": "true", "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", RANK.format(number=int(number)), "--config", str(tmp_path / "run.yaml")]
        error = (tmp_path / f"rank{rank}.err").open("w")
        ranks.append(subprocess.Popen(command, env=environment, stderr=error, start_new_session=True))
    try:
        ranks[1].wait(300)
        begun = time.monotonic()
        ranks[0].wait(120)
        assert time.monotonic() - begun < 60
        assert (ranks[0].returncode, ranks[1].returncode) == statuses
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    text = (tmp_path / "rank0.err").read_text()
    assert said in text and "Traceback" not in text
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_ranks_take_turns_until_none_has_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([1, 1, 0])  # of the other rank
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(next(others)))
    turns = Turns(shared=True, device=CPU)
    assert turns.take(has_batch=True)
    assert turns.take(has_batch=False)
    assert not turns.take(has_batch=False)


def test_ranks_that_share_no_teacher_wait_for_nobody() -> None:
    turns = Turns(shared=False, device=CPU)  # there is no process group: a collective would raise
    assert turns.take(has_batch=True)
    assert not turns.take(has_batch=False)


def test_a_teacher_is_divided_among_several_ranks_only() -> None:
    found = {name: [is_divided(name, world_size=n) for n in (1, 2)] for name in ("replicate", "auto", "fsdp", "zero3")}
    assert found == {
        "replicate": [False, False],
        "auto": [False, False],
        "fsdp": [False, True],
        "zero3": [False, True],
    }


def test_what_several_processes_cannot_do_is_refused_with_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for parallelism in ("replicate", "fsdp", "zero3"):
        check_parallelism(parallelism, world_size=2)
    check_parallelism("auto", world_size=1)
    with pytest.raises(ConfigError, match=r"is auto, .* but 2 processes were started; start one, or take fsdp or"):
        check_parallelism("auto", world_size=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="DeepSpeed is not installed; pip install deepspeed, or take fsdp"):
        check_parallelism("zero3", world_size=2)
    check_parallelism("zero3", world_size=1)


def test_a_quantized_teacher_is_not_divided(place: Path, tmp_path: Path) -> None:
    config = run_config(place / "plain", place / "data.jsonl", tmp_path / "cache")
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    asked = ["teacher.parallelism=fsdp", "teacher.quantization={quant_method: bitsandbytes}"]
    with pytest.raises(ConfigError, match="divides no quantized weights; expected replicate or auto"):
        load_config(tmp_path / "run.yaml", asked)


def test_a_model_without_layers_is_refused() -> None:
    class Flat(torch.nn.Module):
        _no_split_modules = None

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.base_model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="Flat has no list of layers by which it could be divided"):
        divide(Flat(), "fsdp", device=CPU, world_size=2)  # type: ignore[arg-type]


def test_weights_are_whole_also_where_the_launcher_asks_for_those_of_rank_0_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    seen: list[str | None] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        return load(*arguments, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    load_teacher(TeacherConfig(model=str(place / "plain")), device=CPU, valid_ids=VOCAB)
    assert seen == ["false"]
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


class Partner:
    """The other ranks, of which one dies a little later than the connection to it."""

    def __init__(self, *, dies: bool) -> None:
        self.dies = dies

    def beat(self) -> None:
        """Give a sign of life."""

    def look(self) -> None:
        """Find the other rank dead."""
        if self.dies:
            raise RankStopped("rank 1 has died", exit_status=143)

    def fail(self, reason: str, *, status: int) -> None:
        """Hear why this rank ends."""

    leave = close = beat


@pytest.mark.parametrize("dies", [True, False])
def test_a_connection_that_closes_is_explained_by_what_is_found_of_the_other_rank(
    dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel_distill.alive.BEAT", 0.02)
    space = DiskSpace(tmp_path, min_free="1MB", max_bytes=None)
    watching = lookout.Lookout(Partner(dies=dies), space, rank=0, stop=None)  # type: ignore[arg-type]
    expected = (RankStopped, "rank 1 has died") if dies else (RuntimeError, "closed by peer")
    with watching, pytest.raises(expected[0], match=expected[1]), watching.explained():
        raise RuntimeError("Connection closed by peer")
