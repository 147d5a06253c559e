"""`RUN/run_record.json`: with what a run was trained, as it was then: libraries, machine, student, cache.

The one decision: it is written when training begins, beside the run file, so that a run that crashed has it too, and a
report that is made later, elsewhere, says nothing of the machine that it is made on. A run that goes on from a
checkpoint replaces it: it says with what the run ended.
"""

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_distill import __version__
from accel_distill.publish import replace
from accel_distill.regular_file import MEBIBYTE, parse_json_object, read_regular

if TYPE_CHECKING:
    from torch import nn

    from accel_distill.cache import TeacherCache

FILE = "run_record.json"
LARGEST = 16 * MEBIBYTE  # bytes: the identity of a cache lists the dataset's files
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "tokenizers", "numpy")


def write_run_record(output_dir: Path, record: dict[str, Any]) -> None:
    """Put the record into a run's directory. Raises DiskGuard or RunError where it cannot be written."""
    replace(json.dumps(record, indent=1).encode(), output_dir / FILE, scratch=output_dir)


def read_run_record(output_dir: Path) -> dict[str, Any]:
    """Return the record; raise OSError where there is none, ValueError where it is not JSON."""
    return parse_json_object(read_regular(output_dir / FILE, limit=LARGEST))


def run_record(
    model: "nn.Module",
    cache: "TeacherCache | None",
    *,
    world_size: int,
    distributed_type: str,
    full_logits: str | None,
) -> dict[str, Any]:
    """Return what is to be kept; `full_logits` says why the head is not fused with the loss, where it is not."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": _versions(),
        "machine": _machine(),
        "world_size": world_size,
        "distributed_type": distributed_type,
        "student": _described(model),
        "cache": None if cache is None else _cache(cache),
        "full_logits": full_logits,
    }


def _versions() -> dict[str, str]:
    import torch

    found = {"accel_distill": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # deepspeed and peft need not be there
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _machine() -> dict[str, Any]:
    """Return what the main process runs on; other machines of the run are taken to be like it."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "gpus": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
    }


def _processor() -> str:
    """Return the processor's name; Python knows it on some systems only."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _described(model: "nn.Module") -> dict[str, Any]:
    parameters = list(model.parameters())
    sizes = [getattr(each, "ds_numel", each.numel()) for each in parameters]  # ZeRO-3 has divided them already
    trained = [size for size, each in zip(sizes, parameters, strict=True) if each.requires_grad]
    inner: Any = model
    adapters = 0
    if hasattr(model, "get_base_model"):  # of peft
        inner = inner.get_base_model()
        adapters = sum(size for (name, _), size in zip(model.named_parameters(), sizes, strict=True) if "lora_" in name)
    return {
        "class": type(inner).__name__,
        "parameters": sum(sizes) - adapters,
        "adapter_parameters": adapters,
        "trained_parameters": sum(trained),
    }


def _cache(cache: "TeacherCache") -> dict[str, Any]:
    return {
        "cache_id": cache.cache_id,
        "identity": cache.identity,
        "complete": cache.complete,
        "samples": cache.samples,
        "positions": int(cache.shard_positions.sum()),
        "bytes": int(cache.shard_bytes.sum()),
        "nonfinite": cache.nonfinite,
    }
