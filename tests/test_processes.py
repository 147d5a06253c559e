"""The processes of a run: every silent fallback of a launcher is refused, and an error is said by one rank."""

import time
from typing import Any

import pytest
import torch

from accel_distill.errors import CacheMismatch, ConfigError, RankStopped
from accel_distill.processes import World, check_backend, check_processes, refuse_sharding, start_processes

# What launchers leave in the environment, taken down from accelerate 1.15 and torchrun of torch 2.13.
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
ASKED_FOR_TWO = {**ONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "found", "has_gpu"),
    [
        ({}, 1, False),  # python -m
        ({}, 1, True),
        (ONE, 1, False),  # accelerate launch, one process
        (ONE, 1, True),
        (TORCHRUN, 2, False),
        (TORCHRUN, 2, True),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, 1, False),
        ({**TORCHRUN, **ASKED_FOR_TWO}, 2, False),  # accelerate launch --multi_gpu with ACCELERATE_USE_CPU=true
        ({**TORCHRUN, **ASKED_FOR_TWO, "WORLD_SIZE": "1"}, 1, False),  # one of a torchrun that accelerate started
        ({"MASTER_PORT": "29500"}, 1, False),  # a cluster that sets a port for everybody
        (ASKED_FOR_TWO, 1, True),
    ],
)
def test_the_processes_that_were_asked_for_are_accepted(environment: dict[str, str], found: int, has_gpu: bool) -> None:
    check_processes(environment, found=found, has_gpu=has_gpu)


def test_two_processes_that_each_believe_to_be_alone_are_refused() -> None:
    for has_gpu in (False, True):
        with pytest.raises(ConfigError, match=r"started 2 processes, but each of them is alone .*launch/generate.sh"):
            check_processes({**TORCHRUN, "ACCELERATE_USE_CPU": "true"}, found=1, has_gpu=has_gpu)


def test_one_process_where_accelerate_was_asked_for_two_is_refused() -> None:
    """`accelerate launch --cpu --num_processes 2`, and configurations with `distributed_type: MULTI_CPU`."""
    for environment in (ASKED_FOR_TWO, {**ASKED_FOR_TWO, "ACCELERATE_USE_CPU": "True"}):
        with pytest.raises(
            ConfigError, match="asked for several processes, but there is no GPU, and then it starts one"
        ):
            check_processes(environment, found=1, has_gpu=False)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
@pytest.mark.parametrize("value", ["true", "True", "1"])
def test_a_backend_that_was_not_taken_up_is_refused(name: str, value: str) -> None:
    environment = {f"ACCELERATE_USE_{name}": value}
    check_backend(environment, distributed_type=name)
    for found in ("NO", "MULTI_CPU", "MULTI_GPU"):
        with pytest.raises(ConfigError, match=f"ACCELERATE_USE_{name} is set, but the run is {found}"):
            check_backend(environment, distributed_type=found)


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}])
def test_without_a_backend_asked_for_any_is_accepted(environment: dict[str, str]) -> None:
    for found in ("NO", "MULTI_CPU", "MULTI_GPU"):
        check_backend(environment, distributed_type=found)


@pytest.mark.parametrize(("name", "parallelism"), [("DEEPSPEED", "zero3"), ("FSDP", "fsdp")])
def test_a_launcher_that_divides_a_teacher_must_be_asked_for_by_the_run_file(name: str, parallelism: str) -> None:
    environment = {f"ACCELERATE_USE_{name}": "true"}
    refuse_sharding(environment, parallelism=parallelism)
    refuse_sharding({}, parallelism="replicate")
    for other in {"replicate", "auto", "zero3", "fsdp"} - {parallelism}:
        with pytest.raises(
            ConfigError, match=rf"ACCELERATE_USE_{name} .* is {other}: .*parallelism={parallelism}, or "
        ):
            refuse_sharding(environment, parallelism=other)


def test_a_process_without_a_launcher_is_rank_0_of_1() -> None:
    world = start_processes()
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert world.from_main(lambda: 7) == 7
    world.leave()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What rank 0 broadcasts; the other ranks then get it."""
    box: list[Any] = []

    def broadcast(objects: list[Any], from_process: int) -> None:
        assert from_process == 0
        if box:
            objects[:] = box
        else:
            box.extend(objects)

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", broadcast)
    return box


def rank(number: int) -> World:
    return World(number, 2, torch.device("cpu"), "MULTI_CPU")


def never() -> int:
    raise AssertionError("only rank 0 makes it")


def test_what_rank_0_makes_is_what_every_rank_gets(sent: list[Any]) -> None:
    assert rank(0).from_main(lambda: 42) == 42
    assert sent == [42]
    assert rank(1).from_main(never) == 42


@pytest.mark.parametrize("number", [0, 1])
def test_a_connection_that_closes_while_the_cache_is_opened_is_one_sentence(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(objects: list[Any], from_process: int) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38411")

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", closed)
    with pytest.raises(RankStopped, match="a rank ended before the run had begun .*Connection closed by peer"):
        rank(number).from_main(lambda: 42)


def test_an_error_of_rank_0_is_said_by_rank_0_and_the_others_leave_with_its_status(sent: list[Any]) -> None:
    def refuse() -> int:
        raise CacheMismatch("other settings")

    with pytest.raises(CacheMismatch, match="other settings"):
        rank(0).from_main(refuse)
    assert isinstance(sent[0], CacheMismatch)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as left:
        rank(1).from_main(never)
    assert left.value.code == 5
    assert time.monotonic() - begun > 0.5  # so that rank 0 is heard before a launcher ends it
