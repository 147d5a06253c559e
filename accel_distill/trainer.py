"""`DistillationTrainer`: transformers' Trainer with a loss from cached sparse targets.

The one decision: every figure is a sum over positions divided by a count of positions, and both are summed
over micro-batches and processes before the division, in training, in the logs and in evaluation. So neither
gradient accumulation nor the number of processes nor ragged lengths change it. It costs that the Trainer's
own averages (over batches, over sequences) cannot be used.

`kd` and `eval_kl` are KL(teacher || student) as it stands in the loss, with its factor T^2. From `top_k`
targets it is the KL of k + 1 outcomes, a lower bound.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, Trainer, TrainingArguments

from accel_distill.codec import Method
from accel_distill.losses import (
    Entries,
    cross_entropy,
    sparse_cross_entropy,
    student_logprobs,
    top_k_forward_kl,
)
from accel_distill.shuffle import window_sampler

Batch = dict[str, Tensor]  # what CachedLogitCollator returns

CHUNK = 256  # positions whose logits are float32 at once: 256 x 151,936 x 4 bytes = 156 MB a copy
BINS = 15  # of equal width, for the expected calibration error
SUMS = 5 + 3 * BINS  # positions, kd, ce, agreed, teacher_logprob; then by bin positions, confidence, correct

DIVERGENCES = {
    "threshold": sparse_cross_entropy,
    "random": sparse_cross_entropy,
    "top_k": top_k_forward_kl,
}


class DistillationTrainer(Trainer):
    """Train and evaluate on `kd_weight` * forward KL + `ce_weight` * cross-entropy, a mean over positions."""

    # The loss is divided by the positions of all micro-batches of a step: not by their number again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        temperature: float = 1.0,
        target_method: Method = "threshold",
        **trainer_arguments: Any,
    ) -> None:
        """Take temperature and target method as the cache says them; the rest goes to `Trainer` as it is."""
        # One process with several GPUs: nn.DataParallel would cut the flat targets into equal pieces.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(model, args, compute_metrics=self._metrics, **trainer_arguments)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the labels of a whole step
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.temperature = temperature
        self.target_method = target_method
        self._since_log = torch.zeros(3, dtype=torch.float64, device=args.device)  # sums of kd, ce; positions

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch: its sum over positions by the positions of the whole step.

        The outputs are empty: the logits are not kept.
        """
        positions = len(inputs["target_positions"])
        kd, ce = self._loss_sums(model, inputs)
        self._since_log += torch.stack([kd.detach(), ce.detach(), kd.new_tensor(positions)])
        counted = torch.as_tensor(positions if num_items_in_batch is None else num_items_in_batch)
        # a step without any target: 0 / 1, not 0 / 0
        loss = (self.kd_weight * kd + self.ce_weight * ce) / counted.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients of the processes are averaged
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; beside the training loss `kd` and `ce` since the last time, whatever their weights."""
        if "loss" in logs:  # on every process alike
            kd, ce, positions = self.accelerator.reduce(self._since_log, reduction="sum").tolist()
            self._since_log.zero_()
            logs |= {"kd": kd / max(positions, 1), "ce": ce / max(positions, 1)}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Read a cache through windows of its shards; the epoch is the Trainer's own, also after a resumption."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = window_sampler(dataset, seed=seed, epoch=lambda: int(self.state.epoch or 0))
        if sampler is None or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        return sampler

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

    def _loss_sums(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Return KL and CE summed over the positions with a target, with their gradients.

        Nothing outside sees logits: here goes an LM head that is fused with its loss.
        """
        sums = []
        for chunk in chunks(model, inputs):
            # computed again in backward, so that one chunk's float32 log-probabilities live at a time
            losses = checkpoint(self._losses, chunk, use_reentrant=False, preserve_rng_state=False)
            sums.append(torch.stack([loss.sum() for loss in losses]))
        kd, ce = torch.stack(sums).sum(dim=0)
        return kd - self._teacher_entropy(inputs).sum(), ce

    def _sample_sums(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Return what evaluation counts, summed over the positions of each sample: (B, SUMS) float32."""
        rows = torch.zeros(len(inputs["input_ids"]), SUMS, device=inputs["input_ids"].device)
        for chunk in chunks(model, inputs):
            kd, ce = self._losses(chunk)
            logprob, top_id = student_logprobs(chunk.logits).max(dim=-1)
            confidence = logprob.exp()
            in_bin = F.one_hot((confidence * BINS).long().clamp(max=BINS - 1), BINS)
            one, agreed = torch.ones_like(ce), (top_id == chunk.teacher_top_id).float()
            by_bin = torch.stack([one, confidence, top_id == chunk.labels], dim=1)[:, :, None] * in_bin[:, None]
            counted = torch.stack([one, kd, ce, agreed, 0 * one], dim=1)
            rows.index_add_(0, chunk.samples, torch.cat([counted, by_bin.flatten(1)], dim=1))
        rows[:, 1] -= self._teacher_entropy(inputs)
        rows[:, 4] = inputs["teacher_logprob"]
        return rows

    def _losses(self, chunk: "Chunk") -> tuple[Tensor, Tensor]:
        """Return KD (from sampled targets: before the teacher's entropy) and CE by position, (n,) both."""
        logits = chunk.logits
        divergence = DIVERGENCES[self.target_method]
        kd = divergence(logits if self.kd_weight else logits.detach(), chunk.entries, temperature=self.temperature)
        return kd, cross_entropy(logits if self.ce_weight else logits.detach(), chunk.labels)

    def _teacher_entropy(self, inputs: Batch) -> Tensor:
        """Return what to subtract from each sample's summed KD to make it a KL, (B,), with the factor T^2."""
        entropy = inputs["teacher_entropy"]
        return torch.zeros_like(entropy) if self.target_method == "top_k" else self.temperature**2 * entropy

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the evaluation metrics from the gathered rows of `_sample_sums`, without their prefix."""
        sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        positions, kd, ce, agreed, teacher_logprob = sums[:5]
        _, confidence, correct = sums[5:].reshape(3, BINS)
        count = max(positions, 1)
        return {
            "loss": (self.kd_weight * kd + self.ce_weight * ce) / count,
            "ce": ce / count,
            "kl": kd / count,
            "teacher_ce": -teacher_logprob / count,
            "top1_agreement": agreed / count,
            "ece": np.abs(confidence - correct).sum() / count,
            "positions": int(positions),
        }


class Chunk(NamedTuple):
    """At most CHUNK positions with a target."""

    logits: Tensor  # (n, V), the student's, as the model gives them
    labels: Tensor  # (n,) int64, the true next token
    entries: Entries
    samples: Tensor  # (n,) int64, row of the batch

    @property
    def teacher_top_id(self) -> Tensor:
        """Return the id that the teacher finds most probable, (n,): the first of each position's."""
        offsets, ids, _ = self.entries
        return ids[offsets[:-1]]


def chunks(model: nn.Module, batch: Batch) -> Iterator[Chunk]:
    """Run the model and yield the positions with a target, in order; one empty chunk where there is none.

    (With it the loss has a gradient, zero, and every process takes part in reducing gradients.)
    """
    positions = batch["target_positions"]
    labels = batch["labels"].flatten()[positions + 1]
    offsets, ids, weights = batch["target_offsets"], batch["target_ids"], batch["target_weights"]
    starts = range(0, max(1, len(positions)), CHUNK)
    bounds = offsets[[*starts, len(positions)]].tolist()  # waits for the device: before the model, not after
    # without labels: the model shall not compute a loss of its own
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = outputs.logits.flatten(0, 1)[positions].split(CHUNK)
    samples = positions // batch["input_ids"].shape[1]
    for start, (first, last), rows in zip(starts, pairwise(bounds), logits, strict=True):
        part = slice(start, start + CHUNK)
        entries = offsets[start : start + CHUNK + 1] - first, ids[first:last], weights[first:last]
        yield Chunk(rows, labels[part], entries, samples[part])
