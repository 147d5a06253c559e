"""`DistillationTrainer`: transformers' Trainer with a loss from a teacher's targets, cached or made now.

The one decision: every figure is a sum over positions divided by a count of positions, and both are summed
over micro-batches and processes before the division, in training, in the logs and in evaluation. So neither
gradient accumulation nor the number of processes nor ragged lengths change it. It costs that the Trainer's
own averages (over batches, over sequences) cannot be used.

`kd` is the divergence of the loss and `kl` is KL(teacher || student), the same where the loss is the forward KL; both
with the factor T^2. From `top_k` targets they are of k + 1 outcomes, a lower bound.
"""

import logging
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer, TrainingArguments

from accel_distill.batch_targets import Batch, TargetsOf, Taught, cached_targets, labels_of
from accel_distill.errors import ConfigError, RunError
from accel_distill.filled_rows import FilledRows, FilledSampler, filled
from accel_distill.fused_head import FullLogits, Ran
from accel_distill.head_probe import fuse_head
from accel_distill.losses import Objective
from accel_distill.packing_probe import packing_fault
from accel_distill.packs import PackedCache
from accel_distill.recent_losses import RecentLosses
from accel_distill.shuffle import training_sampler
from accel_distill.text_rows import StreamRows

log = logging.getLogger(__name__)

BINS = 15  # of equal width, for the expected calibration error
SUMS = 6 + 3 * BINS  # positions, kd, ce, kl, agreed, teacher_logprob; then by bin positions, confidence, correct


