"""The sections of a run file as typed models, and how a run file becomes them.

The one decision: everything that the values alone can tell is checked here, before torch is imported, and a
value is what it is written as: "3" is no whole number and 1 is no boolean. Whatever needs a model, a dataset
or a cache to judge is judged by the command that loads it. Cost: the defaults stand twice, here and in the
template `run_file.yaml`; a test compares the two.
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from accel_distill.disk_space import parse_share, parse_size
from accel_distill.divergences import Divergence, TargetKind, TopKTail, refused_divergence, refused_tail
from accel_distill.errors import ConfigError
from accel_distill.explain import WrongValue, first_mistake, mismatch
from accel_distill.run_file import apply_overrides, parse_override, read_run_file, to_yaml
from accel_distill.teacher_mode import NO_CACHE_OF_DENSE, check_online
from accel_distill.training_arguments import check_training

if TYPE_CHECKING:
    from accel_distill.codec import Method

LOCAL_FORMATS = ("json", "text", "parquet", "csv")  # readers of local files, for which data_files says which
LARGEST_SEED = 2**63 - 1  # an int64

STREAM_NEEDS_A_CAP = (
    "max_samples MUST be specified for streaming datasets! A stream may have no end in sight (FineWeb: "
    "15 trillion tokens), and all that is read is stored; add for example dataset.max_samples=10000"
)


def _expand_user(value: Any) -> Any:
    """Expand a leading ~ of text; what is no text is left for its type to refuse."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _to_path(value: Any) -> Any:
    return Path(os.path.expanduser(value)) if isinstance(value, str) and value else value


def _checked_size(value: Any) -> Any:
    if not parse_size(value):
        raise WrongValue("", mismatch(value, "bytes above 0, such as 500GB"))
    return value


def _checked_reserve(value: Any) -> Any:
    if parse_size(value) is None and parse_share(value) is None:
        raise WrongValue("", mismatch(value, "bytes, such as 20GB, or a share of the disk, such as 5%"))
    return value


def _checked_modules(value: Any) -> Any:
    names = value if isinstance(value, list) else [value]
    if value is not None and not (names and all(isinstance(name, str) and name for name in names)):
        raise WrongValue("", mismatch(value, "text or a list of texts"))
    return value


