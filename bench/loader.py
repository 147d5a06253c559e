"""Measure how fast a shuffled cache is read, and for which part of its time a small student waits for batches.

The one decision: the samples come in the order of training, from a cache of 200 shards that is made here of the targets
of a file (see proxy.py), so that the figures are those of a large vocabulary. The files are warm in the page cache.
Beside the speed stands that by processor time, which on a busy machine is what counts. `--cache` takes a cache that is
there, and only lets a student of one layer and width 16 train on it: what it waits, and which part of the training
thread's processor time goes into getting batches, which is what it would wait beside free cores.

    python bench/loader.py --proxy FILE.npz [--shards 200] [--repeat 2] [--json FILE]
    python bench/loader.py --cache CACHE [--steps 100] [--json FILE]
"""

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from accel_distill.cache import TeacherCache
from accel_distill.codec import invert, rank_tokens
from accel_distill.collator import CachedLogitCollator
from accel_distill.losses import Objective
from accel_distill.manifest import Record, create, make_directories, write_manifest, write_plan
from accel_distill.rows import Rows, encode_rows
from accel_distill.shard import FORMAT, shard_bytes
from accel_distill.shuffle import window_sampler
from accel_distill.train import training_arguments
from accel_distill.trainer import DistillationTrainer
from bench.proxy import Proxy, read_proxy

BATCH = 8  # samples
WORKERS = (0, 1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="Measure how fast a shuffled cache is read.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--proxy", type=Path, help="the file of targets")
    source.add_argument("--cache", type=Path, help="a cache, for a student to train on")
    parser.add_argument("--steps", type=int, default=100, help="of the student")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=2, help="how many times a shard holds the file's positions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cache"
        if arguments.cache:
            results = [train(arguments.cache, workers, steps=arguments.steps, output=path) for workers in WORKERS]
        else:
            make_cache(path, read_proxy(arguments.proxy), shards=arguments.shards, repeat=arguments.repeat)
            results = measure(path)
    for result in results:
        text = f"{result['case']:40}{result['positions_per_s']:12,.0f} positions/s"
        text += f"{result['positions_per_cpu_s']:12,.0f} per CPU second" if "positions_per_cpu_s" in result else ""
        if "wait" in result:
            text += (
                f"{result['wait']:8.1%} of the time waiting for batches,{result['cpu_wait']:6.1%} of its processor time"
            )
        print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(path: Path) -> list[dict[str, Any]]:
    """Return positions a second of each way to read the cache at `path` once."""
    results = []
    positions = int(TeacherCache(path).shard_positions.sum())

    def timed(case: str, read: Iterable[Any]) -> None:
        begun = time.perf_counter(), cpu_seconds()
        for _ in read:
            pass
        seconds, cpu = time.perf_counter() - begun[0], cpu_seconds() - begun[1]
        speeds = {"positions_per_s": positions / seconds, "positions_per_cpu_s": positions / cpu}
        results.append({"case": case, "positions": positions, **speeds})

    cache = TeacherCache(path)
    timed("samples in file order, hashed", (cache[item] for item in np.argsort(cache.shard_of_item, kind="stable")))
    cache = TeacherCache(path)
    sampler = window_sampler(cache, seed=0, epoch=lambda: 0)
    assert sampler is not None
    timed("samples in training's order", (cache[item] for item in sampler))
    cache = TeacherCache(path)
    cache.processes = 2
    timed("one of several readers, by sample", (cache[item] for item in sampler))
    cache = TeacherCache(path)
    cache.processes = 2
    batches = BatchSampler(sampler, BATCH, drop_last=False)
    timed(f"one of several readers, by {BATCH}", (cache.__getitems__(items) for items in batches))
    for workers in WORKERS:
        dataset: Any = TeacherCache(path)  # anew: workers would inherit what is decoded
        timed(
            f"batches of {BATCH}, {workers} workers",
            DataLoader(
                dataset,
                batch_size=BATCH,
                sampler=sampler,
                num_workers=workers,
                collate_fn=CachedLogitCollator(pad_token_id=0),
            ),
        )
    return results


