"""The teacher: its targets are its own distributions, at the right positions, whatever the batch; and its memory."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accel_distill.codec import total_weight
from accel_distill.config import TeacherConfig
from accel_distill.errors import ConfigError, RunError
from accel_distill.teacher import Sampling, Teacher, load_teacher, load_teacher_config
from accel_distill.tokens import TokenSequence

VOCAB = 97
EXACT = Sampling("top_k", VOCAB, 1.0, 0)  # every probability, to a step of 1/2048 nat
THRESHOLD = Sampling("threshold", 0.05, 1.0, 0)


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.5, **sizes)).eval()


def make_teacher(**settings: int) -> Teacher:
    return Teacher(make_model(), **{"head_chunk": 7, "valid_ids": VOCAB, **settings})


def rows(*lengths: int) -> list[TokenSequence]:
    rng = np.random.default_rng(0)
    return [TokenSequence(10 * i, 0, rng.integers(0, VOCAB, length)) for i, length in enumerate(lengths)]


def own_probabilities(model: LlamaForCausalLM, row: TokenSequence) -> torch.Tensor:
    """The model's distribution of the next token at each position of one row that has one, float64."""
    with torch.no_grad():
        return model(torch.from_numpy(row.ids)[None]).logits[0, :-1].double().softmax(-1)


def test_targets_are_the_teachers_distribution_of_the_next_token_at_each_position():
    teacher, batch = make_teacher(), rows(5, 12, 2)
    output = teacher.targets_for(batch, sampling=EXACT)
    expected = torch.cat([own_probabilities(teacher.model, row) for row in batch])
    assert len(output.targets) == 4 + 11 + 1
    dense = output.targets.to_dense(VOCAB).double()
    assert float((dense - expected).abs().max()) < 3e-4
    # the test that a shift by one breaks: a neighbour's distribution is far off
    assert float((dense[1:] - expected[:-1]).abs().max()) > 0.1
    entropy = -(expected * expected.log()).sum(-1)
    np.testing.assert_allclose(output.entropy, entropy.numpy(), atol=1e-4)
    next_ids = np.concatenate([row.ids[1:] for row in batch])
    logprob = expected.log()[torch.arange(16), torch.from_numpy(next_ids)]
    np.testing.assert_allclose(output.logprob, logprob.numpy(), atol=1e-4)


