"""Packed rows train as one sample a row does: the same losses, gradients and weights from the same samples."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_run import VOCAB, cached_samples, make_trainer, ragged_ids, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from accel_distill.cache import CachedSample
from accel_distill.collator import CachedLogitCollator, Row
from accel_distill.errors import ConfigError
from accel_distill.fused_head import FullLogits
from accel_distill.packs import best_fit

MOST = 24  # tokens of a row


@pytest.fixture(scope="module")
def samples() -> list[CachedSample]:
    found = cached_samples(tiny_llama(spread=0.3), ragged_ids(40))
    return [sample for sample in found if len(sample.targets)]


def rows_of(samples: list[CachedSample]) -> list[list[CachedSample]]:
    packs = best_fit([len(sample.input_ids) for sample in samples], most=MOST)
    assert len(samples) > 2.5 * len(packs) > 5
    return [[samples[index] for index in pack] for pack in packs]


def student(name: str = "llama") -> Any:
    """A student whose tokens depend much on those before them."""
    if name == "llama":
        return tiny_llama(seed=1, spread=0.3)
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, initializer_range=0.3, **sizes, **drops)
    return AutoModelForCausalLM.from_config(config)


def loss_and_gradients(path: Path, model: Any, rows: list[Row], **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what one batch of all rows gives; `changes` replace tensors of it."""
    trainer = make_trainer(path, model=model)
    trainer._keeps_documents_apart = True  # also where the batch is made wrong here
    batch = CachedLogitCollator(pad_token_id=0)(rows)
    for name, change in changes.items():
        batch[name] = change(batch[name])
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of a gradient, by the largest gradient."""
    assert found.keys() == expected.keys() and len(found) > 10
    largest = max(float(part.abs().max()) for part in expected.values())
    assert largest > 1e-3
    return max(float((found[name] - part).abs().max()) for name, part in expected.items()) / largest


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_have_the_loss_and_gradients_of_one_sample_a_row(
    samples: list[CachedSample], tmp_path: Path, name: str
) -> None:
    loss, gradients = loss_and_gradients(tmp_path, student(name), [*samples])
    packed = rows_of(samples)
    found = loss_and_gradients(tmp_path, student(name), [*packed])
    torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=0)
    assert largest_difference(found[1], gradients) < 1e-5
    one_row = loss_and_gradients(tmp_path, student(name), [[sample for row in packed for sample in row][:5]])
    alone = loss_and_gradients(tmp_path, student(name), [sample for row in packed for sample in row][:5])
    assert largest_difference(one_row[1], alone[1]) < 1e-5


def test_gradient_checkpointing_and_full_logits_change_nothing(samples: list[CachedSample], tmp_path: Path) -> None:
    _, gradients = loss_and_gradients(tmp_path, student(), [*samples])
    model = student()
    model.gradient_checkpointing_enable()
    model.train()
    assert largest_difference(loss_and_gradients(tmp_path, model, [*rows_of(samples)])[1], gradients) < 1e-5
    trainer = make_trainer(tmp_path, model=student())
    trainer._head, trainer._keeps_documents_apart = FullLogits(), True
    trainer.compute_loss(trainer.model, CachedLogitCollator(pad_token_id=0)([*rows_of(samples)])).backward()
    found = {name: part.grad for name, part in trainer.model.named_parameters() if part.grad is not None}
    assert largest_difference(found, gradients) < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", lambda ids: ids + 1),  # each position one too far; a rotary embedding would not see it
        ("llama", lambda ids: ids.roll(1, dims=1)),  # each document begins one token late
        ("llama", lambda ids: torch.arange(ids.shape[1]).expand_as(ids)),  # no documents: no mask between them
    ],
)
def test_wrong_positions_or_no_mask_give_other_gradients(
    samples: list[CachedSample], tmp_path: Path, name: str, change: Any
) -> None:
    _, gradients = loss_and_gradients(tmp_path, student(name), [*samples])
    found = loss_and_gradients(tmp_path, student(name), [*rows_of(samples)], position_ids=change)
    assert largest_difference(found[1], gradients) > 1e-2


def test_rows_flattened_for_flash_attention_give_the_same(samples: list[CachedSample], tmp_path: Path) -> None:
    """Flash attention is not run here: what it would be given is."""
    _, gradients = loss_and_gradients(tmp_path, student(), [*samples])
    model = student()
    seen: list[dict[str, Tensor]] = []
    plain = model.forward

    def forward(**inputs: Any) -> Any:
        seen.append(inputs)
        model.config._attn_implementation = "eager"
        return plain(**inputs)

    model.forward = forward
    trainer = make_trainer(tmp_path, model=model)
    trainer._keeps_documents_apart = True
    rows = rows_of(samples)
    model.config._attn_implementation = "flash_attention_2"
    trainer.compute_loss(model, CachedLogitCollator(pad_token_id=0)(rows)).backward()
    assert seen[-1]["input_ids"].shape == seen[-1]["position_ids"].shape == (1, len(rows) * MOST)
    found = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    assert largest_difference(found, gradients) < 1e-5


def trained(path: Path, rows: list[Any], *, batch: int, steps: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    trainer = make_trainer(path, batch=batch, steps=steps, train=rows, model=tiny_llama(seed=1))
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train()
    assert trainer._keeps_documents_apart == isinstance(rows[0], list)
    return trainer.model.state_dict(), [line for line in trainer.state.log_history if "loss" in line]


def test_a_run_ends_with_the_same_weights_where_its_steps_have_the_same_samples(
    samples: list[CachedSample], tmp_path: Path
) -> None:
    steps, size = 5, 6
    used = samples[: steps * size]
    rows = [used[start : start + 3] for start in range(0, len(used), 3)]
    weights, log = trained(tmp_path, used, batch=size, steps=steps)
    packed, packed_log = trained(tmp_path, rows, batch=2, steps=steps)
    for name, weight in weights.items():
        torch.testing.assert_close(packed[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("loss", "kd", "ce", "kl", "teacher_ce", "grad_norm"):
        assert [line[name] for line in packed_log] == pytest.approx([line[name] for line in log], rel=1e-4)
    start = tiny_llama(seed=1).state_dict()
    assert max(float((weights[name] - start[name]).abs().max()) for name in start) > 1e-2
    assert all(0 <= line["data_wait_share"] <= 1 for line in log)


def test_evaluation_takes_one_sample_a_row_beside_packed_training(samples: list[CachedSample], tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, model=tiny_llama(seed=1)).evaluate(samples[:7])
    both = make_trainer(tmp_path, model=tiny_llama(seed=1), train=rows_of(samples), evaluation=samples[:7])  # type: ignore[arg-type]
    assert both.evaluate()["eval_loss"] == plain["eval_loss"]
    assert both.evaluate()["eval_positions"] == sum(len(sample.targets) for sample in samples[:7])


def test_a_student_that_mixes_documents_is_refused_before_its_first_step(
    samples: list[CachedSample], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        "opt",
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model, train=rows_of(samples), batch=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="training.packing: OPTForCausalLM does not keep the samples of a row apart"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_student_without_attention_yet_trains_with_a_word(
    samples: list[CachedSample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: LlamaForCausalLM = tiny_llama(seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, model=model, train=rows_of(samples), batch=2, steps=1).train()  # type: ignore[arg-type]
    assert "could not be shown" in caplog.text
