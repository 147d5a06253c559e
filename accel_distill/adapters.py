"""Low-rank adapters (LoRA) on a pretrained student, through peft: made, compared with a checkpoint's, merged.

The one decision: peft's own files are what is saved, so that they load wherever peft is. A merged student is made of
them when training is over, on one process, from the student as it was: so it does not matter how the weights were
divided. It costs to load the student once more.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_distill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accel_distill.config import LoraSection

log = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What must not change between a checkpoint and the run that goes on with it.
KEPT = ("r", "lora_alpha", "target_modules", "modules_to_save", "bias", "use_rslora", "rank_pattern", "alpha_pattern")


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """Keep to ourselves that peft calls transformers by a name that is going to change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


def require_peft() -> None:
    """Raise ConfigError where peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("student.lora needs peft, which is not installed: pip install 'accel-distill[lora]'")


def add_adapters(model: "PreTrainedModel", lora: "LoraSection", *, name: str, revision: str | None, seed: int) -> Any:
    """Freeze the student and put adapters on it; return the PeftModel.

    `name` and `revision` are the student's, and are written into what is saved. The adapters' first weights depend on
    `seed` alone, so that they are the same on all processes. Raises ConfigError for modules that are not there.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    settings = lora.model_dump(exclude={"merge"})
    try:
        config = LoraConfig(task_type="CAUSAL_LM", revision=revision, **settings)
        with _without_peft_warnings():
            adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"student.lora: {' '.join(str(error).split())}") from error
    # peft keeps the name as it was given, and a relative directory is found from one place only
    config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    trained, total = adapted.get_nb_trainable_parameters()
    log.info("adapters: %s of %s parameters are trained (%.2f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    return adapted


def check_same_adapters(checkpoint: Path, model: Any) -> None:
    """Raise ConfigError where a checkpoint has other adapters than the model, or only one of the two has any."""
    file = checkpoint / ADAPTER_FILES[0]
    has_adapters = hasattr(model, "peft_config")
    if file.is_file() != has_adapters:
        found, now = ("adapters", "has no student.lora") if not has_adapters else ("no adapters", "has student.lora")
        raise ConfigError(f"training.resume_from_checkpoint: {checkpoint} has {found}, and this run {now}; set it back")
    if not has_adapters:
        return
    saved, ours = json.loads(file.read_text(encoding="utf-8")), model.peft_config["default"].to_dict()
    for key in KEPT:
        then, this = (sorted(v) if isinstance(v, (list, set)) else v for v in (saved.get(key), ours[key]))
        if then != this:
            raise ConfigError(
                f"student.lora.{key} is {this} in this run, and was {then} in {checkpoint}; set it back, or start anew "
                "with training.resume_from_checkpoint=null and another training.output_dir"
            )


def merge_adapters(output_dir: Path, *, load: Callable[[], "PreTrainedModel"]) -> None:
    """Replace the adapters in `output_dir` by the whole student with them merged in; `load` gives it as it was."""
    from peft import PeftModel

    with _without_peft_warnings():
        merged = PeftModel.from_pretrained(load(), str(output_dir)).merge_and_unload()
    merged.save_pretrained(output_dir)
    for name in ADAPTER_FILES:  # with them, transformers would put the adapters on once more
        (output_dir / name).unlink()
    (output_dir / "README.md").unlink(missing_ok=True)  # peft's, which describes adapters
