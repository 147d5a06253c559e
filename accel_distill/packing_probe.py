"""Whether a model keeps the documents of a packed row apart, proved on a few tokens before the first step.

The one decision: nothing is looked up by model class. A document's logits must not depend on what stands beside it in
its row, nor on its place there. The proof runs through the wrapped model on every process alike, so it is right for
divided weights, compiled models and whatever attention runs. It costs four forwards of two rows of 16 tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DOCUMENT, PADDING = 7, 2  # tokens
BESIDE = 1e-4  # of the largest logit: what another neighbour may change, with the same shapes everywhere
PLACED = 1e-3  # of the largest logit: what another place may change, as sums are taken in another order; in
HALF_PLACED = 0.05  # half precision
SHOWN = 10  # times BESIDE: less dependence on what stands before proves nothing

Run = Callable[[Tensor, Tensor], Tensor]  # input_ids (B, T), position_ids (B, T) to logits (B, T, V) or (1, B * T, V)


@torch.no_grad()
def packing_fault(run: Run, *, vocab_size: int, rows: int, half: bool, device: torch.device) -> tuple[str, bool]:
    """Return what is wrong with a model's packed rows, or nothing; and whether its tokens depend on those before.

    Where they do not (yet), the proof is empty. `rows` (1 or 2) are run at once, as flash attention knows packed rows
    by their being alone; `half` says that the model computes in half precision.
    """
    generator = torch.Generator().manual_seed(0)
    left, other, mine = torch.randint(vocab_size, (3, DOCUMENT), generator=generator).to(device)
    padding = mine[:PADDING]
    document, end = torch.arange(DOCUMENT, device=device), torch.arange(PADDING, device=device)
    packed = torch.cat([document, document, end])
    one = torch.arange(2 * DOCUMENT + PADDING, device=device)

    def logits(first: Tensor, second: Tensor, positions: Tensor) -> Tensor:
        """Run two documents and padding, `rows` times; return the logits (2, DOCUMENT, V) of the last row's two."""
        ids = torch.cat([first, second, padding]).expand(rows, -1).contiguous()
        found = run(ids, positions.expand(rows, -1).contiguous()).float().reshape(rows, len(one), -1)[-1]
        return found[: 2 * DOCUMENT].unflatten(0, (2, DOCUMENT))

    before, beside = logits(left, mine, packed)[1], logits(other, mine, packed)[1]
    first = logits(mine, left, packed)[0]
    joined = logits(left, mine, one)[1]
    largest = float(before.abs().max())
    changed, placed, depends = (float((before - found).abs().max()) for found in (beside, first, joined))
    is_shown = depends > SHOWN * BESIDE * largest
    if not changed <= BESIDE * largest:
        return f"another document in the same row changes its logits by {changed:.3g} of {largest:.3g}", is_shown
    if not placed <= (HALF_PLACED if half else PLACED) * largest:
        return f"a document's place in a row changes its logits by {placed:.3g} of {largest:.3g}", is_shown
    return "", is_shown
