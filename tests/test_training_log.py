"""What training prints of its log: one aligned line for each entry, with and without the Trainer's bar."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import MAX_LENGTH
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from accel_distill.training_log import HEADER, HEADER_EVERY, Lines, line, use_training_log

STEP = {
    "loss": 4.84224,
    "grad_norm": 0.6016,
    "learning_rate": 3.6e-4,
    "kd": 4.8408,
    "ce": 6.2205,
    "kl": 4.8408,
    "teacher_ce": 1.5054,
    "positions_per_second": 123_456.7,
    "peak_memory_bytes": 79_123_456_789,
    "positions": 20_089,
    "data_wait_share": 0.01,
    "epoch": 0.0645,
}
EVALUATION = {
    "eval_loss": 3.74,
    "eval_ce": 5.016,
    "eval_kd": 3.74,
    "eval_kl": 3.74,
    "eval_teacher_ce": 1.393,
    "eval_top1_agreement": 0.06305,
    "eval_ece": 0.04781,
    "eval_positions": 22_251,
    "eval_runtime": 0.8,
    "eval_samples_per_second": 75.9,
    "eval_steps_per_second": 9.5,
    "epoch": 0.258,
}


def test_a_line_stands_below_the_names_of_its_columns_and_fits_80_of_them() -> None:
    assert HEADER.split() == ["step", "epoch", "loss", "kd", "ce", "kl", "teacher", "lr", "pos/s", "memory"]
    training, evaluation = line(STEP, step=100_000), line(EVALUATION, step=40)
    assert training == (" 100000   0.06  4.8422  4.8408  6.2205  4.8408  1.5054  3.6e-04 123,457 79.1 GB")
    assert evaluation == ("   eval   0.26  3.7400  3.7400  5.0160  3.7400  1.3930    top-1 6.3%   ece 4.8%")
    assert len(HEADER) == len(training) == len(evaluation) == 79


def test_what_has_no_column_is_written_out_and_what_is_absent_leaves_its_place_empty() -> None:
    assert line({"loss": 1.0, "epoch": 2, "teacher_seconds": 0.123456}, step=5) == (
        f"      5   2.00  1.0000{' ' * 57}  teacher_seconds 0.1235"
    )


def test_waiting_for_batches_is_said_below_the_line_once_it_is_much(capsys: pytest.CaptureFixture[str]) -> None:
    lines, state = Lines(), type("State", (), {"is_world_process_zero": True, "global_step": 1})()
    for share in (0.04, 0.17, 0.17):
        lines.on_log(None, state, None, logs={**STEP, "data_wait_share": share})  # type: ignore[arg-type]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:3] == [line(STEP, step=1)] * 2 and printed[4:] == [line(STEP, step=1)]
    assert printed[3] == "       waited for batches 17% of this time; dataloader_num_workers=1 may help"
    assert len(printed[3]) < 80


def test_the_names_of_the_columns_are_repeated_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    lines, state = Lines(), type("State", (), {"is_world_process_zero": True, "global_step": 1})()
    other = type("State", (), {"is_world_process_zero": False, "global_step": 1})()
    for _ in range(HEADER_EVERY + 1):
        lines.on_log(None, state, None, logs=STEP)  # type: ignore[arg-type]
        lines.on_log(None, other, None, logs=STEP)  # type: ignore[arg-type]
    printed = capsys.readouterr().out.splitlines()
    assert [n for n, text in enumerate(printed) if text == HEADER] == [0, HEADER_EVERY + 1]
    assert len(printed) == HEADER_EVERY + 3


@pytest.mark.parametrize("without_bar", [True, False])
def test_a_trainer_prints_lines_and_no_dictionary_with_and_without_a_bar(
    without_bar: bool, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    ids = torch.arange(MAX_LENGTH) % 32
    data = Dataset.from_list([{"input_ids": ids.tolist(), "labels": ids.tolist()}] * 4)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=without_bar,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    use_training_log(trainer)
    trainer.train()
    trainer.evaluate()
    printed, errors = capsys.readouterr()
    lines = printed[printed.index(HEADER) :].splitlines()  # DeepSpeed, where it is installed, speaks first
    assert [text.split()[0] for text in lines[1:]] == ["1", "2", "3", "eval"]
    assert "{" not in printed and ("3/3" in errors) == (not without_bar)
