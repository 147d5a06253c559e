"""Sparse targets of a chunk of positions: the data structure and the three samplers that make it.

The one decision: what is stored are integers (weights in units of 1/M, counts of draws, log-probabilities in steps),
and the float weights are derived from them, so that a target read from a cache is the target that the sampler made.

The samplers never copy the chunk in float64: probabilities stay float32 and unnormalised, sums go over blocks of 256
ids first and then, in float64, over the blocks; only a block that is hit is searched. A plain float32 cumulative sum
over 262,208 ids would give a third of them an interval of width zero.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from accel_distill.codec import LOGPROB_MAX, Arrays, Method, tail_counts, weight_scale
from accel_distill.uniforms import uniforms

BLOCK = 256  # ids summed in float32; 512 searches slower, 128 sums slower (measured at V = 32,000)
TILE = 1 << 17  # logits that a CPU reads at once, so that all passes over them but the first find them in its cache
SEARCHED_AT_ONCE = 4096  # points: their blocks take 4096 x 256 x 8 bytes = 8 MiB
TIE = 1e-6  # relative: ids this close below the threshold count as above it, so that no tail id is hit twice


@dataclass(frozen=True)
class SparseTargets:
    """Target distributions of P positions, ragged: each has head ids, the teacher's top id first, and tail ids.

    For `threshold` and `random` a position's weights sum to exactly 1; for `top_k` they are the k largest
    probabilities, and what they lack of 1 is the mass of all other ids together.
    """

    method: Method
    parameter: float  # the threshold, k, or the number of draws
    head_count: Tensor  # (P,) int64, at least 1
    head_ids: Tensor  # (H,) int64, in descending probability
    head_values: Tensor  # (H,) int64: weights in 1/M, counts of draws, or -log p in 1/2048 nat
    tail_count: Tensor  # (P,) int64
    tail_ids: Tensor  # (K,) int64
    tail_values: Tensor  # (K,) int64 for `random`, else (0,): the tail ids of a position share what is left of M

    @property
    def scale(self) -> int:
        """The total M (threshold), the number of draws (random) or the steps of a nat (top_k)."""
        return weight_scale(self.method, self.parameter)

    def __len__(self) -> int:
        return len(self.head_count)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (offsets (P+1,), ids (E,), weights (E,) float32), head before tail at each position."""
        head_weights, tail_weights = self._weights()
        tail_ends = self.tail_count.cumsum(0)
        head_ends = self.head_count.cumsum(0)
        head_at = _counter(self.head_ids) + (tail_ends - self.tail_count).repeat_interleave(self.head_count)
        tail_at = _counter(self.tail_ids) + head_ends.repeat_interleave(self.tail_count)
        ids = self.head_ids.new_empty(len(self.head_ids) + len(self.tail_ids))
        ids[head_at], ids[tail_at] = self.head_ids, self.tail_ids
        weights = head_weights.new_empty(len(ids))
        weights[head_at], weights[tail_at] = head_weights, tail_weights
        return torch.cat([head_ends.new_zeros(1), head_ends + tail_ends]), ids, weights

    def to_dense(self, vocab_size: int) -> Tensor:
        """Return the weights as (P, vocab_size) float32."""
        offsets, ids, weights = self.entries()
        rows = _counter(self.head_count).repeat_interleave(offsets.diff())
        dense = torch.zeros(len(self), vocab_size, dtype=torch.float32, device=ids.device)
        return dense.index_put_((rows, ids), weights, accumulate=True)

    def position_slice(self, start: int, stop: int) -> "SparseTargets":
        """Return the targets of positions `start` to `stop` (exclusive)."""
        heads = slice(int(self.head_count[:start].sum()), int(self.head_count[:stop].sum()))
        tails = slice(int(self.tail_count[:start].sum()), int(self.tail_count[:stop].sum()))
        return SparseTargets(
            self.method,
            self.parameter,
            self.head_count[start:stop],
            self.head_ids[heads],
            self.head_values[heads],
            self.tail_count[start:stop],
            self.tail_ids[tails],
            self.tail_values[tails],
        )

    def cpu(self) -> "SparseTargets":
        """Return the same targets on the host."""
        return self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> "SparseTargets":
        """Return the same targets on a device."""
        return SparseTargets(self.method, self.parameter, *(getattr(self, f.name).to(device) for f in fields(self)[2:]))

    def arrays(self) -> Arrays:
        """Return the integer fields as numpy arrays on the host, as the codec takes them."""
        return {f.name: getattr(self, f.name).cpu().numpy() for f in fields(self)[2:]}

    @classmethod
    def from_arrays(cls, arrays: Arrays, *, method: Method, parameter: float) -> "SparseTargets":
        """Wrap the integer fields, as the codec gives them; no copy."""
        return cls(method, parameter, **{f.name: torch.from_numpy(arrays[f.name]) for f in fields(cls)[2:]})

    def _weights(self) -> tuple[Tensor, Tensor]:
        values = self.head_values.double()
        if self.method == "top_k":
            return (values / -self.scale).exp().float(), self.tail_ids.float()
        if self.method == "random":
            return (values / self.scale).float(), (self.tail_values.double() / self.scale).float()
        rows = _counter(self.head_count).repeat_interleave(self.head_count)
        left = self.scale - values.new_zeros(len(self)).index_add_(0, rows, values)
        share = left / (self.scale * self.tail_count.clamp(min=1))
        return (values / self.scale).float(), share.repeat_interleave(self.tail_count).float()


