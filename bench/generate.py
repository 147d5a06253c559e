"""Time of generation against the teacher's bare forward, and of two processes against one.

The one decision: what is timed is the pipeline that `generate` runs (texts to tokens, teacher, sampling, encoding,
writing), on shards of made-up text, beside `model(...).logits` of the very same batches. The two take turns, and the
median of each counts, in wall time and in processor time of all threads: the machine may be busy. Start-up is left out.

    python bench/generate.py --json generate.json

The teacher is a random Llama, its head scaled until its distributions are as sure as those of a real one.
Processes share nothing but the directory, and begin together when all have loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel_distill.codec import rank_tokens
from accel_distill.disk_space import DiskSpace
from accel_distill.manifest import Record, make_directories
from accel_distill.pipeline import ShardMaker, batches
from accel_distill.shard_writer import shard_writer
from accel_distill.stream import OpenShard
from accel_distill.teacher import Sampling, Teacher
from accel_distill.tokens import SequenceRule

LENGTHS = (64, 512)  # tokens of a sample, evenly spread
GO = "go"  # the file that lets all processes begin
TIMEOUT = 1800.0  # seconds


@dataclass(frozen=True)
class Sizes:
    """The teacher, and how its batches are cut."""

    vocab_size: int = 32_000
    hidden_size: int = 384
    layers: int = 6
    logit_deviation: float = 4.0  # of a position's logits: an entropy of some 2.5 nats
    tokens_per_batch: int = 4096
    head_chunk: int = 256
    samples: int = 16  # of a shard


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both, print, and write JSON where asked; `--rank` is one of the processes of the second."""
    parser = argparse.ArgumentParser(description="Time of generation against a bare forward, and of two processes.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--rounds", type=int, default=5, help="of generation and bare forward in turn")
    parser.add_argument("--shards", type=int, default=4, help="that one or two processes make")
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes = Sizes(**{name: getattr(arguments, name) for name in vars(Sizes())})
    torch.set_num_threads(1)
    if arguments.rank is not None:
        shards = range(arguments.rank, arguments.shards, arguments.world_size)
        print(json.dumps(work(arguments.place, sizes, shards)))
        return 0
    records = [against_forward(sizes, rounds=arguments.rounds)]
    records += [with_processes(sizes, world_size=count, shards=arguments.shards) for count in (1, 2)]
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    print(report(records))
    return 0


