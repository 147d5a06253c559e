"""The student: a pretrained causal language model, or one from scratch, that fits a cache.

The one decision: whatever can be known of a student without its weights is checked before they are loaded:
tokenizer, vocabulary, positions. A pretrained student must have the cache's tokenizer by content; one without
any tokenizer is believed to, and that is said.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.explain import did_you_mean
from accel_distill.tokens import check_same_tokenizer, load_tokenizer, tokenizer_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from accel_distill.config import StudentConfig

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def load_student(
    config: "StudentConfig",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    vocab_size: int,
    max_length: int,
    seed: int,
) -> "PreTrainedModel":
    """Load or make the student of a cache: `tokenizer`, `vocab_size` (the teacher's) and `max_length` are its.

    Raises ConfigError for a model that is not there or too short for `max_length` tokens, CacheMismatch for
    another tokenizer or a smaller vocabulary.
    """
    if config.model is None:
        return _from_scratch(config, tokenizer, vocab_size=vocab_size, max_length=max_length, seed=seed)
    return _pretrained(config, tokenizer, max_length=max_length)


def _pretrained(config: "StudentConfig", tokenizer: "PreTrainedTokenizerBase", *, max_length: int) -> "PreTrainedModel":
    assert config.model is not None
    where = f"student.model {config.model}"
    looks_like_path = config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    if looks_like_path and not Path(config.model).is_dir():
        raise ConfigError(f"{where}: there is no such directory; name one, or a model on the hub")
    source: dict[str, Any] = {
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        model_config = AutoConfig.from_pretrained(config.model, **source)
        _check_tokenizer(config, tokenizer)
        _check_fits(model_config, tokenizer, max_length=max_length, where=where)
        model, found = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **source,
        )
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{where} cannot be loaded: {' '.join(str(error).split())}") from error
    _check_complete(found, where=where)
    return model


def _check_complete(found: dict[str, Any], *, where: str) -> None:
    """Refuse a checkpoint that lacks weights or has them in other shapes: transformers makes random ones instead."""
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"{where}: {len(missing):,} weights of the model are not in its files, the first is {missing[0]}; "
            "take a complete checkpoint of a causal language model"
        )
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ConfigError(
            f"{where}: {len(mismatched):,} weights have another shape than its config.json says, the first is {name}: "
            f"found {tuple(stored)}, expected {tuple(expected)}; take a checkpoint with its own config.json"
        )


def _from_scratch(
    config: "StudentConfig",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    vocab_size: int,
    max_length: int,
    seed: int,
) -> "PreTrainedModel":
    """Make a random model of the sizes in `student.config`; what these leave open follows from the cache."""
    sizes = dict(config.config or {})
    model_type = sizes.pop("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = did_you_mean(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(
            f"student.config.model_type: {model_type!r} is no causal language model of transformers; "
            f"{near or 'expected one such as llama, qwen3, gpt2'}"
        )
    known = AutoConfig.for_model(model_type)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    filled = {"vocab_size": vocab_size, **ids}
    if hasattr(known, "max_position_embeddings"):
        filled["max_position_embeddings"] = max(max_length, known.max_position_embeddings)
    own = known.attribute_map  # gpt2 says n_positions: under two names, the common one would win
    merged = {own.get(name, name): value for values in (filled, sizes) for name, value in values.items()}
    with _impossible_sizes(model_type):
        model_config = AutoConfig.for_model(model_type, **deepcopy(merged))  # it writes into mappings
    _check_names(sizes, model_config, known=known)
    _check_kept(sizes, model_config)
    _check_fits(model_config, tokenizer, max_length=max_length, where="student.config")
    set_seed(seed)  # the same student on every process and in every run
    with _impossible_sizes(model_type):
        return AutoModelForCausalLM.from_config(
            model_config,
            dtype="float32" if config.dtype == "auto" else config.dtype,
            attn_implementation=config.attn_implementation,
        )


@contextmanager
def _impossible_sizes(model_type: str) -> Iterator[None]:
    """Turn what a model's own code raises for sizes that it cannot have, which may be anything, into a sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise ConfigError(
            f"student.config: no {model_type} can be made of it: {type(error).__name__}: {reason}"
        ) from error


def _check_tokenizer(config: "StudentConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Compare a pretrained student's own tokenizer, where it has one, with the cache's."""
    assert config.model is not None
    files = (
        cached_file(config.model, name, revision=config.revision, _raise_exceptions_for_missing_entries=False)
        for name in TOKENIZER_FILES
    )
    if not any(files):
        log.warning("student.model %s has no tokenizer: taken to have been trained with the cache's", config.model)
        return
    own = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    check_same_tokenizer(tokenizer, own, name=f"student.model {config.model}")


def _check_fits(
    config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", *, max_length: int, where: str
) -> None:
    """Refuse a student that lacks ids of the tokenizer or positions of the cached samples; wider ones fit."""
    text = config.get_text_config()
    needed = tokenizer_size(tokenizer)
    if text.vocab_size < needed:
        raise CacheMismatch(
            f"{where}: vocab_size is {text.vocab_size:,}, but the cache's tokenizer makes ids up to {needed - 1:,}; "
            f"expected at least {needed:,}"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise ConfigError(
            f"{where}: max_position_embeddings is {positions:,}, but the samples of the cache have up to "
            f"{max_length:,} tokens; take a longer student, or generate a cache with dataset.max_length={positions}"
        )


def _check_names(sizes: dict[str, Any], made: "PretrainedConfig", *, known: "PretrainedConfig") -> None:
    """Refuse a name that the model's configuration does not have: transformers keeps it and ignores it."""
    names = {*known.to_dict(), *known.attribute_map}
    for name in sizes:
        if name not in names and hasattr(made, name):
            near = did_you_mean(name, names) or f"see the configuration of {made.model_type} in transformers"
            raise ConfigError(f"student.config.{name}: unknown key; {near}")


def _check_kept(sizes: dict[str, Any], made: "PretrainedConfig") -> None:
    """Refuse a value that the model's configuration replaced; null asks for that, and a dtype is only spelled anew."""
    for name, value in sizes.items():
        kept = getattr(made, name, value)  # some are taken in under another name, as rope_theta is
        if value is not None and not isinstance(kept, torch.dtype) and not _holds(kept, value):
            raise ConfigError(
                f"student.config.{name}: found {value!r}, but the {made.model_type} made of it has {kept!r}; "
                "leave it out, or the key that it contradicts"
            )


def _holds(kept: Any, value: Any) -> bool:
    """Say whether `kept` is `value`; a mapping may have become a configuration, and have more keys."""
    if isinstance(value, dict):
        kept = kept.to_dict() if hasattr(kept, "to_dict") else kept
        return isinstance(kept, dict) and all(key not in kept or _holds(kept[key], value[key]) for key in value)
    return bool(list(kept) == value if isinstance(kept, tuple) else kept == value)
