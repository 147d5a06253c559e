"""Time and memory of a training step: plain cross-entropy through full logits, the fused head, an online teacher.

The one decision: every case runs in a process of its own on the same model and batch, and only its ratio to `ce_full`
of the same run says anything: the machine may be busy. So the best of five steps counts, in wall time and in the
process's own CPU time. A step is forward, loss and backward; the optimizer would be the same for all.

    python bench/step.py --json step.json
    python bench/step.py --json step.json --vocab-sizes 151936 --positions 8192 --hidden-size 4096 --device cuda

The model is a random Llama of one layer. Sparse targets have 25 ids a position, what a cache of the default threshold
has. Memory is what the process had at its highest, above what it had with the model loaded: the gradients are in it.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from accel_distill.fused_head import FusedHead
from accel_distill.head_jobs import DenseJob, SparseJob, sparse_chunks
from accel_distill.head_probe import fuse_head
from accel_distill.losses import Objective, cross_entropy

LENGTH = 128  # tokens of a sample
IDS = 25  # of a sparse target
STEPS = 5  # of which the best counts
TIMEOUT = 1800.0  # seconds for a case


@dataclass(frozen=True)
class Sizes:
    """The step: a batch of `positions` hidden states and a head of vocab_size x hidden_size."""

    vocab_size: int
    positions: int
    hidden_size: int
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    model: LlamaForCausalLM
    teacher: LlamaForCausalLM
    ids: Tensor  # (B, LENGTH + 1): the last token is a label only
    entries: tuple[Tensor, Tensor, Tensor]

    @property
    def labels(self) -> Tensor:
        """The next token of each position, (P,)."""
        return self.ids[:, 1:].flatten()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model reads, (B, LENGTH)."""
        return {"input_ids": self.ids[:, :-1]}

    @property
    def positions(self) -> Tensor:
        """All positions of the grid."""
        return torch.arange(self.labels.numel(), device=self.ids.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and print a table; `--case` runs one here and prints its record."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step, as ratios to plain CE.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32_000, 151_936], metavar="V")
    parser.add_argument("--positions", type=int, default=512, metavar="P", help=f"a multiple of {LENGTH}")
    parser.add_argument("--hidden-size", type=int, default=256, metavar="D")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of a process, on a CPU")
    parser.add_argument("--cases", nargs="+", default=available(), choices=available(), metavar="CASE")
    parser.add_argument("--case", choices=available(), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes = [
        Sizes(vocab_size, arguments.positions, arguments.hidden_size, arguments.device, arguments.dtype)
        for vocab_size in arguments.vocab_sizes
    ]
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(measure(arguments.case, sizes[0])))
        return 0
    records = [in_a_process(case, size, threads=arguments.threads) for size in sizes for case in arguments.cases]
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    print(table(records))
    return 0


def in_a_process(case: str, sizes: Sizes, *, threads: int) -> dict[str, object]:
    """Measure a case in a process of its own; raise CalledProcessError where it fails."""
    words = ["--case", case, "--vocab-sizes", str(sizes.vocab_size), "--threads", str(threads)]
    for name in ("positions", "hidden_size", "device", "dtype"):
        words += [f"--{name.replace('_', '-')}", str(getattr(sizes, name))]
    command = [sys.executable, "-m", "bench.step", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, sizes: Sizes) -> dict[str, object]:
    """Run STEPS steps of a case; return the record of the best."""
    setting = make_setting(sizes)
    step = CASES[case](setting)
    before = reset_peak(sizes.device)
    seconds, cpu_seconds = [], []
    for _ in range(STEPS):
        setting.model.zero_grad(set_to_none=True)
        started, cpu_started = time.perf_counter(), time.process_time()
        step().backward()
        if sizes.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    peak = peak_bytes(sizes.device) - before
    record = {"case": case, **asdict(sizes), "seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}
    return record | {"peak_bytes_above_model": peak}


def make_setting(sizes: Sizes) -> Setting:
    """Return a random model, a teacher of the same sizes, and a batch."""
    if sizes.positions % LENGTH:
        raise SystemExit(f"--positions is {sizes.positions}; expected a multiple of {LENGTH}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=2 * sizes.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    dtype, device = getattr(torch, sizes.dtype), torch.device(sizes.device)
    model, teacher = (LlamaForCausalLM(config).to(device, dtype) for _ in range(2))
    ids = torch.randint(sizes.vocab_size, (sizes.positions // LENGTH, LENGTH + 1), device=device)
    offsets = IDS * torch.arange(sizes.positions + 1, device=device)
    first = torch.randint(sizes.vocab_size - 101 * IDS, (sizes.positions, 1), device=device)
    target_ids = (first + 101 * torch.arange(IDS, device=device)).flatten()
    weights = torch.full((IDS * sizes.positions,), 1 / IDS, device=device)
    return Setting(model, teacher.requires_grad_(False), ids, (offsets, target_ids, weights))


def ce_full(setting: Setting) -> Callable[[], Tensor]:
    """Cross-entropy of full logits, a mean over positions."""

    def step() -> Tensor:
        logits = setting.model(**setting.inputs, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), setting.labels).mean()

    return step


def ce_fused(setting: Setting) -> Callable[[], Tensor]:
    """The same from the fused head."""
    return fused_sparse(setting, Objective(kd_weight=0.0, ce_weight=1.0), without=True)


def kd_ce_fused(setting: Setting) -> Callable[[], Tensor]:
    """KD from sparse targets and cross-entropy, from the fused head."""
    return fused_sparse(setting, Objective(kd_weight=0.5, ce_weight=0.5))


def kd_dense_full(setting: Setting) -> Callable[[], Tensor]:
    """Forward KL to an online teacher, full logits of both."""
    objective = Objective(kind="dense")

    def step() -> Tensor:
        with torch.no_grad():
            teacher = setting.teacher(**setting.inputs, use_cache=False).logits.flatten(0, 1)
        logits = setting.model(**setting.inputs, use_cache=False).logits.flatten(0, 1)
        return objective.dense(logits, setting.labels, teacher).kd.mean()

    return step


def kd_dense_fused(setting: Setting) -> Callable[[], Tensor]:
    """The same, a chunk of both heads at a time."""
    head = fused_head(setting)
    objective, labels = Objective(kind="dense"), setting.labels

    def step() -> Tensor:
        with torch.no_grad():
            hidden = setting.teacher.model(**setting.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        make = setting.teacher.lm_head
        job = DenseJob(objective, setting.positions, labels, lambda part: make(hidden[part]), 1 / len(labels))
        return head.run(setting.model, job, **setting.inputs, use_cache=False).loss

    return step


def liger_ce(setting: Setting) -> Callable[[], Tensor]:
    """Liger's fused cross-entropy of hidden states."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def step() -> Tensor:
        hidden = setting.model.model(**setting.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return loss(setting.model.lm_head.weight, hidden, setting.labels)

    return step


def liger_jsd(setting: Setting) -> Callable[[], Tensor]:
    """Liger's fused divergence from an online teacher, as the forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)

    def step() -> Tensor:
        with torch.no_grad():
            teacher = setting.teacher.model(**setting.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = setting.model.model(**setting.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return loss(hidden, setting.model.lm_head.weight, teacher, setting.teacher.lm_head.weight, setting.labels)

    return step


CASES: dict[str, Callable[[Setting], Callable[[], Tensor]]] = {
    "ce_full": ce_full,
    "ce_fused": ce_fused,
    "kd_ce_fused": kd_ce_fused,
    "kd_dense_full": kd_dense_full,
    "kd_dense_fused": kd_dense_fused,
    "liger_ce": liger_ce,
    "liger_jsd": liger_jsd,
}


def available() -> list[str]:
    """Return the cases that can run here: Liger's need its package and a GPU."""
    liger = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()
    return [case for case in CASES if liger or not case.startswith("liger")]


def fused_sparse(setting: Setting, objective: Objective, *, without: bool = False) -> Callable[[], Tensor]:
    """Return a step of the fused head from the sparse targets, or from none."""
    head, labels, (offsets, ids, weights) = fused_head(setting), setting.labels, setting.entries
    entries = (0 * offsets, ids[:0], weights[:0]) if without else (offsets, ids, weights)

    def step() -> Tensor:
        job = SparseJob(objective, setting.positions, sparse_chunks(labels, entries), 1 / len(labels))
        return head.run(setting.model, job, **setting.inputs, use_cache=False).loss

    return step


def fused_head(setting: Setting) -> FusedHead:
    """Return the model's fused head."""
    head, reason = fuse_head(setting.model)
    assert head is not None, reason
    return head


def reset_peak(device: str) -> int:
    """Begin to watch the highest memory; return the present one, in bytes."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins anew
    return peak_bytes(device)


def peak_bytes(device: str) -> int:
    """Return the highest memory since `reset_peak`: allocated on a GPU, else resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def table(records: Sequence[dict[str, object]]) -> str:
    """Return the records as Markdown, with their ratios to `ce_full` at the same vocabulary.

    The ratio of time is of CPU time, which another program on the machine does not change; on a GPU of wall time.
    """
    clock = "cpu_seconds" if all(record["device"] == "cpu" for record in records) else "seconds"
    lines = [
        "| vocabulary | case | seconds | CPU seconds | of ce_full | peak above the model | of ce_full |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        same = (r for r in records if r["case"] == "ce_full" and r["vocab_size"] == record["vocab_size"])
        base = next(same, record)
        time_ratio, memory_ratio = (
            float(str(record[key])) / float(str(base[key])) for key in (clock, "peak_bytes_above_model")
        )
        lines.append(
            f"| {record['vocab_size']:,} | {record['case']} | {record['seconds']:.3f} | {record['cpu_seconds']:.3f} | "
            f"{time_ratio:.2f} | {float(str(record['peak_bytes_above_model'])) / 1e6:,.0f} MB | {memory_ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