def against_forward(sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Return the seconds of generation and of the bare forward of the same batches, medians of `rounds`."""
    model, tokenizer = make_teacher(sizes), make_tokenizer(sizes.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        maker, record = make_maker(Path(directory), sizes, model, tokenizer)
        inputs = padded_batches(make_shard(0, sizes), sizes, tokenizer)
        bare_forward(model, inputs[:1])  # the first one allocates
        taken: dict[str, list[tuple[float, float]]] = {"generation": [], "forward": []}
        positions = entries = size = 0
        for number in range(rounds):
            shard = OpenShard(number, 0, make_shard(0, sizes).texts)
            taken["generation"].append(timed(lambda shard=shard: publish([shard], maker, record)))  # type: ignore[misc]
            taken["forward"].append(timed(lambda: bare_forward(model, inputs)))
        content = maker.compute(make_shard(0, sizes))
        positions, size = content.positions, len(maker.encode(content))
        entries = len(content.targets.head_ids) + len(content.targets.tail_ids)
    medians = {name: [statistics.median(part) for part in zip(*pairs, strict=True)] for name, pairs in taken.items()}
    return {
        "case": "generation_to_forward",
        **vars(sizes),
        "rounds": rounds,
        "positions": positions,
        "ids_per_position": entries / positions,
        "bytes_per_position": size / positions,
        **{f"{name}_seconds": wall for name, (wall, _) in medians.items()},
        **{f"{name}_cpu_seconds": cpu for name, (_, cpu) in medians.items()},
        "ratio": medians["generation"][0] / medians["forward"][0],
        "cpu_ratio": medians["generation"][1] / medians["forward"][1],
        "load": os.getloadavg()[0],
    }


def with_processes(sizes: Sizes, *, world_size: int, shards: int) -> dict[str, Any]:
    """Return positions a second of `world_size` processes that begin together and make `shards` shards in all."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        command = [sys.executable, "-m", "bench.generate", "--place", directory, "--world-size", str(world_size)]
        command += [word for name, value in vars(sizes).items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command += ["--shards", str(shards), "--rank"]
        started = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(world_size)
        ]
        wait_for(lambda: len(list(place.glob("ready-*"))) == world_size, started)
        (place / GO).touch()
        answers = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed; see what it printed")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    seconds = max(part["ended"] for part in found) - min(part["began"] for part in found)
    positions = sum(part["positions"] for part in found)
    return {
        "case": f"processes_{world_size}",
        **vars(sizes),
        "shards": shards,
        "positions": positions,
        "seconds": seconds,
        "cpu_seconds": sum(part["cpu_seconds"] for part in found),
        "positions_per_second": positions / seconds,
        "load": os.getloadavg()[0],
    }


def work(place: Path, sizes: Sizes, shards: Sequence[int]) -> dict[str, float]:
    """Make some shards when all processes are ready; return how many positions, and when, by the machine's clock."""
    model, tokenizer = make_teacher(sizes), make_tokenizer(sizes.vocab_size)
    maker, record = make_maker(place / "cache", sizes, model, tokenizer)
    todo = [make_shard(group, sizes) for group in shards]
    maker.compute(OpenShard(0, 0, todo[0].texts[:1]))  # the first one allocates
    (place / f"ready-{os.getpid()}").touch()
    wait_for((place / GO).exists)
    began, cpu = time.monotonic(), time.process_time()
    positions = publish(todo, maker, record)
    return {
        "positions": positions,
        "began": began,
        "ended": time.monotonic(),
        "cpu_seconds": time.process_time() - cpu,
    }


def wait_for(is_there: Callable[[], bool], processes: Sequence[subprocess.Popen[str]] = ()) -> None:
    """Wait until it is; raise SystemExit where a process has failed or TIMEOUT is over."""
    begun = time.monotonic()
    while not is_there():
        if any(process.poll() for process in processes) or time.monotonic() - begun > TIMEOUT:
            raise SystemExit("a process failed; see what it printed")
        time.sleep(0.05)


def publish(shards: Sequence[OpenShard], maker: ShardMaker, record: Record) -> int:
    """Make shards as `generate` does, each encoded and written while the next is computed; return their positions."""
    made: list[int] = []
    with shard_writer(record, DiskSpace(record.path, min_free=1, max_bytes=None), published=made.append) as write:
        for shard in shards:
            content = maker.compute(shard, report=lambda _: write(None))
            write(lambda content=content: (content, maker.encode(content)))  # type: ignore[misc]
    return sum(made)


def bare_forward(model: LlamaForCausalLM, inputs: Sequence[dict[str, Tensor]]) -> None:
    """Make the logits of all positions of each batch, and nothing of them."""
    with torch.inference_mode():
        for batch in inputs:
            model(**batch, use_cache=False).logits  # noqa: B018


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds, and the processor's seconds of all threads, that a call takes."""
    began, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - cpu


def make_teacher(sizes: Sizes) -> LlamaForCausalLM:
    """Return a random Llama whose logits at a position deviate by what the sizes say."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=6,
        max_position_embeddings=LENGTHS[1],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        ids = torch.arange(64)[None] % sizes.vocab_size
        model.lm_head.weight *= sizes.logit_deviation / model(ids).logits.std(dim=-1).mean()
    return model.eval()


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words: `w7` is 7."""
    words = models.WordLevel({f"w{n}": n for n in range(vocab_size)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_shard(group: int, sizes: Sizes) -> OpenShard:
    """Return a shard of texts; words are as rare as in a language, p ~ 1 / (rank + 10)."""
    rng = np.random.default_rng(group)
    p = 1 / (np.arange(sizes.vocab_size) + 10)
    texts: list[str | None] = []
    for length in np.linspace(*LENGTHS, sizes.samples).astype(int):
        texts.append(" ".join(f"w{n}" for n in rng.choice(sizes.vocab_size, length, p=p / p.sum())))
    return OpenShard(group, 0, texts)


def padded_batches(shard: OpenShard, sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Tensor]]:
    """Return the batches that the pipeline makes of a shard, padded on the right."""
    rows = [torch.tensor(ids) for ids in tokenizer(shard.texts)["input_ids"]]
    groups = batches([len(row) for row in rows], tokens_per_batch=sizes.tokens_per_batch)
    made = []
    for group in groups:
        ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in group], batch_first=True)
        lengths = torch.tensor([len(rows[i]) for i in group])
        made.append({"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()})
    return made


def make_maker(
    path: Path, sizes: Sizes, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[ShardMaker, Record]:
    """Return what makes the shards of a cache at `path` with the default targets, and the cache's record."""
    identity = {
        "teacher": {"vocab_size": sizes.vocab_size},
        "targets": {"method": "threshold", "parameter": 0.03},
        "layout": {"lanes": 1, "samples_per_shard": sizes.samples},
    }
    make_directories(path)
    record = Record(path, identity, {}, {}, rank_tokens(np.arange(sizes.vocab_size, 0, -1)))
    maker = ShardMaker(
        record,
        teacher=Teacher(model, head_chunk=sizes.head_chunk, valid_ids=sizes.vocab_size),
        tokenizer=tokenizer,
        rule=SequenceRule(LENGTHS[1], "truncate", True, False),
        sampling=Sampling("threshold", 0.03, 1.0, 0),
        tokens_per_batch=sizes.tokens_per_batch,
    )
    return maker, record


def report(records: Sequence[dict[str, Any]]) -> str:
    """Return what the records say."""
    ratio, one, two = records
    speed = two["positions_per_second"] / one["positions_per_second"]
    cpu = two["cpu_seconds"] / one["cpu_seconds"]
    return "\n".join(
        [
            f"generation / bare forward: {ratio['ratio']:.3f} in wall time, {ratio['cpu_ratio']:.3f} in processor time "
            f"({ratio['positions']:,} positions, {ratio['ids_per_position']:.1f} ids and "
            f"{ratio['bytes_per_position']:.1f} bytes each, medians of {ratio['rounds']}, load {ratio['load']:.1f})",
            *(
                f"{part['case'].replace('_', ' ')}: {part['positions_per_second']:,.0f} positions/s, "
                f"{part['cpu_seconds']:.1f} s of processor time, load {part['load']:.1f}"
                for part in (one, two)
            ),
            f"2 processes against 1: {speed:.2f} x the positions/s, {cpu:.3f} x the processor time",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
