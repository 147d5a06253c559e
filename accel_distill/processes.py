"""The processes of a run: rank, world size, device; and the check that the launcher started what was asked for.

The one decision: never go on with fewer processes than the environment speaks of, or without the backend that it asks
for. Launchers fall back silently: two processes that both believe to be rank 0 would write the same cache twice.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from accel_distill.errors import ConfigError, RankStopped, RunError

# Rank 0 hashes weights and counts tokens while the others wait.
SET_UP_TIMEOUT = timedelta(hours=2)
# Seconds that rank 0 has to say why a run ends, before the others leave: a launcher then ends all that are left.
SAID_AFTER = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of this run, as this one sees them."""

    rank: int
    world_size: int
    device: torch.device
    distributed_type: str  # accelerate's name, such as NO, MULTI_CPU, MULTI_GPU, DEEPSPEED, FSDP

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and return its (pickled) result on every rank.

        A RunError is raised on rank 0; the others leave with its exit status and without a word: it is said once.
        """
        if self.world_size == 1:
            return make()
        box: list[T | RunError | None] = [None]
        if self.is_main:
            try:
                box[0] = make()
            except RunError as error:
                _broadcast([error])
                raise
        _broadcast(box)
        if isinstance(box[0], RunError):
            time.sleep(SAID_AFTER)
            raise SystemExit(box[0].exit_status)
        return box[0]  # type: ignore[return-value]

    def set_up_logging(self) -> None:
        """Let rank 0 speak, the others only warn; and silence the libraries' own bars, which would cross ours."""
        import datasets
        import transformers

        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("accel_distill").setLevel(logging.INFO if self.is_main else logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
        if not self.is_main or not sys.stderr.isatty():  # in a file they would be thousands of lines
            datasets.disable_progress_bars()

    def leave(self) -> None:
        """Leave the process group at the end of a run; NCCL warns where that is left out."""
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def _broadcast(box: list[Any]) -> None:
    """Hand over what rank 0 has; raise RankStopped where one of the two has gone meanwhile."""
    from accelerate.utils import broadcast_object_list

    try:
        broadcast_object_list(box, from_process=0)
    except RuntimeError as error:  # of torch.distributed, when the connection is closed
        reason = " ".join(str(error).split())[:200]
        raise RankStopped(
            f"a rank ended before the run had begun ({reason}); see what it printed, then run the same command again"
        ) from error


def join_deepspeed() -> None:
    """Tell DeepSpeed of the process group: ZeRO-3, which divides weights as they are loaded, takes itself for alone."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False)


@contextmanager
def whole_weights(arguments: Any) -> Iterator[None]:
    """Let ZeRO-3 of these TrainingArguments divide no model that is made meanwhile: it would draw other weights."""
    if arguments.deepspeed_plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    live = getattr(arguments, "hf_deepspeed_config", None) or arguments.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(live)


def leave_processes() -> None:
    """Leave the process group, if there is one: a process that ends in it on an error can die of SIGABRT instead."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_deepspeed() -> None:
    """Tell DeepSpeed, which Trainer imports where it is there, that it is on a CPU: else it warns that it chose so."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start_processes() -> World:
    """Join the process group that the launcher made; raise ConfigError where it is not what was asked for."""
    from accelerate import PartialState

    if _is_set(os.environ, "ACCELERATE_USE_DEEPSPEED") and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "ACCELERATE_USE_DEEPSPEED is set, but no launcher started this process, and DeepSpeed needs one, also for "
            "one process; use launch/train.sh N with ACCELERATE_CONFIG=configs/accelerate/zero2.yaml, or torchrun"
        )
    quiet_deepspeed()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=SET_UP_TIMEOUT)
    check_processes(os.environ, found=state.num_processes, has_gpu=torch.cuda.is_available())
    return World(state.process_index, state.num_processes, state.device, state.distributed_type.value)


def check_processes(environment: Mapping[str, str], *, found: int, has_gpu: bool) -> None:
    """Raise ConfigError where the number of processes `found` is not what the environment speaks of."""
    expected = int(environment.get("WORLD_SIZE", found))
    if expected != found:
        raise ConfigError(
            f"the launcher started {expected} processes, but each of them is alone (world size {found}), so they "
            "would do the same work; start them with launch/generate.sh or launch/train.sh, or set "
            "ACCELERATE_USE_CPU=true"
        )
    # accelerate sets the port when it is asked for several processes; without a GPU it then starts one
    asked_for_more = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if found == 1 and asked_for_more and not has_gpu and "WORLD_SIZE" not in environment:
        raise ConfigError(
            "accelerate was asked for several processes, but there is no GPU, and then it starts one; for N "
            "processes use launch/generate.sh N or launch/train.sh N, for one "
            "`accelerate launch --num_processes 1` (and no MASTER_PORT)"
        )


def check_backend(environment: Mapping[str, str], *, distributed_type: str) -> None:
    """Raise ConfigError where DeepSpeed or FSDP was asked for and something else runs."""
    for name in ("DEEPSPEED", "FSDP"):
        if _is_set(environment, f"ACCELERATE_USE_{name}") and distributed_type != name:
            raise ConfigError(
                f"ACCELERATE_USE_{name} is set, but the run is {distributed_type}: the configuration was not taken up "
                "(accelerate does this silently on a machine without a GPU, and with ACCELERATE_USE_CPU=true)"
            )


def refuse_sharding(environment: Mapping[str, str], *, parallelism: str) -> None:
    """Raise ConfigError where the launcher was asked for DeepSpeed or FSDP, and the run file divides no teacher so."""
    for name, wanted in (("DEEPSPEED", "zero3"), ("FSDP", "fsdp")):
        if _is_set(environment, f"ACCELERATE_USE_{name}") and parallelism != wanted:
            raise ConfigError(
                f"ACCELERATE_USE_{name} is set, but teacher.parallelism is {parallelism}: generate divides a teacher "
                f"as its run file says, whatever launches it; set teacher.parallelism={wanted}, or launch it with "
                "launch/generate.sh N, or with configs/accelerate/ddp.yaml"
            )


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