class ClockedTrainer(DistillationTrainer):
    """Counts the processor time of the thread that trains, and what of it goes into getting batches."""

    begun: float | None = None  # the thread's time when the first step had its batches
    getting = 0.0

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Return the batches of a step."""
        before = time.thread_time()
        found = super().get_batch_samples(*arguments)
        if self.begun is None:
            self.begun = time.thread_time()
        else:
            self.getting += time.thread_time() - before
        return found


def cpu_seconds() -> float:
    """Return the processor time of this process and of its workers that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def train(path: Path, workers: int, *, steps: int, output: Path) -> dict[str, Any]:
    """Let a very small student train; return its speed and the share of the time that it waits for batches."""
    cache: Any = TeacherCache(path)
    config = LlamaConfig(
        vocab_size=cache.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=cache.max_length,
    )
    values = {"max_steps": steps, "logging_steps": steps, "per_device_train_batch_size": BATCH}
    loading = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    quiet = {"output_dir": str(output), "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    trainer = ClockedTrainer(
        LlamaForCausalLM(config),
        training_arguments(values | loading | quiet, has_gpu=torch.cuda.is_available()),
        objective=Objective(kind=cache.method, temperature=cache.temperature),
        data_collator=CachedLogitCollator(pad_token_id=0),
        train_dataset=cache,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.begun is not None
    cpu_wait = trainer.getting / (time.thread_time() - trainer.begun)
    log = next(line for line in trainer.state.log_history if "data_wait_share" in line)
    case = f"a student of {sum(part.numel() for part in trainer.model.parameters()):,}, {workers} workers"
    return {
        "case": case,
        "positions_per_s": log["positions_per_second"],
        "wait": log["data_wait_share"],
        "cpu_wait": cpu_wait,
    }


def make_cache(path: Path, proxy: Proxy, *, shards: int, repeat: int) -> None:
    """Make a cache of `shards` shards, each with the positions of the file `repeat` times."""
    rows = repeated(proxy.rows, repeat)
    count = len(rows.sample_index)
    ids_by_rank = rank_tokens(proxy.unigram_counts)
    ranks_sha256 = hashlib.sha256(ids_by_rank.tobytes()).hexdigest()
    identity = {
        "format": FORMAT,
        "teacher": {"vocab_size": len(ids_by_rank), "dtype": "float32"},
        "tokenizer": {"size": len(ids_by_rank)},
        "dataset": {"name": "proxy", "config_name": None, "split": "train", "text_column": "text"},
        "sequence": {
            "max_length": 2048,
            "long_documents": "truncate",
            "add_special_tokens": True,
            "append_eos": True,
        },
        "targets": {"method": "threshold", "parameter": proxy.threshold, "temperature": 1.0, "seed": 0},
        "layout": {"lanes": 1, "samples_per_shard": count, "ranks_sha256": ranks_sha256},
    }
    make_directories(path)
    record = create(Record(path, identity, {}, {}, ids_by_rank))
    write_plan(path, max_samples=None)
    columns = encode_rows(rows, method="threshold", parameter=proxy.threshold, ranks=invert(ids_by_rank))
    for group in range(shards):
        first = group * count
        columns["sample_index"] = first + np.arange(count)
        record.shard_path(group, 0, count).write_bytes(shard_bytes(_header(record, rows, group, first), columns))
    write_manifest(record, total=shards * count, stream_end="cap")


def repeated(rows: Rows, times: int) -> Rows:
    """Return the rows `times` times."""
    joined = {name: np.tile(getattr(rows, name), times) for name in ("input_ids", "target_mask", "entropy", "logprob")}
    starts = {
        name: np.concatenate([[0], np.cumsum(np.tile(np.diff(getattr(rows, name)), times))])
        for name in ("tokens", "positions")
    }
    targets = {name: np.tile(values, times) for name, values in rows.targets.items()}
    return Rows(sample_index=np.arange(times * len(rows.sample_index)), targets=targets, **starts, **joined)


def _header(record: Record, rows: Rows, group: int, first: int) -> dict[str, Any]:
    counts = dict.fromkeys(("empty", "truncated", "untargeted", "nonfinite"), 0)
    return {
        "cache_id": record.cache_id,
        "group": group,
        "lane": 0,
        "first_sample": first,
        "samples": len(rows.sample_index),
        "sequences": len(rows.sample_index),
        "tokens": int(rows.tokens[-1]),
        "positions": int(rows.positions[-1]),
        "texts_sha256": "0" * 64,
        **counts,
    }


if __name__ == "__main__":
    raise SystemExit(main())