def test_threshold_targets_hold_head_weights_to_one_part_in_m_and_sum_to_one():
    teacher, batch = make_teacher(), rows(40, 33)
    targets = teacher.targets_for(batch, sampling=THRESHOLD).targets
    expected = torch.cat([own_probabilities(teacher.model, row) for row in batch])
    dense = targets.to_dense(VOCAB).double()
    heads = torch.arange(len(targets)).repeat_interleave(targets.head_count), targets.head_ids
    assert float((dense[heads] - expected[heads]).abs().max()) <= 1 / total_weight(0.05) + 1e-6
    assert torch.equal((expected >= 0.05).sum(-1).clamp(min=1), targets.head_count)
    assert float((dense.sum(-1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("head_chunk", [1, 3, 1000])
def test_targets_do_not_depend_on_the_chunk_of_the_head(head_chunk):
    batch = rows(9, 4)
    expected = make_teacher().targets_for(batch, sampling=THRESHOLD).targets
    found = make_teacher(head_chunk=head_chunk).targets_for(batch, sampling=THRESHOLD).targets
    assert torch.equal(found.head_ids, expected.head_ids) and torch.equal(found.tail_ids, expected.tail_ids)


def test_targets_do_not_depend_on_the_batch_a_row_is_in():
    teacher, batch = make_teacher(), rows(9, 14, 4)
    together = teacher.targets_for(batch, sampling=THRESHOLD).targets
    alone = teacher.targets_for([batch[1]], sampling=THRESHOLD).targets
    assert torch.allclose(together.position_slice(8, 21).to_dense(VOCAB), alone.to_dense(VOCAB))


def test_a_piece_of_a_document_is_sampled_by_its_place_in_the_document():
    teacher, ids = make_teacher(), rows(9)[0].ids
    first = teacher.targets_for([TokenSequence(0, 0, ids)], sampling=THRESHOLD).targets
    later = teacher.targets_for([TokenSequence(0, 8, ids)], sampling=THRESHOLD).targets
    assert torch.equal(first.head_ids, later.head_ids)
    assert not torch.equal(first.tail_ids, later.tail_ids)


def test_logits_beyond_the_tokenizers_ids_do_not_exist():
    teacher, row = make_teacher(valid_ids=60), TokenSequence(0, 0, rows(30)[0].ids % 60)
    targets = teacher.targets_for([row], sampling=EXACT).targets
    assert int(targets.head_ids.max()) == 59
    assert float((targets.to_dense(60).sum(-1) - 1).abs().max()) < 3e-4


def test_a_temperature_divides_the_teachers_logits_but_not_the_true_tokens_log_probability():
    teacher, batch = make_teacher(), rows(12)
    warm = teacher.targets_for(batch, sampling=Sampling("top_k", VOCAB, 2.0, 0))
    plain = own_probabilities(teacher.model, batch[0])
    expected = (plain.log() / 2).softmax(-1)
    assert float((warm.targets.to_dense(VOCAB).double() - expected).abs().max()) < 3e-4
    np.testing.assert_allclose(warm.entropy, -(expected * expected.log()).sum(-1).numpy(), atol=1e-4)
    np.testing.assert_allclose(warm.logprob, teacher.targets_for(batch, sampling=EXACT).logprob, atol=1e-5)


def test_a_model_whose_head_cannot_be_taken_off_gives_the_same_targets_with_one_warning(caplog):
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = make_model()
    model.__class__ = Doubled
    with caplog.at_level(logging.WARNING):
        teacher = Teacher(model, head_chunk=7, valid_ids=VOCAB)
        output = teacher.targets_for(rows(12, 5), sampling=EXACT)
    assert len(caplog.records) == 1 and "the logits of a whole batch will exist at once" in caplog.text
    expected = torch.cat([own_probabilities(model, row) for row in rows(12, 5)])
    assert float((output.targets.to_dense(VOCAB).double() - expected).abs().max()) < 3e-4


def test_a_logit_that_is_not_finite_stops_the_run_naming_sample_and_position():
    teacher = make_teacher(head_chunk=100)

    def spoil(module, inputs, output):
        output.last_hidden_state[1, 4] = float("nan")
        return output

    teacher.model.base_model.register_forward_hook(spoil)
    with pytest.raises(RunError, match="not finite at position 4 of sample 10 "):
        teacher.targets_for(rows(6, 9), sampling=THRESHOLD)


def test_progress_is_reported_for_every_position_once():
    heard: list[int] = []
    make_teacher().targets_for(rows(9, 14), sampling=THRESHOLD, report=heard.append)
    assert sum(heard) == 8 + 13 and max(heard) <= 7


@pytest.mark.parametrize("vocab", [151_936, 262_208])
def test_targets_of_large_vocabularies_keep_ids_beyond_16_and_17_bits(vocab):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = Teacher(LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes)), head_chunk=16, valid_ids=vocab)
    ids = np.array([0, 65_536, 131_072, vocab - 1] * 5)
    for sampling in (THRESHOLD, Sampling("random", 50, 1.0, 0), Sampling("top_k", 64, 1.0, 0)):
        found = teacher.targets_for([TokenSequence(0, 0, ids)], sampling=sampling).targets.entries()[1]
        assert int(found.max()) > 131_072 and len(found) > 19


@pytest.mark.parametrize(("method", "parameter"), [("threshold", "0.03"), ("top_k", "64")])
def test_peak_memory_is_at_most_three_chunks_of_logits(method, parameter):
    script = Path(__file__).with_name("memory_run.py")
    command = [sys.executable, str(script), "151936", "64", "128", method, parameter]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 128 * 151_936 * 4 < int(output) <= 3 * 128 * 151_936 * 4


def test_a_teacher_that_is_not_there_is_one_sentence():
    with pytest.raises(ConfigError, match="teacher.model: /nowhere/model is not a directory"):
        load_teacher_config(TeacherConfig(model="/nowhere/model"))
    with pytest.raises(ConfigError, match="teacher.model: no-such-org/no-such-model cannot be loaded"):
        load_teacher_config(TeacherConfig(model="no-such-org/no-such-model"))


def test_a_teacher_is_loaded_in_the_dtype_that_is_asked_for(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = TeacherConfig(model=str(tmp_path), dtype="bfloat16")
    teacher = load_teacher(config, device=torch.device("cpu"), valid_ids=VOCAB)
    assert teacher.model.dtype == torch.bfloat16
    output = teacher.targets_for(rows(9, 5), sampling=THRESHOLD)
    assert len(output.targets) == 12 and np.isfinite(output.entropy).all()


@pytest.mark.gpu
def test_targets_on_a_gpu_are_those_of_the_cpu():
    batch = rows(40, 33, 2)
    expected = make_teacher().targets_for(batch, sampling=EXACT).targets.to_dense(VOCAB)
    teacher = Teacher(make_model().cuda(), head_chunk=7, valid_ids=VOCAB)
    found = teacher.targets_for(batch, sampling=EXACT).targets
    assert found.head_ids.device.type == "cpu"
    assert float((found.to_dense(VOCAB) - expected).abs().max()) < 1e-3
    for sampling in (THRESHOLD, Sampling("random", 50, 1.0, 0)):
        assert (
            float((teacher.targets_for(batch, sampling=sampling).targets.to_dense(VOCAB).sum(-1) - 1).abs().max())
            < 1e-5
        )


def test_a_damaged_weight_file_is_one_sentence(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="teacher.model: .* cannot be loaded"):
        load_teacher(TeacherConfig(model=str(tmp_path)), device=torch.device("cpu"), valid_ids=VOCAB)


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_random_ones(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ConfigError, match="lacks 9 of its weights, which would be random: model.layers.2"):
        load_teacher(TeacherConfig(model=str(tmp_path)), device=torch.device("cpu"), valid_ids=VOCAB)
