"""The benchmark of a training step: what it writes, and that its cases compute the same losses."""

import json
from pathlib import Path

import pytest
import torch

from bench.step import CASES, Sizes, available, main, make_setting, measure, table

KEYS = ["case", "vocab_size", "positions", "hidden_size", "seconds", "peak_bytes_above_model"]
TINY = Sizes(vocab_size=4000, positions=256, hidden_size=16)


def test_the_command_measures_each_case_in_a_process_and_writes_a_list_of_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "step.json"
    sizes = ["--vocab-sizes", "4000", "--positions", "256", "--hidden-size", "16"]
    assert main(["--json", str(file), *sizes, "--cases", "kd_ce_fused"]) == 0
    records = json.loads(file.read_text())
    assert [record["case"] for record in records] == ["kd_ce_fused"]
    for record in records:
        assert set(KEYS) <= set(record) and record["seconds"] > 0 and record["cpu_seconds"] > 0
        assert (record["vocab_size"], record["positions"], record["hidden_size"]) == (4000, 256, 16)
    assert capsys.readouterr().out.strip() == table(records)


def test_fused_and_full_cases_have_the_same_loss_and_gradients() -> None:
    for full, fused in [("ce_full", "ce_fused"), ("kd_dense_full", "kd_dense_fused")]:
        found = []
        for case in (full, fused):
            setting = make_setting(TINY)
            loss = CASES[case](setting)()
            loss.backward()
            found.append((loss.detach(), setting.model.lm_head.weight.grad))
        torch.testing.assert_close(*(loss for loss, _ in found))
        torch.testing.assert_close(*(gradient for _, gradient in found), rtol=1e-4, atol=2e-8)
        assert found[0][1].abs().max() > 1e-5


def test_a_fused_step_needs_less_memory_than_full_logits() -> None:
    sizes = Sizes(vocab_size=40_000, positions=1024, hidden_size=16)  # full logits: 164 MB a copy
    full, fused = (measure(case, sizes) for case in ("ce_full", "kd_ce_fused"))
    assert fused["peak_bytes_above_model"] < 0.5 * full["peak_bytes_above_model"]


def test_ligers_cases_are_left_out_without_its_package_or_a_gpu() -> None:
    assert [case for case in available() if not case.startswith("liger")] == list(CASES)[:5]
    assert torch.cuda.is_available() or len(available()) == 5


def test_a_row_of_the_table_has_its_ratios_to_ce_full_at_the_same_vocabulary() -> None:
    sizes = {"vocab_size": 7, "positions": 1, "hidden_size": 1}
    rows = [
        {"case": "ce_full", **sizes, "seconds": 2.0, "cpu_seconds": 2.0, "peak_bytes_above_model": 4_000_000},
        {"case": "ce_fused", **sizes, "seconds": 1.5, "cpu_seconds": 1.0, "peak_bytes_above_model": 1_000_000},
    ]
    assert table(rows).splitlines()[-1] == "| 7 | ce_fused | 1.500 | 1.000 | 0.50 | 1 MB | 0.25 |"
