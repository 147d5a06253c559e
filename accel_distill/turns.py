"""The forwards of a teacher that ranks share: all take part in each, or all wait.

The one decision: before each forward the ranks add up who has a batch. One that has none takes part with a made-up one
until nobody has any, so uneven ends cannot hang. It costs an all-reduce of one number a forward. Ranks that share
nothing have no turns: for them `take` answers at once.
"""

import torch


class Turns:
    """The turns of one rank."""

    def __init__(self, *, shared: bool, device: torch.device) -> None:
        """`shared`: the ranks of the process group share a teacher; `device` is that of its collectives."""
        self._shared, self._device = shared, device

    def take(self, *, has_batch: bool) -> bool:
        """Wait for the other ranks; return whether any of them has a batch, and with it a forward to take part in."""
        if not self._shared:
            return has_batch
        count = torch.tensor(int(has_batch), device=self._device)
        torch.distributed.all_reduce(count)
        return bool(count)