class DistillationTrainer(Trainer):
    """Train and evaluate on an `Objective`, a mean over positions."""

    # The loss is divided by the positions of all micro-batches of a step: not by their number again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective | None = None,
        targets_of: TargetsOf = cached_targets,
        **trainer_arguments: Any,
    ) -> None:
        """Take the objective for the targets of `targets_of`; the rest goes to `Trainer` as it is."""
        # One process with several GPUs: nn.DataParallel would cut the flat targets into equal pieces.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(model, args, compute_metrics=self._metrics, **trainer_arguments)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labels of a whole step
        self.objective, self._targets_of = objective or Objective(), targets_of
        self.full_logits: str | None = None  # why the head is not fused with the loss, where it is not
        self.calibration: dict[str, list[float]] = {}  # of the last evaluation, by bins of confidence
        self._head = self._make_head()
        # sums of kd, ce, kl, the teacher's ce; positions
        self._since_log = torch.zeros(5, dtype=torch.float64, device=args.device)
        self._has_gradient = False  # from its loss; seen in the first step
        self._keeps_documents_apart = False  # in packed rows; proved in the first step
        self._clock: float | None = None  # when counting began, less the time of evaluations
        self._waited = 0.0  # seconds for batches, since then
        self._recent = RecentLosses()
        self._stream_end: int | None = None  # items of a stream that ended before it was to

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch: its sum over positions by the positions of the whole step.

        The outputs are empty: there are no logits to keep.
        """
        if "position_ids" in inputs and not self._keeps_documents_apart:
            self._prove_packing(model)
        if self._clock is None:
            self._clock, self._waited = time.perf_counter(), 0.0
        positions = len(inputs["target_positions"])
        counted = torch.as_tensor(positions if num_items_in_batch is None else num_items_in_batch)
        factor = 1 / counted.clamp(min=1)  # a step without any target: 0 / 1, not 0 / 0
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            factor = factor * self.accelerator.num_processes  # the gradients of the processes are averaged
        ran, taught = self._run(model, inputs, factor=factor)
        entropy = taught.entropy.sum()
        kd, ce, kl = (loss.sum() for loss in ran.losses)
        teacher_ce = -taught.logprob.sum()
        self._since_log += torch.stack([kd - entropy, ce, kl - entropy, teacher_ce, ce.new_tensor(positions)])
        loss = ran.loss - self.objective.kd_weight * entropy * factor
        self._recent.note(self.state.global_step, inputs["sample_index"], loss)
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Train on a micro-batch; of the first one with a target, see that loss and KD give the student a gradient.

        A student that is its teacher has none from KD, and is looked at again.
        """
        if self._has_gradient or not len(inputs["target_positions"]):
            return super().training_step(model, inputs, num_items_in_batch)
        largest: list[Tensor] = []
        largest_kd: list[Tensor] = []
        self._head.watch = lambda gradient: largest.append(gradient.abs().max())
        self._head.watch_kd = largest_kd.append if self.objective.kd_weight else None
        before = float(self._since_log[0])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._head.watch, self._head.watch_kd, self._has_gradient = None, None, True
        if self.objective.kd_weight and not any(largest_kd) and float(self._since_log[0]) == before:
            self._has_gradient = False
            return loss
        report = f"report the model ({type(self.model).__name__}) and how it is run"
        if not any(largest):
            raise RunError(
                f"the loss of the first step gave the student no gradient, so it would learn nothing; {report}"
            )
        if self.objective.kd_weight and not any(largest_kd):
            raise RunError(
                f"KD gave the student no gradient in the first step, so it would learn from labels only; {report}"
            )
        return loss

    def _prepare_input(self, data: Any) -> Any:
        """Move a tensor to the device and keep its dtype: for DeepSpeed the Trainer would round the targets to bf16."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the batches of a step; none, on every process alike, where the stream ended before its first one."""
        batches, positions = super().get_batch_samples(self._waiting(epoch_iterator), num_batches, device)
        ends = [int(batch["stream_end"].min()) for batch in batches if "stream_end" in batch]
        if not ends or min(ends) > self.state.global_step * self._step_samples:
            return batches, positions
        # Every process is beyond the end in this step, and so knows it.
        self._stream_end, self.control.should_training_stop = min(ends), True
        if self.args.process_index == 0:
            log.warning("the stream ended after %s of %s samples to train on", f"{min(ends):,}", f"{self._planned:,}")
        return [], None

    @property
    def _step_samples(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def _planned(self) -> int:
        """How many samples there are to train on, as far as is known before."""
        dataset = self.train_dataset
        return dataset.samples if isinstance(dataset, StreamRows | PackedCache) else len(dataset)

    @property
    def train_samples(self) -> int:
        """How many samples there are to train on; of a stream that ended, how many there were."""
        return self._planned if self._stream_end is None else self._stream_end

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the training loss what its positions cost since the last time, whatever the weights.

        So has the last entry of a training: its steps need not be a multiple of logging_steps.
        """
        self._check_losses()
        if "loss" in logs or "train_runtime" in logs:  # on every process alike
            logs = logs | self._measured(with_speed="loss" in logs)  # the given ones are returned
        super().log(logs, start_time)

    def _measured(self, *, with_speed: bool) -> dict[str, float]:
        """Return what the processes have counted since the last time, and the memory of the one that has most."""
        own = self._since_log.new_tensor([self._waited, peak_memory(self.args.device)])
        counted = self.accelerator.gather(torch.cat([self._since_log, own])[None])
        *sums, positions, waited, _ = counted.sum(dim=0).tolist()
        self._since_log.zero_()
        found: dict[str, float] = {}
        if with_speed or positions:
            means = [total / max(positions, 1) for total in sums]
            found = dict(zip(("kd", "ce", "kl", "teacher_ce"), means, strict=True)) | {"positions": int(positions)}
        if with_speed:
            now = time.perf_counter()
            seconds = max(now - (self._clock or now), 1e-9)
            found["positions_per_second"] = positions / seconds
            found["data_wait_share"] = waited / self.args.world_size / seconds
            found["peak_memory_bytes"] = counted[:, -1].max().item()
            self._clock, self._waited = now, 0.0
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Read a cache through windows of its shards, a stream in its order; the epoch is always the Trainer's own."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamRows):
            return SequentialSampler(dataset)
        if isinstance(dataset, FilledRows):
            return FilledSampler(self._get_train_sampler(dataset.rows) or SequentialSampler(dataset.rows), dataset)
        sampler = training_sampler(dataset, self.args, epoch=lambda: int(self.state.epoch or 0))
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader; of several processes each has whole batches, without repeating a sample."""
        dataset: Any = self.train_dataset  # type: ignore[has-type]
        batch, processes = self.args.train_batch_size, self.args.world_size
        if processes > 1 and not self.args.dataloader_drop_last:
            self.train_dataset = filled(dataset, multiple=batch * processes)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def num_examples(self, dataloader: DataLoader) -> int:
        """Count what a loader has to say, without what was only filled in."""
        dataset = dataloader.dataset
        return len(dataset.rows) if isinstance(dataset, FilledRows) else super().num_examples(dataloader)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """Evaluate in the order of the samples, however training is grouped: the Trainer would ask for dicts."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def _waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        started = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Evaluate as the Trainer does; its time is not that of training."""
        started = time.perf_counter()
        metrics = super().evaluate(*arguments, **named)
        if self._clock is not None:
            self._clock += time.perf_counter() - started
        return metrics

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """Save, but not what a loss that is not finite has gone into."""
        self._check_losses()
        super()._save_checkpoint(*arguments, **named)

    def _check_losses(self) -> None:
        """Raise NotFinite, on every process, where a loss of one was not finite since the last time."""
        sums = self.accelerator.reduce(self._since_log, reduction="sum")
        self._recent.check(is_finite_everywhere=bool(sums.isfinite().all()))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the Trainer's loader, with the last samples also where training drops an incomplete batch."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return (no loss, a row of sums for each sample (B, SUMS), a placeholder for labels).

        As rows, the Trainer gathers them from all processes and drops those of the samples that a sampler
        repeated to fill the last batches.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = self._sample_sums(model, inputs)
        return None, rows, rows[:, :1]  # without labels the Trainer computes no metrics

    def _make_head(self) -> Any:
        """Return what takes the losses: the model's own head, fused, or where that cannot be, something slower."""
        # rank 0's word: others may have no weights yet (fsdp_cpu_ram_efficient_loading)
        agree = (lambda reason: reason) if self.args.world_size == 1 else (lambda reason: gather_object([reason])[0])
        fused, reason = fuse_head(self.accelerator.unwrap_model(self.model), agree)
        if fused is not None:
            return fused
        if self.args.process_index == 0:
            name = type(self.model).__name__
            log.warning("%s: the logits of all positions of a batch will exist at once, because %s", name, reason)
        self.full_logits = reason
        return FullLogits()

    def _run(
        self, model: nn.Module, inputs: Batch, *, factor: Tensor | float = 1.0, with_peak: bool = False
    ) -> tuple[Ran, Taught]:
        """Run the model on a batch and take the losses of its positions; return them with the teacher's side."""
        taught = self._targets_of(inputs, self.objective, factor=factor, with_peak=with_peak)
        # without labels: the model shall not compute a loss of its own
        return self._head.run(model, taught.job, **self._model_inputs(inputs), use_cache=False), taught

    def _model_inputs(self, inputs: Batch) -> Batch:
        """Return what the model reads of a batch; flash attention takes packed rows for such only if there is one."""
        packed = "position_ids" in inputs
        batch = {name: inputs[name] for name in ("input_ids", "position_ids" if packed else "attention_mask")}
        if packed and "flash" in (getattr(self._student.config, "_attn_implementation", None) or ""):
            batch = {name: part.flatten()[None] for name, part in batch.items()}  # positions b * T + t stay
        return batch

    @property
    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _prove_packing(self, model: nn.Module) -> None:
        """Raise ConfigError, on every process, where the student mixes the documents of a packed row."""

        def logits(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            inputs = self._model_inputs({"input_ids": input_ids, "position_ids": position_ids})
            return model(**inputs, use_cache=False).logits

        args, student = self.args, self._student
        half = args.bf16 or args.fp16 or next(student.parameters()).dtype in (torch.bfloat16, torch.float16)
        model.eval()
        try:
            fault, is_shown = packing_fault(
                logits,
                vocab_size=student.config.get_text_config().vocab_size,
                rows=min(args.per_device_train_batch_size, 2),
                half=half,
                device=args.device,
            )
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # of the model's own code
            fault, is_shown = f"it fails: {type(error).__name__}: {' '.join(str(error).split())}", True
        model.train()
        found = [(fault, is_shown)] if args.world_size == 1 else gather_object([(fault, is_shown)])
        if fault := next((fault for fault, _ in found if fault), ""):
            raise ConfigError(
                f"training.packing: {type(student).__name__} does not keep the samples of a row apart ({fault}); leave "
                "packing out, or take training.train_sampling_strategy=group_by_length"
            )
        if not all(is_shown for _, is_shown in found):
            log.warning(
                "training.packing: the student's tokens do not yet depend on those before them, so that it keeps the "
                "samples of a row apart could not be shown"
            )
        self._keeps_documents_apart = True

    def _sample_sums(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Return what evaluation counts, summed over the positions of each sample: (B, SUMS) float32."""
        (_, losses, peak), taught = self._run(model, inputs, with_peak=True)
        assert peak is not None
        samples, labels = inputs["target_positions"] // inputs["input_ids"].shape[1], labels_of(inputs)
        one, agreed = torch.ones_like(losses.ce), peak.top_id == taught.top_ids
        in_bin = F.one_hot((peak.confidence * BINS).long().clamp(max=BINS - 1), BINS)
        by_bin = torch.stack([one, peak.confidence, peak.top_id == labels], dim=1)[:, :, None] * in_bin[:, None]
        counted = torch.stack([one, *losses, agreed, 0 * one], dim=1)
        rows = losses.ce.new_zeros(len(inputs["input_ids"]), SUMS)
        rows.index_add_(0, samples, torch.cat([counted, by_bin.flatten(1)], dim=1))
        rows[:, [1, 3]] -= taught.entropy[:, None]
        rows[:, 5].index_add_(0, taught.logprob_rows, taught.logprob)
        return rows

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the evaluation metrics from the gathered rows of `_sample_sums`, without their prefix."""
        sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        positions, kd, ce, kl, agreed, teacher_logprob = sums[:6]
        in_bin, confidence, correct = sums[6:].reshape(3, BINS)
        self.calibration = {
            "positions": in_bin.astype(int).tolist(),
            "confidence": (confidence / np.maximum(in_bin, 1)).tolist(),
            "accuracy": (correct / np.maximum(in_bin, 1)).tolist(),
        }
        count = max(positions, 1)
        return {
            "loss": (self.objective.kd_weight * kd + self.objective.ce_weight * ce) / count,
            "ce": ce / count,
            "kd": kd / count,
            "kl": kl / count,
            "teacher_ce": -teacher_logprob / count,
            "top1_agreement": agreed / count,
            "ece": np.abs(confidence - correct).sum() / count,
            "positions": int(positions),
        }


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process had so far, in bytes: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
