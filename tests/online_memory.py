"""Take a training step with an online teacher's dense targets; print its peak memory above that before, in bytes.

Arguments: vocabulary (of both), positions.
"""

import sys

import torch
from memory_run import Peak, resident
from transformers import LlamaConfig, LlamaForCausalLM

from accel_distill.fused_head import FusedHead
from accel_distill.lm_head import separate_head
from accel_distill.losses import Objective
from accel_distill.online_targets import OnlineTargets
from accel_distill.teacher import Teacher
from accel_distill.text_collator import TextCollator
from accel_distill.text_rows import TextRow
from accel_distill.tokens import TokenSequence


def make_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Return a random model with a narrow head."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes))


def main(vocab_size: int, positions: int) -> None:
    """Warm up on a short row, then measure a step on a long one."""
    student = make_model(vocab_size, 1)
    head, _ = separate_head(student)
    assert head is not None
    fused = FusedHead(head)
    targets_of = OnlineTargets(Teacher(make_model(vocab_size, 0), head_chunk=256, valid_ids=vocab_size), None)
    objective, collate = Objective(kind="dense", temperature=2.0, divergence="jsd"), TextCollator(pad_token_id=0)

    def step(length: int) -> None:
        ids = torch.randint(vocab_size, (length,)).numpy()
        batch = collate([TextRow(TokenSequence(0, 0, ids))])
        taught = targets_of(batch, objective)
        ran = fused.run(student, taught.job, input_ids=batch["input_ids"], use_cache=False)
        ran.loss.backward()
        assert len(ran.losses.kd) == length - 1 and bool((ran.losses.kd > 0).all())

    step(3)
    before = resident()
    with Peak() as peak:
        step(positions + 1)
    print(peak.highest - before)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
