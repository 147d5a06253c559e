"""Measure sparse targets: ids and bytes a position, variance and bias, speed; a table, JSON and a plot.

The one decision: everything goes through the cache's own sampler, columns and shard file, so a byte here is a byte on
disk. The teacher's logits give variance and bias, as its distributions are known; the file of targets, where there is
one, gives the bytes of a large vocabulary. Speeds are the best of three, of one thread.

    python bench/targets.py [--proxy FILE.npz] [--teacher DIR --text FILE.jsonl] [--json FILE] [--plot FILE.png]
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from accel_distill.codec import Arrays, Method, invert, offsets, rank_tokens
from accel_distill.rows import RowReader, Rows, encode_rows
from accel_distill.shard import shard_bytes
from accel_distill.targets import SparseTargets, concatenate, read_logits, sample
from bench.proxy import ROW_TOKENS, read_proxy

DATA = Path(os.environ.get("ACCEL_DISTILL_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SWEEP: list[tuple[Method, float]] = [
    *(("threshold", t) for t in (0.12, 0.06, 0.03, 0.02, 0.01)),
    *(("random", n) for n in (12, 25, 50, 100, 200)),
    *(("top_k", k) for k in (4, 8, 16, 32, 64)),
]
AT_ONCE = 1024  # positions whose dense distributions exist at once
REPEATS = 3
SHARD_SAMPLES = 1024  # the default of cache.samples_per_shard
BLOCK_ROWS = 48  # decoded at once: 16,384 tokens, as in training
HEAD = {"vocab_size": 32_000, "hidden_size": 2048, "positions": 256}  # what the samplers' time is compared with
HEAD_REPEATS = 5


class Text(NamedTuple):
    """Held-out text with the teacher's logits."""

    lengths: np.ndarray  # (rows,) tokens
    input_ids: np.ndarray  # (T,)
    logits: Tensor  # (P, V) float32, P = T - rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description="Measure sparse targets.")
    parser.add_argument("--proxy", type=Path, help="a file of targets of a large vocabulary")
    parser.add_argument("--teacher", type=Path, default=DATA / "models" / "stories260K")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "tinystories_valid.jsonl")
    parser.add_argument("--positions", type=int, default=20_000, help="of the text, at least")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    if arguments.proxy:
        results.append(measure_proxy(arguments.proxy))
        print(proxy_report(results[0]) + "\n")
    if arguments.teacher.is_dir() and arguments.text.is_file():
        text = read_text(arguments.teacher, arguments.text, positions=arguments.positions)
        results += [measure_teacher(text, method, parameter) for method, parameter in SWEEP]
        print(f"{arguments.teacher.name} on {arguments.text.name}, {describe(text)}")
        print(table(results) + "\n")
        print(comparison(results) + "\n")
    else:
        print(f"variance is not measured: no teacher at {arguments.teacher}, or no text at {arguments.text}\n")
    print(sampler_cost())
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        draw(results, arguments.plot)
    return 0


def measure_proxy(path: Path) -> dict[str, Any]:
    """Return the row of the file's targets; their variance cannot be known."""
    proxy = read_proxy(path)
    sizes = measure_columns(
        proxy.rows, method="threshold", parameter=proxy.threshold, ids_by_rank=rank_tokens(proxy.unigram_counts)
    )
    settings = {"source": "proxy", "method": "threshold", "parameter": proxy.threshold}
    return {**settings, **sizes, "variance": None, "mean_error_norm": None, "moved_weight": proxy.moved_weight}