@dataclass
class Chunk:
    """The teacher's distributions at n positions, unnormalised."""

    mass: Tensor  # (n, V) float32: exp((logit - largest) / temperature)
    blocks: Tensor  # (n, ceil(V / 256)) float64: sums of the mass over blocks of ids
    top: Tensor  # (n,) int64: the most probable id
    entropy: Tensor  # (n,) float64, nats, at the temperature; NaN where a logit is not finite
    logprob: Tensor  # (n,) float64: log-probability of `next_ids` at temperature 1

    def only(self, wanted: Tensor) -> "Chunk":
        """Return the positions at which `wanted` (n,) bool is true."""
        return Chunk(*(getattr(self, field.name)[wanted] for field in fields(self)))


def read_logits(logits: Tensor, *, next_ids: Tensor, temperature: float = 1.0, valid_ids: int | None = None) -> Chunk:
    """Turn logits (n, V) into a `Chunk`; float32 logits become its mass, in place.

    Ids from `valid_ids` on do not exist (a padded vocabulary). `next_ids` (n,) is the true next token of each position.
    """
    z = logits.float()[:, :valid_ids]
    rows = max(1, TILE // z.shape[1]) if z.device.type == "cpu" else max(1, len(z))
    parts = [slice(start, start + rows) for start in range(0, max(1, len(z)), rows)]
    found = [_read_tile(z[part], next_ids[part], temperature=temperature) for part in parts]
    return Chunk(z, *(torch.cat(values) for values in zip(*found, strict=True)))


def _read_tile(z: Tensor, next_ids: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn logits (m, V) into mass, in place; return blocks, top, entropy and logprob as `Chunk` says."""
    largest = _by_block(z, torch.amax)
    most = largest.amax(-1, keepdim=True)
    every, block = _counter(z), (largest == most).int().argmax(-1)
    top = block * BLOCK + _gather_blocks(z, every, block, fill=-torch.inf).argmax(-1)
    z.sub_(most)
    logprob = z.gather(1, next_ids[:, None])[:, 0].double()
    if temperature != 1.0:
        logprob -= z.exp().sum(-1).double().log()
        z.div_(temperature)
    mass = z.exp()
    blocks = _by_block(mass, torch.sum).double()
    total = blocks.sum(-1)
    entropy = total.log() - _by_block(z.mul_(mass), torch.sum).double().sum(-1) / total
    if temperature == 1.0:
        logprob -= total.log()
    z.copy_(mass)
    return blocks, top, entropy, logprob


def sample(
    chunk: Chunk, *, method: Method, parameter: float, seed: int, sample_index: Tensor, position: Tensor
) -> SparseTargets:
    """Sample the targets of a chunk (consumed); `sample_index` and `position` (n,) say where its positions stand."""
    at = functools.partial(uniforms, seed=seed, sample_index=sample_index, position=position)
    if method == "threshold":
        return threshold_targets(chunk, threshold=parameter, tail=at("tail"), rounding=at("rounding"))
    if method == "random":
        return random_targets(chunk, points=at("draws", draws=int(parameter)))
    return top_k_targets(chunk, k=int(parameter))


def threshold_targets(chunk: Chunk, *, threshold: float, tail: Tensor, rounding: Tensor) -> SparseTargets:
    """Keep every id with p >= threshold, and the top id; sample the rest systematically. Unbiased, sums to 1.

    `tail` and `rounding` (n,) float64 are the uniforms u and v. The chunk's mass is overwritten: heads become zero.
    In the survey-sampling literature: systematic sampling with probability proportional to size, heads as the
    certainty stratum; in streaming algorithms: threshold sampling (Duffield, Lund, Thorup 2005).
    """
    scale = weight_scale("threshold", threshold)
    rows, ids, mass = _take_heads(chunk, threshold)
    count = torch.bincount(rows, minlength=len(chunk.top))
    slot = _counter(rows) - (count.cumsum(0) - count)[rows]
    padded = mass.new_zeros(len(count), int(count.max()) if len(count) else 0)
    padded[rows, slot] = mass
    sums = padded.cumsum(-1)
    share = (sums / (sums[:, -1:] + chunk.blocks.sum(-1, keepdim=True))).clamp_(max=1.0)
    # (scale + v) can round up to scale + 1
    steps = (scale * share + rounding[:, None]).floor_().clamp_(max=scale).long()
    values = steps.diff(dim=-1, prepend=steps.new_zeros(len(steps), 1))
    tail_count = torch.from_numpy(tail_counts(threshold).copy()).to(steps.device)[scale - steps[:, -1]]
    tail_rows = _counter(tail_count).repeat_interleave(tail_count)
    within = _counter(tail_rows) - (tail_count.cumsum(0) - tail_count)[tail_rows]
    points = (within + tail[tail_rows]) / tail_count[tail_rows]
    tail_ids = _search(chunk, tail_rows, points)
    none = tail_ids.new_empty(0)
    return SparseTargets("threshold", threshold, count, ids, values[rows, slot], tail_count, tail_ids, none)


def random_targets(chunk: Chunk, *, points: Tensor) -> SparseTargets:
    """Draw ids with replacement, N at each position, and count them (arXiv 2503.16870); `points` (n, N) are uniforms.

    The head is the top id, with its count, which may be 0: evaluation wants to know it.
    """
    vocab_size = chunk.mass.shape[1]
    rows = _counter(chunk.top).repeat_interleave(points.shape[1])
    drawn = rows * vocab_size + _search(chunk, rows, points.flatten())
    keys, counts = torch.unique(drawn, return_counts=True)
    rows, ids = keys // vocab_size, keys % vocab_size
    is_top = ids == chunk.top[rows]
    head_values = torch.zeros_like(chunk.top).index_put_((rows[is_top],), counts[is_top])
    tail_count = torch.bincount(rows[~is_top], minlength=len(chunk.top))
    ones = torch.ones_like(chunk.top)
    tail_ids, tail_values = ids[~is_top], counts[~is_top]
    return SparseTargets(
        "random", float(points.shape[1]), ones, chunk.top, head_values, tail_count, tail_ids, tail_values
    )


def top_k_targets(chunk: Chunk, *, k: int) -> SparseTargets:
    """Keep the k largest probabilities (all, where the vocabulary is smaller), as quantised log-probabilities."""
    kept = min(k, chunk.mass.shape[1])
    ids = chunk.mass.topk(kept, dim=-1).indices.sort(-1).values
    mass = chunk.mass.gather(1, ids)
    first = mass.masked_fill(ids == chunk.top[:, None], 2.0)  # above every mass, which is at most 1
    order = first.argsort(dim=-1, descending=True, stable=True)
    ids, mass = ids.gather(1, order), mass.gather(1, order)
    logprob = mass.double().log() - chunk.blocks.sum(-1, keepdim=True).log()
    values = (logprob * -weight_scale("top_k", k)).round_().clamp_(0, LOGPROB_MAX).long()
    count = torch.full_like(chunk.top, kept)
    none = ids.new_empty(0)
    return SparseTargets("top_k", float(k), count, ids.flatten(), values.flatten(), torch.zeros_like(count), none, none)


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Join targets of the same method and parameter, position after position; at least one part."""
    joined = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(SparseTargets)[2:]}
    return SparseTargets(parts[0].method, parts[0].parameter, **joined)


def no_targets(method: Method, parameter: float) -> SparseTargets:
    """Return the targets of zero positions."""
    empty: dict[str, np.ndarray] = {f.name: np.zeros(0, np.int64) for f in fields(SparseTargets)[2:]}
    return SparseTargets.from_arrays(empty, method=method, parameter=parameter)


def _take_heads(chunk: Chunk, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Move the heads out of the chunk: return (rows, ids, mass float64), by row, descending mass, then id."""
    least = chunk.blocks.sum(-1) * (threshold * (1 - TIE))
    candidate = chunk.blocks >= least[:, None] * (1 - TIE)  # only such a block can hold a head
    every, top_block = _counter(chunk.top), chunk.top // BLOCK
    candidate[every, top_block] = True
    rows, blocks = candidate.nonzero(as_tuple=True)
    mass = _gather_blocks(chunk.mass, rows, blocks)
    hit = mass >= least.float()[rows, None]
    own = blocks == top_block[rows]
    hit[own, chunk.top[rows[own]] % BLOCK] = True
    which, column = hit.nonzero(as_tuple=True)
    head_rows, head_ids, head_mass = rows[which], blocks[which] * BLOCK + column, mass[which, column].double()
    chunk.blocks[rows, blocks] = mass.masked_fill_(hit, 0.0).sum(-1).double()
    chunk.mass[head_rows, head_ids] = 0.0
    first = head_mass.masked_fill(head_ids == chunk.top[head_rows], 2.0)  # above every mass, which is at most 1
    order = first.argsort(descending=True, stable=True)
    order = order[head_rows[order].argsort(stable=True)]
    return head_rows[order], head_ids[order], head_mass[order]


def _search(chunk: Chunk, rows: Tensor, points: Tensor) -> Tensor:
    """Return, for each point in [0, 1) of its row's mass, the first id whose cumulative mass is greater: (K,)."""
    if not len(rows):
        return rows
    sums = chunk.blocks.cumsum(-1)
    target = points * sums[rows, -1]
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())[:, 0]  # the last block with any mass
    block = torch.minimum(_searchsorted_rows(sums, rows, target), last[rows])
    before = torch.where(block > 0, sums[rows, (block - 1).clamp(min=0)], 0.0)
    inside = (target - before) / chunk.blocks[rows, block]
    found = torch.empty_like(rows)
    for start in range(0, len(rows), SEARCHED_AT_ONCE):
        part = slice(start, start + SEARCHED_AT_ONCE)
        fine = _gather_blocks(chunk.mass, rows[part], block[part]).double().cumsum(-1)
        end = fine[:, -1:].contiguous()
        hit = torch.searchsorted(fine, inside[part, None] * end, right=True)
        found[part] = torch.minimum(hit, torch.searchsorted(fine, end))[:, 0]
    return block * BLOCK + found


def _searchsorted_rows(sums: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """Search each target in its own row of `sums` (n, B); `rows` ascends."""
    count = torch.bincount(rows, minlength=len(sums))
    slot = _counter(rows) - (count.cumsum(0) - count)[rows]
    padded = target.new_zeros(len(sums), int(count.max()))
    padded[rows, slot] = target
    return torch.searchsorted(sums, padded, right=True)[rows, slot]


def _by_block(values: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce (n, V) over each block of ids: (n, ceil(V / 256))."""
    whole = values.shape[1] // BLOCK * BLOCK
    parts = [reduce(values[:, :whole].unflatten(1, (-1, BLOCK)), -1)] if whole else []
    if whole < values.shape[1]:
        parts.append(reduce(values[:, whole:], -1)[:, None])
    return torch.cat(parts, dim=1)


def _gather_blocks(mass: Tensor, rows: Tensor, blocks: Tensor, *, fill: float = 0.0) -> Tensor:
    """Return the mass of whole blocks, (m, 256) float32, `fill` beyond the vocabulary."""
    whole = mass.shape[1] // BLOCK * BLOCK
    is_whole = blocks < whole // BLOCK
    if whole == mass.shape[1]:
        return mass.unflatten(1, (-1, BLOCK))[rows, blocks]
    found = mass.new_full((len(rows), BLOCK), fill)
    if whole:
        found[is_whole] = mass[:, :whole].unflatten(1, (-1, BLOCK))[rows[is_whole], blocks[is_whole]]
    found[~is_whole, : mass.shape[1] - whole] = mass[rows[~is_whole], whole:]
    return found


def _counter(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)
