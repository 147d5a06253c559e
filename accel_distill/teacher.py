"""The teacher: loads a causal language model and turns a batch of token sequences into sparse targets.

The one decision: logits exist only for `head_chunk` positions at a time, and each chunk is sampled before the next one
is computed. Padding never reaches the head. How it is spread over devices and ranks (`divided.py`)
changes nothing else.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from accel_distill.codec import Method
from accel_distill.divided import divide, held_bytes, is_divided, whole_loading
from accel_distill.errors import ConfigError, NotFinite, RunError
from accel_distill.figures import size
from accel_distill.lm_head import device_of, separate_head
from accel_distill.targets import SparseTargets, concatenate, no_targets, read_logits, sample
from accel_distill.tokens import TokenSequence

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from accel_distill.config import TeacherConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How targets are made from the teacher's logits."""

    method: Method
    parameter: float
    temperature: float
    seed: int


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says of the positions of a batch that have a next token, sequence after sequence."""

    targets: SparseTargets
    entropy: np.ndarray  # (P,) float64, nats, at the sampling's temperature
    logprob: np.ndarray  # (P,) float64: of the true next token, at temperature 1
    finite: np.ndarray  # (positions with a next token,) bool: the P that are here; all, unless the others were skipped


class SampledChunk(NamedTuple):
    """Targets of consecutive positions, on the teacher's device; a skipped position is in `finite` alone."""

    targets: SparseTargets
    entropy: Tensor  # (n,) float64, nats, at the sampling's temperature
    logprob: Tensor  # (n,) float64: of the true next token, at temperature 1
    finite: Tensor  # bool, of all positions of the chunk