def _checked_training(values: dict[str, Any]) -> dict[str, Any]:
    check_training(values)
    return {name: _expand_user(value) if name == "output_dir" else value for name, value in values.items()}


Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(_expand_user)]  # a name on the hub, or a path
Names = Annotated[list[Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Power = Annotated[float, Field(gt=0, le=10)]
Size = Annotated[int | str, BeforeValidator(_checked_size)]
Reserve = Annotated[int | str, BeforeValidator(_checked_reserve)]
Modules = Annotated[str | list[str], BeforeValidator(_checked_modules)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Strict types, no unknown keys, no assignment."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TeacherConfig(Section):
    """The model whose distributions are cached, or learned from while it runs (`mode: online`), and how it runs."""

    model: Place
    mode: Literal["cached", "online"] = "cached"
    revision: Text | None = None
    dtype: Dtype = "auto"
    attn_implementation: Text | None = None
    trust_remote_code: bool = False
    tokens_per_batch: Count = 16_384  # padded tokens; a longer sample is a batch of its own
    head_chunk: Count = 256  # positions whose logits exist at once
    quantization: dict[str, Any] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"  # where a logit is NaN or infinite
    parallelism: Literal["replicate", "auto", "zero3", "fsdp"] = "replicate"  # whole in each process, or not

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if self.quantization and self.parallelism in ("zero3", "fsdp"):
            problem = f"is {self.parallelism}, which divides no quantized weights; expected replicate or auto"
            raise WrongValue("parallelism", problem)
        return self


class DatasetConfig(Section):
    """The text, and how it becomes samples."""

    name: Text
    config_name: Text | None = None
    data_files: Annotated[list[Place], Field(min_length=1), BeforeValidator(_to_list)] | None = None
    split: Text = "train"
    revision: Text | None = None
    text_column: Text = "text"
    streaming: bool = False
    max_samples: Annotated[int, Field(ge=1, le=10**12)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 2048  # tokens; one token alone has no next
    eval_samples: Annotated[int, Field(ge=0)] = 256
    add_special_tokens: bool = True
    append_eos: bool = True
    long_documents: Literal["truncate", "split"] = "truncate"
    shuffle_files: Seed | None = None

    def missing_files(self) -> list[str]:
        """Return the local paths and globs in `data_files` that name no file here."""
        local = [] if "/" in self.name else self.data_files or []  # of a dataset on the hub they are the hub's
        return [pattern for pattern in local if "://" not in pattern and not glob.glob(pattern, recursive=True)]

    @model_validator(mode="after")
    def _check(self) -> "DatasetConfig":
        if self.streaming and self.max_samples is None:
            raise WrongValue("max_samples", STREAM_NEEDS_A_CAP)
        if self.name in LOCAL_FORMATS and self.data_files is None:
            raise WrongValue("data_files", f"is missing; {self.name!r} is read from the files that it names")
        if self.max_samples is not None and self.eval_samples >= self.max_samples:
            default = "" if "eval_samples" in self.model_fields_set else " (the default)"
            problem = f"is {self.eval_samples}{default} of {self.max_samples} samples, so none is left to train on"
            advice = f"expected less, so add for example dataset.eval_samples={self.max_samples // 10}"
            raise WrongValue("eval_samples", f"{problem}; {advice}")
        return self


class TargetsConfig(Section):
    """What is stored of a distribution, or with an online teacher learned from it."""

    method: TargetKind = "threshold"
    threshold: Annotated[float, Field(ge=1e-6, lt=1)] = 0.03  # 1e-6: weights in units of 2**-24, exact in float32
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64
    draws: Annotated[int, Field(ge=1, le=65_535)] = 50
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    seed: Seed = 0

    @property
    def sampled(self) -> "Method":
        """The method, which is not `dense`: so it is in every run with a cache."""
        assert self.method != "dense"
        return self.method

    @property
    def parameter(self) -> float:
        """The number that belongs to the sampled method: the threshold, k, or the number of draws."""
        return {"threshold": self.threshold, "top_k": self.top_k, "random": self.draws}[self.sampled]

    @property
    def described(self) -> str:
        """The method and its number, for people."""
        return self.method if self.method == "dense" else f"{self.method} {self.parameter:g}"


class CacheConfig(Section):
    """Where the cache is, and its layout; unset lanes are the number of processes that create it."""

    path: Annotated[Path, BeforeValidator(_to_path)]
    samples_per_shard: Annotated[int, Field(ge=1, le=10**6)] = 1024
    lanes: Annotated[int, Field(ge=1, le=1000)] | None = None  # three digits in a shard's name
    min_free_disk: Reserve | None = None  # bytes or a share; unset, 5 % of the disk but at most 20 GB
    max_bytes: Size | None = None  # of all files of the cache
    allow_partial: bool = False  # train on what is there of a cache that is not complete


class LoraSection(Section):
    """Adapters on a pretrained student: peft's LoraConfig, those of its fields that need nothing but their value."""

    r: Count = 8
    lora_alpha: Count = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Modules = "all-linear"  # all but the head; or names, or a regular expression
    exclude_modules: Annotated[str | list[str] | None, BeforeValidator(_checked_modules)] = None
    modules_to_save: Names | None = None  # trained whole, and saved with the adapters
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    rank_pattern: dict[Text, Count] = {}
    alpha_pattern: dict[Text, Count] = {}
    merge: bool = False  # ours: save the whole student, with the adapters merged into it


class StudentConfig(Section):
    """The model that is trained: pretrained (`model`), or from scratch (`config`: a model_type and sizes)."""

    model: Place | None = None
    revision: Text | None = None
    config: dict[str, Any] | None = None
    dtype: Dtype = "float32"
    attn_implementation: Text | None = None
    trust_remote_code: bool = False
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _check(self) -> "StudentConfig":
        if self.model is None and self.config is None:
            raise WrongValue("model", "neither student.model nor student.config is there; expected one")
        if self.model is not None and self.config is not None:
            problem = f"student.model is {self.model!r} and student.config is there too; expected one of the two"
            raise WrongValue("config", f"{problem} (student.model=null unsets it)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise WrongValue("config.model_type", "is missing; expected an architecture, such as llama")
        if self.lora is not None and self.model is None:
            problem = "adapters train a model that is there already, and student.config makes a random one"
            raise WrongValue("lora", f"{problem}; set student.model, or leave student.lora out")
        return self


class LossConfig(Section):
    """kd_weight * divergence(teacher, student) + ce_weight * cross-entropy of the true next token."""

    divergence: Divergence = "forward_kl"
    kd_weight: Weight = 1.0
    ce_weight: Weight = 0.0
    top_k_tail: TopKTail = "bucket"
    jsd_beta: Share = 0.5
    skew: Share = 0.1
    alpha: Power = 0.2
    beta: Power = 0.7

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if self.kd_weight == self.ce_weight == 0:
            raise WrongValue("kd_weight", "loss.kd_weight and loss.ce_weight are both 0; expected one above 0")
        return self


class RunConfig(Section):
    """One experiment. `training` goes to `transformers.TrainingArguments` as it stands."""

    teacher: TeacherConfig
    dataset: DatasetConfig
    targets: TargetsConfig = TargetsConfig()
    # Not there where the teacher is online: whatever reads a cache refuses such a run first (teacher_mode.py).
    cache: CacheConfig = None  # type: ignore[assignment]
    student: StudentConfig | None = None
    loss: LossConfig = LossConfig()
    training: Annotated[dict[str, Any], AfterValidator(_checked_training)] = {}

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        method, loss = self.targets.method, self.loss
        if self.teacher.mode == "online":
            check_online(
                self.training,
                on_nonfinite=self.teacher.on_nonfinite,
                streaming=self.dataset.streaming,
                long_documents=self.dataset.long_documents,
            )
        elif method == "dense":
            raise WrongValue("targets.method", NO_CACHE_OF_DENSE)
        elif self.cache is None:
            raise WrongValue("cache.path", "is missing")
        if problem := refused_divergence(method, loss.divergence):
            raise WrongValue("loss.divergence", problem)
        if problem := refused_tail(method, loss.top_k_tail):
            raise WrongValue("loss.top_k_tail", problem)
        return self


SECTIONS: dict[str, type[Section] | None] = {
    "teacher": TeacherConfig,
    "dataset": DatasetConfig,
    "targets": TargetsConfig,
    "cache": CacheConfig,
    "student": StudentConfig,
    "loss": LossConfig,
    "training": None,
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run file with its overrides (`section.key=value`). Raises `ConfigError`, for any mistake."""
    replaced = [parse_override(text) for text in overrides]
    values = apply_overrides(read_run_file(path), replaced)
    # `loss:` with nothing below it is a section of defaults; an unknown name stays, to be refused
    given = {name: section for name, section in values.items() if section is not None or name not in SECTIONS}
    needed: dict[str, Any] = {"teacher": {}, "dataset": {}}
    teacher = given.get("teacher")
    if not (isinstance(teacher, dict) and teacher.get("mode") == "online"):
        needed["cache"] = {}
    try:
        return RunConfig.model_validate({**needed, **given})
    except ValidationError as error:
        keys = {name: list(section.model_fields) if section else [] for name, section in SECTIONS.items()}
        keys["student.lora"] = list(LoraSection.model_fields)
        raise ConfigError(first_mistake(error, source=str(path), overrides=replaced, sections=keys)) from error


def resolved_yaml(config: RunConfig) -> str:
    """Return every value of a configuration, defaults and overrides included, as a run file."""
    return to_yaml(config.model_dump(mode="json", exclude={"cache"} if config.cache is None else None))
