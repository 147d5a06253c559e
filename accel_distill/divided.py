"""A teacher that is too large for one device: divided among the ranks, or spread over the devices of one process.

The one decision: the base model is divided, with every decoder layer and the embeddings a unit that is put together
while it runs; the LM head stays whole on every rank. So the head's chunks need no other rank, and a rank holds its
share of the layers, the head, and the layers that are just running. Every forward is collective: all ranks run it,
each with a batch of its own of any shape, or all wait.
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from accel_distill.errors import ConfigError
from accel_distill.processes import join_deepspeed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Parallelism = Literal["replicate", "auto", "zero3", "fsdp"]
# stage3_param_persistence_threshold: small weights are divided too, as each layer is put together as a whole anyway.
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def is_divided(parallelism: Parallelism, *, world_size: int) -> bool:
    """Return whether the ranks share one teacher, so that each of its forwards is collective."""
    return parallelism in ("fsdp", "zero3") and world_size > 1


def check_parallelism(parallelism: Parallelism, *, world_size: int) -> None:
    """Raise ConfigError where so many processes cannot have their teacher that way."""
    if parallelism == "auto" and world_size > 1:
        raise ConfigError(
            f"teacher.parallelism is auto, which spreads one teacher over all devices of a machine, but {world_size} "
            "processes were started; start one, or take fsdp or zero3, which "
            "divide the teacher among the processes"
        )
    if parallelism == "zero3" and world_size > 1 and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "teacher.parallelism is zero3, but DeepSpeed is not installed; pip install deepspeed, or take fsdp, which "
            "divides the teacher with PyTorch alone"
        )


@contextmanager
def whole_loading() -> Iterator[None]:
    """Let transformers load all weights on every rank, where FSDP of accelerate asks for rank 0's alone."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def divide(model: "PreTrainedModel", how: Parallelism, *, device: torch.device, world_size: int) -> Any:
    """Divide a frozen model, loaded whole on the CPU, among all ranks; return what must live as long as the model.

    All ranks call it at the same time, in their process group. On `device` no rank ever holds more than its share of
    the base model, one unit, and what is not in the base model. Raises ConfigError for a model without layers.
    """
    base = model.base_model
    layers = _layers(model, base)
    _untie(model)
    outside = {id(parameter) for parameter in base.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in outside:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return {"fsdp": _with_fsdp, "zero3": _with_zero3}[how](model, base, layers, device=device, world_size=world_size)


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that this rank holds between two forwards."""
    from torch.distributed.tensor import DTensor

    def local(parameter: torch.Tensor) -> torch.Tensor:
        if isinstance(parameter, DTensor):
            return parameter.to_local()
        return getattr(parameter, "ds_tensor", parameter)

    return sum(local(parameter).nbytes for parameter in model.parameters())


def _layers(model: "PreTrainedModel", base: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, inner ones first."""
    names = set(model._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        layers = [*max(lists, key=len, default=[])]
    if not layers:
        raise ConfigError(
            f"teacher.parallelism: {type(model).__name__} has no list of layers by which it could be divided; take "
            "replicate or auto"
        )
    return layers[::-1]


def _untie(model: "PreTrainedModel") -> None:
    """Give the embeddings a parameter of their own, where it is the head's: the one is divided, the other is not."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and model.base_model is not model and embeddings.weight is head.weight:
        embeddings.weight = nn.Parameter(head.weight.detach(), requires_grad=False)


def _with_fsdp(
    model: "PreTrainedModel", base: nn.Module, layers: list[nn.Module], *, device: torch.device, world_size: int
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size,))
    for unit in [*layers, model.get_input_embeddings(), base]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def _with_zero3(
    model: "PreTrainedModel", base: nn.Module, layers: list[nn.Module], *, device: torch.device, world_size: int
) -> Any:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it prints its whole configuration
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)  # of torch 2.13 to DeepSpeed 0.19
    join_deepspeed()
    set_z3_leaf_modules(base, list({type(layer) for layer in layers}))
    deepspeed.zero.Init(module=base, config_dict_or_path=ZERO3)  # weight by weight; the engine alone would move all
    return deepspeed.initialize(model=base, config=ZERO3)[0]