class Teacher:
    """A frozen causal language model, on one device, on several, or divided among the ranks."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        head_chunk: int,
        valid_ids: int,
        vocab_size: int | None = None,
        engine: Any = None,
    ) -> None:
        """Take a loaded model; `valid_ids` is how many ids the tokenizer can make: logits beyond do not exist.

        Of a model that is divided among ranks (`engine` is what `divide` returned, `vocab_size` what it may not show
        any more) all of them do this at the same time: it runs twice.
        """
        self._engine = engine  # takes its hooks off the model when nobody holds it
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size or output_width(model)
        self._first_device = device_of(model.get_input_embeddings())
        output = model.get_output_embeddings()
        self.device = self._first_device if output is None else device_of(output)  # of targets
        self.head_chunk, self.valid_ids = head_chunk, min(valid_ids, self.vocab_size)
        self.head, reason = separate_head(model)  # whole on every rank; None: it cannot be told from the rest
        if self.head is None:
            log.warning("%s: the logits of a whole batch will exist at once (%s)", type(model).__name__, reason)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Run the base model over ids (B, T); return what the head reads, (B, T, D), in the teacher's own dtype.

        Of a teacher that is divided among ranks all of them call it, as often as each other; shapes may differ.
        """
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return self._run(self.model.base_model, inputs).last_hidden_state.to(self.device)

    @torch.no_grad()
    def all_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Run the whole model over ids (B, T); return its logits (B, T, V): for a teacher whose `head` is None.

        Of a teacher that is divided among ranks all of them call it, as `hidden_states`.
        """
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return self._run(self.model, inputs).logits.to(self.device)

    def take_part(self) -> None:
        """Take part in one forward of the ranks that share this teacher, without a batch of one's own."""
        ids = torch.zeros(1, 2, dtype=torch.int64)
        if self.head is None:
            self.all_logits(ids)
        else:
            self.hidden_states(ids)

    @torch.no_grad()
    def targets_for(
        self,
        batch: Sequence[TokenSequence],
        *,
        sampling: Sampling,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        report: Callable[[int], None] | None = None,
    ) -> TeacherOutput:
        """Run the teacher once over a batch and sample a target at each position that has a next token.

        `report` is called with the number of positions of each chunk that is done. Where a logit is not finite, raises
        NotFinite, naming sample and position, or skips the position.
        """
        ids, mask = _padded(batch, self.device)
        has_next = mask[:, 1:]
        index = torch.tensor([row.sample_index for row in batch], device=self.device)
        start = torch.tensor([row.start for row in batch], device=self.device)
        width = torch.arange(ids.shape[1] - 1, device=self.device)
        chunks = self.sampled_chunks(
            self.read(ids, mask, has_next),
            next_ids=ids[:, 1:][has_next],
            samples=index[:, None].expand_as(has_next)[has_next],
            positions=(start[:, None] + width)[has_next],
            sampling=sampling,
            on_nonfinite=on_nonfinite,
        )
        targets, entropy, logprob, finite = [no_targets(sampling.method, sampling.parameter)], [], [], []
        for chunk in chunks:
            targets.append(chunk.targets.cpu())
            entropy.append(chunk.entropy.cpu().numpy())
            logprob.append(chunk.logprob.cpu().numpy())
            finite.append(chunk.finite.cpu().numpy())
            if report:
                report(len(targets[-1]))
        none, nothing = [np.zeros(0)], [np.zeros(0, bool)]
        return TeacherOutput(
            concatenate(targets),
            np.concatenate(none + entropy),
            np.concatenate(none + logprob),
            np.concatenate(nothing + finite),
        )

    def sampled_chunks(
        self,
        logits_of: Callable[[slice], Tensor],
        *,
        next_ids: Tensor,
        samples: Tensor,
        positions: Tensor,
        sampling: Sampling,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> Iterator[SampledChunk]:
        """Yield the targets of P positions, `head_chunk` at a time, on the device; see `targets_for`.

        `logits_of` is what `read` gives; `next_ids`, `samples` (stream indices) and `positions` (in the document) are
        (P,) each.
        """
        for begin in range(0, len(next_ids), self.head_chunk):
            part = slice(begin, begin + self.head_chunk)
            chunk = read_logits(
                logits_of(part), next_ids=next_ids[part], temperature=sampling.temperature, valid_ids=self.valid_ids
            )
            is_finite, at = chunk.entropy.isfinite(), (samples[part], positions[part])
            if not is_finite.all():
                if on_nonfinite == "stop":
                    raise _not_finite(is_finite, *at)
                chunk, at = chunk.only(is_finite), (at[0][is_finite], at[1][is_finite])
            found = sample(
                chunk,
                method=sampling.method,
                parameter=sampling.parameter,
                seed=sampling.seed,
                sample_index=at[0],
                position=at[1],
            )
            entropy, logprob = chunk.entropy, chunk.logprob
            del chunk
            yield SampledChunk(found, entropy, logprob, is_finite)

    def rehearse(self, *, tokens: int, length: int) -> None:
        """Run the largest batch once, so that it runs out of memory in the first minute or not at all."""
        row = TokenSequence(0, 0, np.zeros(length, np.int64))
        sampling = Sampling("top_k", 1, 1.0, 0)
        try:
            self.targets_for([row] * max(1, tokens // length), sampling=sampling)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the device is too small for a batch of {tokens:,} tokens (teacher.tokens_per_batch) with the "
                f"logits of {self.head_chunk} positions (teacher.head_chunk) at once; lower one of them, or "
                "dataset.max_length"
            ) from error

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor, wanted: Tensor) -> Callable[[slice], Tensor]:
        """Run the model once; return a function from a range of wanted positions to their logits, to overwrite.

        `ids` and `mask` are (B, T), `wanted` (B, T - 1) bool; logits are (n, V), on `device`, in the model's dtype, and
        those of ids from `valid_ids` on mean nothing. It runs also where no position is wanted: of a teacher that is
        divided among ranks all of them call it, as `hidden_states`. Call what it returns without gradients and without
        autocast.
        """
        head, wanted = self.head, wanted.to(self.device)
        if head is None:
            logits = self.all_logits(ids, mask.long())[:, :-1][wanted]
            return lambda part: logits[part].clone()
        hidden = self.hidden_states(ids, mask.long())[:, :-1][wanted]
        return lambda part: head.logits(hidden[part])

    def _run(self, module: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        """Call the model, or its base model: accelerate's hook that moves inputs is on the former alone."""
        device = self._first_device
        there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with torch.autocast(device.type, enabled=False):  # of a student's training
            return module(**there)


def load_teacher_config(config: "TeacherConfig") -> "PretrainedConfig":
    """Load the configuration of the teacher's model; raise ConfigError where there is none."""
    from transformers import AutoConfig

    if (config.model.startswith(("/", ".", "~")) or config.model.count("/") > 1) and not Path(config.model).is_dir():
        raise ConfigError(f"teacher.model: {config.model} is not a directory here, nor the name of a model on the hub")
    try:
        return AutoConfig.from_pretrained(
            config.model, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"teacher.model: {config.model} brings code of its own, which does not run unasked; if you trust it, "
                "say teacher.trust_remote_code=true"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"teacher.model: {config.model} cannot be loaded: {reason}") from error


def load_teacher(config: "TeacherConfig", *, device: torch.device, valid_ids: int, world_size: int = 1) -> Teacher:
    """Load the teacher, frozen and in its own dtype, as `config.parallelism` says, for `world_size` ranks.

    Whole on `device`; on all devices of this machine (`auto`, and every division among 1 rank); or divided among the
    ranks of the process group, who then all call this at the same time, also beside a student of any backend.
    While a ZeRO-3 configuration is live, call it inside `processes.whole_weights`.
    """
    divided = is_divided(config.parallelism, world_size=world_size)
    with whole_loading():
        model = _load(config, device=device, is_divided=divided)
    vocab_size, engine = output_width(model), None
    assert not any(hasattr(weight, "ds_id") for weight in model.parameters()), "load it inside processes.whole_weights"
    if divided:
        whole = held_bytes(model)
        model.requires_grad_(False)
        engine = divide(model, config.parallelism, device=device, world_size=world_size)
        share = "the teacher is divided among %d processes (%s): %s of its %s on each, its head whole"
        log.info(share, world_size, config.parallelism, size(held_bytes(model)), size(whole))
    elif config.parallelism != "replicate":
        _say_places(config.parallelism, model)
    return Teacher(model, head_chunk=config.head_chunk, valid_ids=valid_ids, vocab_size=vocab_size, engine=engine)


def output_width(model: "PreTrainedModel") -> int:
    """Return how many logits a model has at a position."""
    output = model.get_output_embeddings()
    return model.config.get_text_config().vocab_size if output is None else output.weight.shape[0]


def _say_places(parallelism: str, model: "PreTrainedModel") -> None:
    """Say where the parts of a model are that one process spreads over its devices."""
    places = [str(place) for place in getattr(model, "hf_device_map", {"": model.device}).values()]
    counts = {place: places.count(place) for place in places}
    said = ", ".join(f"{count} on {place}" for place, count in counts.items())
    meaning = "" if parallelism == "auto" else ", which for one process is auto"
    log.info("teacher.parallelism is %s%s; the parts of the teacher: %s", parallelism, meaning, said)


def _load(config: "TeacherConfig", *, device: torch.device, is_divided: bool) -> "PreTrainedModel":
    """Load the model; one that will be divided onto the CPU, where safetensors of its dtype are mapped, not read."""
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {"quantization_config": config.quantization} if config.quantization else {}
    if config.parallelism != "replicate" and not is_divided:
        extra["device_map"] = "auto"
    elif not is_divided and (config.quantization or device.type == "cuda"):
        extra["device_map"] = {"": device}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            config.model,
            output_loading_info=True,
            revision=config.revision or "main",
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            **extra,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"teacher.model: {config.model} cannot be loaded: {' '.join(str(error).split())}") from error
    if missing := sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]})):
        raise ConfigError(
            f"teacher.model: {config.model} lacks {len(missing)} of its weights, which would be random: "
            f"{missing[0]}, ...; its config.json and its weight files do not belong together"
        )
    return model


def _padded(batch: Sequence[TokenSequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids (B, T) and the mask (B, T) bool of the tokens that are there, padded on the right."""
    lengths = torch.tensor([len(row.ids) for row in batch])
    ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = torch.from_numpy(np.concatenate([row.ids for row in batch]))
    return ids.to(device), mask.to(device)


def _not_finite(is_finite: Tensor, samples: Tensor, positions: Tensor) -> NotFinite:
    bad = (~is_finite).nonzero()
    first = int(bad[0])
    return NotFinite(
        f"the teacher's logits are not finite at position {int(positions[first])} of sample {int(samples[first])} "
        f"(and {len(bad) - 1} more of that chunk); try another teacher.dtype (bfloat16 or float32 for float16), or "
        "leave such positions out with teacher.on_nonfinite=skip"
    )