def measure_teacher(text: Text, method: Method, parameter: float) -> dict[str, Any]:
    """Return the row of one method and parameter on the teacher's own distributions."""
    row = torch.from_numpy(np.repeat(np.arange(len(text.lengths)), text.lengths - 1))
    position = torch.from_numpy(np.concatenate([np.arange(length - 1) for length in text.lengths]))
    parts, squared, error = [], 0.0, torch.zeros(text.logits.shape[1], dtype=torch.float64)
    for start in range(0, len(text.logits), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        logits = text.logits[part]
        chunk = read_logits(logits.clone(), next_ids=logits.argmax(-1))
        where = {"sample_index": row[part], "position": position[part]}
        parts.append(sample(chunk, method=method, parameter=parameter, seed=0, **where))
        difference = weights_of(parts[-1], logits.shape[1]) - logits.double().softmax(-1)
        squared += float(difference.square().sum())
        error += difference.sum(0)
    counts = np.bincount(text.input_ids, minlength=text.logits.shape[1])
    rows = rows_of(text, concatenate(parts))
    sizes = measure_columns(rows, method=method, parameter=parameter, ids_by_rank=rank_tokens(counts))
    quality = {"variance": squared / len(row), "mean_error_norm": float(error.norm()) / len(row)}
    return {"source": "teacher", "method": method, "parameter": parameter, **sizes, **quality}


def weights_of(targets: SparseTargets, vocab_size: int) -> Tensor:
    """Return what training takes as the target, (P, V) float64: `top_k` renormalised, the others as they are."""
    weights = targets.to_dense(vocab_size).double()
    return weights / weights.sum(-1, keepdim=True) if targets.method == "top_k" else weights


def measure_columns(rows: Rows, *, method: Method, parameter: float, ids_by_rank: np.ndarray) -> dict[str, Any]:
    """Write the rows as a shard and read it back: ids and bytes a position, speeds, and the bound of the ids."""
    settings: dict[str, Any] = {"method": method, "parameter": parameter}
    ranks, positions = invert(ids_by_rank), int(rows.positions[-1])
    data, encode_seconds = best(lambda: shard_bytes(header_of(rows), encode_rows(rows, **settings, ranks=ranks)))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard.h5"
        path.write_bytes(data)
        reader = RowReader(path, **settings, ids_by_rank=ids_by_rank)
        stored, sizes = reader.stored_bytes(), reader.totals()
        starts = range(0, len(reader), BLOCK_ROWS)
        _, decode_seconds = best(lambda: [reader.read(i, min(i + BLOCK_ROWS, len(reader))) for i in starts])
        reader.close()
    inputs = sum(size for name, size in stored.items() if "input_ids" in name)
    ids = sum(size for name, size in stored.items() if "head_ids" in name or "tail_ids" in name)
    return {
        "ids_per_position": (sizes["heads"] + sizes["tails"]) / positions,
        "bytes_per_position": (sum(stored.values()) - inputs) / positions,
        "input_ids_bytes_per_position": inputs / positions,
        "id_bytes_per_position": ids / positions,
        "id_bound_bytes_per_position": id_bound(rows.targets) / positions,
        "file_overhead_bytes_per_shard": len(data) - sum(stored.values()),
        "rank_table_bytes": 4 * len(ids_by_rank),
        "encode_positions_per_s": positions / encode_seconds,
        "decode_positions_per_s": positions / decode_seconds,
    }


def id_bound(targets: Arrays) -> float:
    """Return the bytes that the ids take at least, if each is coded by its frequency among these alone.

    The order-0 entropies of head and of tail ids, less log2(n!) for each tail of n ids, whose order is free.
    """
    bits = sum(order_0_bits(targets[name]) for name in ("head_ids", "tail_ids"))
    return (bits - sum(math.lgamma(n + 1) for n in targets["tail_count"].tolist()) / math.log(2)) / 8


def order_0_bits(values: np.ndarray) -> float:
    """Return the entropy of the values, times their number, in bits."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if len(values) else 0.0


def total_bytes(result: dict[str, Any]) -> float:
    """Return bytes a position with `input_ids` and a file's overhead, in a shard of 1,024 samples of 341 tokens."""
    overhead = result["file_overhead_bytes_per_shard"] / (SHARD_SAMPLES * ROW_TOKENS)
    return result["bytes_per_position"] + result["input_ids_bytes_per_position"] + overhead


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return one line for each method and parameter of the teacher."""
    lines = [
        f"{'method':10}{'parameter':>10}{'ids':>8}{'bytes':>8}{'+ input':>9}{'E|w-p|^2':>11}{'bias norm':>11}"
        f"{'encode/s':>12}{'decode/s':>12}"
    ]
    for found in (result for result in results if result["source"] == "teacher"):
        lines.append(
            f"{found['method']:10}{found['parameter']:10g}{found['ids_per_position']:8.2f}"
            f"{found['bytes_per_position']:8.2f}{found['input_ids_bytes_per_position']:9.2f}"
            f"{found['variance']:11.2e}{found['mean_error_norm']:11.2e}"
            f"{found['encode_positions_per_s']:12,.0f}{found['decode_positions_per_s']:12,.0f}"
        )
    return "\n".join(lines)


def proxy_report(found: dict[str, Any]) -> str:
    """Return what the file's targets take, and how far their ids are from the bound."""
    ids, bound = found["id_bytes_per_position"], found["id_bound_bytes_per_position"]
    return (
        f"proxy of a large vocabulary, threshold {found['parameter']:g}: {found['ids_per_position']:.2f} ids\n"
        f"  {found['bytes_per_position']:.2f} bytes a position, {found['input_ids_bytes_per_position']:.2f} more for "
        f"input_ids; {found['file_overhead_bytes_per_shard']:,} bytes a shard,\n"
        f"  so {total_bytes(found):.2f} in all in shards of {SHARD_SAMPLES:,} samples of {ROW_TOKENS} tokens "
        f"(and {found['rank_table_bytes']:,} bytes once a cache, for the ranks)\n"
        f"  ids {ids:.2f} bytes, {ids / bound - 1:.1%} above the bound of {bound:.2f}\n"
        f"  encode {found['encode_positions_per_s']:,.0f}, decode {found['decode_positions_per_s']:,.0f} positions/s\n"
        f"  (to have the file's numbers of tail ids, {found['moved_weight']:.2%} of the weight was moved)"
    )


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """Say how many ids and bytes `threshold` takes at the variance of 50 random draws."""
    draws = next(found for found in results if (found["method"], found["parameter"]) == ("random", 50))
    curve = [found for found in results if (found["source"], found["method"]) == ("teacher", "threshold")]
    curve.sort(key=lambda found: found["variance"])
    lines = [f"at the variance of 50 random draws ({draws['variance']:.2e}; threshold interpolated):"]
    for name, unit in (("ids_per_position", "ids"), ("bytes_per_position", "bytes")):
        variances, sizes = (np.log([found[key] for found in curve]) for key in ("variance", name))
        at = math.exp(
            np.interp(math.log(draws["variance"]), variances, sizes)
        )  # both are nearly straight in logarithms
        lines.append(f"  random {draws[name]:.2f} {unit}, threshold {at:.2f}, that is {at / draws[name]:.0%}")
    return "\n".join(lines)


def sampler_cost() -> str:
    """Say what reading and sampling logits costs beside the LM head that makes them, for each method."""
    torch.manual_seed(0)
    vocab_size, width, count = HEAD["vocab_size"], HEAD["hidden_size"], HEAD["positions"]
    hidden, weight = torch.randn(count, width), torch.randn(vocab_size, width) * 3.9 / math.sqrt(width)
    place = {"sample_index": torch.zeros(count, dtype=torch.long), "position": torch.arange(count)}
    logits, head_seconds = best(lambda: hidden @ weight.T, repeats=HEAD_REPEATS)
    next_ids = logits.argmax(-1)
    size = f"V = {vocab_size:,}, width {width:,}, {count} positions, entropy {entropy(logits):.1f} nats"
    lines = [f"the LM head alone ({size}): {1000 * head_seconds:.0f} ms; reading and sampling its logits:"]
    cases: list[tuple[Method, float]] = [("threshold", 0.06), ("threshold", 0.03), ("random", 50), ("top_k", 64)]
    for method, parameter in cases:
        copies = [logits.clone() for _ in range(HEAD_REPEATS)]  # they are overwritten

        def take(method: Method = method, parameter: float = parameter, copies: list[Tensor] = copies) -> None:
            chunk = read_logits(copies.pop(), next_ids=next_ids)
            sample(chunk, method=method, parameter=parameter, seed=0, **place)

        _, seconds = best(take, repeats=HEAD_REPEATS)
        lines.append(f"  {method:10}{parameter:6g}{1000 * seconds:8.1f} ms, {seconds / head_seconds:.1%} of it")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bytes against variance, one curve for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    labels = {"threshold": "threshold t", "random": "random draws N", "top_k": "top k, renormalised (biased)"}
    for method, label in labels.items():
        curve = [found for found in results if found["source"] == "teacher" and found["method"] == method]
        x, y = ([found[name] for found in curve] for name in ("bytes_per_position", "variance"))
        axes.plot(x, y, marker="o", label=label, linestyle="--" if method == "top_k" else "-")
        for found, right, up in zip(curve, x, y, strict=True):
            axes.annotate(f"{found['parameter']:g}", (right, up), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="bytes a position, without input_ids", ylabel="E|w - p|²")
    axes.xaxis.set_major_locator(ticker.FixedLocator([4, 6, 10, 15, 20, 40, 70, 140]))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(visible=True, alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def read_text(teacher: Path, text: Path, *, positions: int) -> Text:
    """Run the teacher over whole texts, until there are `positions`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher).eval()
    longest = model.config.max_position_embeddings
    rows: list[np.ndarray] = []
    logits: list[Tensor] = []
    with open(text, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], verbose=False)["input_ids"][:longest]
            rows.append(np.array(ids))
            logits.append(model(torch.tensor([ids])).logits[0, :-1].float())
            if sum(map(len, logits)) >= positions:
                break
    return Text(np.array([len(row) for row in rows]), np.concatenate(rows), torch.cat(logits))


def rows_of(text: Text, targets: SparseTargets) -> Rows:
    """Return the text's rows with their targets."""
    tokens = offsets(text.lengths)
    mask = np.ones(tokens[-1], bool)
    mask[tokens[1:] - 1] = False
    nothing = np.zeros(len(text.lengths))
    return Rows(
        sample_index=np.arange(len(text.lengths)),
        tokens=tokens,
        positions=offsets(text.lengths - 1),
        input_ids=text.input_ids,
        target_mask=mask,
        targets=targets.arrays(),
        entropy=nothing,
        logprob=nothing,
    )


def header_of(rows: Rows) -> dict[str, Any]:
    """Return the fields of a shard's header that a reader of rows asks for; the others say nothing."""
    count = len(rows.sample_index)
    zeros = dict.fromkeys(("group", "lane", "first_sample", "empty", "truncated", "untargeted", "nonfinite"), 0)
    sizes = {"samples": count, "sequences": count, "tokens": int(rows.tokens[-1]), "positions": int(rows.positions[-1])}
    return {**zeros, **sizes, "cache_id": "", "texts_sha256": ""}


def describe(text: Text) -> str:
    """Return how much text there is, and how sure the teacher is of it."""
    count, vocab_size = text.logits.shape
    return f"{count:,} positions, V = {vocab_size:,}, entropy {entropy(text.logits):.2f} nats"


def entropy(logits: Tensor) -> float:
    """Return the mean entropy of the rows, nats."""
    return float(torch.distributions.Categorical(logits=logits).entropy().mean())


def best(run: Callable[[], Any], *, repeats: int = REPEATS) -> tuple[Any, float]:
    """Return the last result of `run` and its least time in seconds."""
    seconds = math.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        result = run()
        seconds = min(seconds, time.perf_counter() - begun)
    return result, seconds


if __name__ == "__main__":
    raise SystemExit(main())
