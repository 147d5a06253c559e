"""What training prints of its log: a table that grows by a line, above the Trainer's bar or without one.

The one decision: one line of at most 79 columns for each entry of the log, in place of the dictionaries that
transformers prints, which take four lines each of a terminal. Cost: what has no column (the gradient's norm, how long
an evaluation took) is in `trainer_state.json` and in what `report_to` names, and not on the screen.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from accel_distill.figures import size

HEADER_EVERY = 20  # lines
LONG_WAIT = 0.1  # of the time: said, now and then, where processes wait longer than that for their batches
LOSSES = ("loss", "kd", "ce", "kl", "teacher_ce")
HEADER = (
    f"{'step':>7}{'epoch':>7}{'loss':>8}{'kd':>8}{'ce':>8}{'kl':>8}{'teacher':>8}{'lr':>9}{'pos/s':>8}{'memory':>8}"
)
# Logged, and not for the screen.
LEFT_OUT = {"epoch", "grad_norm", "positions", "data_wait_share", "total_flos", "num_input_tokens_seen"}
LEFT_OUT |= {f"eval_{name}" for name in ("positions", "runtime", "samples_per_second", "steps_per_second")}
SHOWN = {*LOSSES, "learning_rate", "positions_per_second", "peak_memory_bytes"}
SHOWN |= {f"eval_{name}" for name in (*LOSSES, "top1_agreement", "ece")}

Number = Callable[[Any], str]


def use_training_log(trainer: Trainer) -> None:
    """Let `trainer` print this table in place of dictionaries; a notebook's own table stays."""
    for kind, ours in ((PrinterCallback, Lines), (ProgressCallback, LinesAboveBar)):
        if trainer.pop_callback(kind) is not None:
            trainer.add_callback(ours())


class LinesAboveBar(ProgressCallback):
    """The Trainer's bar, with the table above it."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = Lines()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a line."""
        self._lines.on_log(args, state, control, logs=logs)


class Lines(TrainerCallback):
    """The table alone."""

    def __init__(self) -> None:
        self._count = 0
        self._told_wait = -HEADER_EVERY  # at which line

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a line, on rank 0, and the names of the columns now and then."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:  # the end has a summary
            return
        if self._count % HEADER_EVERY == 0:
            tqdm.write(HEADER)
        self._count += 1
        tqdm.write(line(logs, step=state.global_step))
        if (waited := logs.get("data_wait_share", 0)) > LONG_WAIT and self._count - self._told_wait >= HEADER_EVERY:
            self._told_wait = self._count
            tqdm.write(f"{'':7}waited for batches {waited:.0%} of this time; dataloader_num_workers=1 may help")
        sys.stdout.flush()  # a file is looked at while it grows


def line(logs: Mapping[str, Any], *, step: int) -> str:
    """Return an entry of the log as a line of the table; what has no column is written out behind it."""
    is_eval = any(name.startswith("eval_") for name in logs)
    prefix = "eval_" if is_eval else ""
    text = f"{'eval' if is_eval else step:>7}" + _cell(logs, "epoch", lambda x: f"{x:.2f}", width=7)
    text += "".join(_cell(logs, prefix + name, lambda x: f"{x:.4f}", width=8) for name in LOSSES)
    if is_eval:
        text += _cell(logs, "eval_top1_agreement", lambda x: f"top-1 {x:.1%}", width=14)
        text += _cell(logs, "eval_ece", lambda x: f"ece {x:.1%}", width=11)
    else:
        text += _cell(logs, "learning_rate", lambda x: f"{x:.1e}", width=9)
        text += _cell(logs, "positions_per_second", lambda x: f"{x:,.0f}", width=8)
        text += _cell(logs, "peak_memory_bytes", size, width=8)
    others = [f"{name} {_plain(value)}" for name, value in logs.items() if name not in SHOWN | LEFT_OUT]
    return "  ".join([text, *others])


def _cell(logs: Mapping[str, Any], name: str, show: Number, *, width: int) -> str:
    """Return the value at the right of its column; an absent one leaves it empty."""
    return f"{show(logs[name]) if name in logs else '':>{width}}"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
