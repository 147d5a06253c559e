"""Run a teacher over 512 positions in a process of its own; print the peak memory above the loaded model, in bytes.

Arguments: vocabulary, hidden size, head_chunk, method, parameter.
"""

import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accel_distill.teacher import Sampling, Teacher
from accel_distill.tokens import TokenSequence


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """Watches resident memory from a thread, every millisecond."""

    def __init__(self) -> None:
        self.highest, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.highest = max(self.highest, resident())
            time.sleep(0.001)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    """Load, warm up on two tokens, measure."""
    vocab_size, hidden_size, head_chunk = (int(word) for word in sys.argv[1:4])
    sampling = Sampling(sys.argv[4], float(sys.argv[5]), 1.0, 0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=vocab_size, num_attention_heads=4, num_key_value_heads=4, **sizes)
    teacher = Teacher(LlamaForCausalLM(config), head_chunk=head_chunk, valid_ids=vocab_size)
    ids = np.random.default_rng(0).integers(0, vocab_size, 513)
    teacher.targets_for([TokenSequence(0, 0, ids[:2])], sampling=sampling)
    before = resident()
    with Peak() as peak:
        output = teacher.targets_for([TokenSequence(0, 0, ids)], sampling=sampling)
    assert len(output.targets) == 512
    print(peak.highest - before)


if __name__ == "__main__":
    main()
