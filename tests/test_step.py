"""The benchmark of a training step: what it writes, and that its cases compute the same losses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.step import CASES, Sizes, available, main, make_setting, measure, table

KEYS = ["case", "vocab_size", "positions", "hidden_size", "seconds", "peak_bytes_above_model"]
ROOT = Path(__file__).resolve().parent.parent
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
    sizes = {"vocab_size": 7, "positions": 1, "hidden_size": 1, "device": "cpu"}
    rows = [
        {"case": "ce_full", **sizes, "seconds": 2.0, "cpu_seconds": 2.0, "peak_bytes_above_model": 4_000_000},
        {"case": "ce_fused", **sizes, "seconds": 1.5, "cpu_seconds": 1.0, "peak_bytes_above_model": 1_000_000},
    ]
    assert table(rows).splitlines()[-1] == "| 7 | ce_fused | 1.500 | 1.000 | 0.50 | 1 MB | 0.25 |"


def test_on_a_gpu_the_ratio_of_time_is_of_wall_time() -> None:
    sizes = {"vocab_size": 7, "positions": 1, "hidden_size": 1, "device": "cuda", "peak_bytes_above_model": 1_000_000}
    rows = [
        {"case": "ce_full", **sizes, "seconds": 2.0, "cpu_seconds": 2.0},
        {"case": "ce_fused", **sizes, "seconds": 1.5, "cpu_seconds": 1.0},
    ]
    assert table(rows).splitlines()[-1] == "| 7 | ce_fused | 1.500 | 1.000 | 0.75 | 1 MB | 1.00 |"


IN_TRITONS_INTERPRETER = """
import json
from bench import step

step.LENGTH = 16
found = {}
for case in ("ce_full", "liger_ce", "kd_dense_full", "liger_jsd"):
    setting = step.make_setting(step.Sizes(vocab_size=3522, positions=32, hidden_size=32))
    loss = step.CASES[case](setting)()
    loss.backward()
    found[case] = [float(loss.detach()), setting.model.lm_head.weight.grad.flatten().tolist()]
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")),
    reason="liger-kernel and triton are not installed",
)
def test_ligers_cases_have_the_loss_and_gradients_of_full_logits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", IN_TRITONS_INTERPRETER]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = {
        case: [torch.tensor(part) for part in parts] for case, parts in json.loads(done.stdout.splitlines()[-1]).items()
    }
    for full, liger in [("ce_full", "liger_ce"), ("kd_dense_full", "liger_jsd")]:
        for expected, part in zip(found[full], found[liger], strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-8)
