"""A training batch that goes from a dataloader worker to the process that trains as plain arrays.

The one decision: its tensors are pickled as numpy arrays. Torch would put each of a batch's ten into shared memory of
its own and send a file descriptor, which costs the process that trains more than twice as much (docs/results.md), and
needs room in /dev/shm. It costs that a batch is copied into a pipe and out of it: 0.4 MB for 8 rows of 341 tokens.
"""

from torch import Tensor, from_numpy


class WorkerBatch(dict[str, Tensor]):
    """Tensors on the host by name; once it was pickled, a dict of equal ones."""

    def __reduce__(self) -> tuple:
        return _tensors, ({name: tensor.numpy() for name, tensor in self.items()},)


def _tensors(arrays: dict) -> dict[str, Tensor]:
    return {name: from_numpy(array) for name, array in arrays.items()}
