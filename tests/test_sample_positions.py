"""The positions that a report shows: how far apart teacher and student are, which are chosen, what their text is."""

import math
import re
from pathlib import Path

import pytest
import torch
from made_cache import made_targets
from tiny import make_teacher, make_tokenizer, run_config, story, write_jsonl

from accel_distill.cache import TeacherCache
from accel_distill.codec import Method
from accel_distill.errors import ConfigError
from accel_distill.generate import generate
from accel_distill.sample_positions import bucket_divergence, sample_positions, token_text

HELD_OUT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, its cache, and a student of other random weights."""
    path = tmp_path_factory.mktemp("positions")
    data = write_jsonl(path / "texts.jsonl", [story(n) for n in range(30)])
    generate(run_config(make_teacher(path / "teacher"), data, path / "cache"))
    make_teacher(path / "student", seed=1)
    return path


@pytest.mark.parametrize("method", ["threshold", "top_k", "random"])
def test_the_divergence_is_that_of_the_head_ids_and_one_bucket(method: Method) -> None:
    targets = made_targets(7, method=method, vocab=50, seed=3)
    logprobs = torch.log_softmax(torch.randn(7, 50, generator=torch.Generator().manual_seed(0)), dim=-1)
    offsets, ids, weights = targets.entries()
    expected = []
    for position in range(7):
        start, heads = int(offsets[position]), int(targets.head_count[position])
        p = [float(weight) for weight in weights[start : start + heads]]
        q = [math.exp(float(logprobs[position, token])) for token in ids[start : start + heads]]
        p, q = [*p, max(1 - sum(p), 0.0)], [*q, 1 - sum(q)]
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))
    found = bucket_divergence(targets, logprobs)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


def test_ten_positions_are_spread_over_the_ranks_nearest_first_and_always_the_same(made: Path) -> None:
    cache = TeacherCache(made / "cache")
    chosen = sample_positions(made / "student", cache, eval_samples=HELD_OUT)
    assert len(chosen.positions) == 10 and chosen.of_samples == HELD_OUT
    assert (chosen.positions[0].rank, chosen.positions[-1].rank) == (0, chosen.of_positions - 1)
    divergences = [position.divergence for position in chosen.positions]
    assert divergences == sorted(divergences) and divergences[0] < divergences[-1]
    assert all(position.sample_index < HELD_OUT and position.position >= 8 for position in chosen.positions)
    assert chosen == sample_positions(made / "student", cache, eval_samples=HELD_OUT)
    assert re.fullmatch(r"The teacher's probabilities are whole steps of 1/\d+, .*", chosen.rounding)
    steps = int(re.findall(r"1/(\d+)", chosen.rounding)[0])
    kept = [choice.probability for each in chosen.positions for choice in each.teacher if not choice.is_drawn]
    assert [steps * share for share in kept] == pytest.approx([round(steps * share) for share in kept], abs=1e-5)


def test_a_position_shows_what_cache_and_student_say_there(made: Path) -> None:
    cache = TeacherCache(made / "cache")
    position = sample_positions(made / "student", cache, eval_samples=HELD_OUT, shown=3).positions[1]
    sample = cache[position.sample_index]
    before, true = sample.input_ids[: position.position + 1], int(sample.input_ids[position.position + 1])
    tokenizer = make_tokenizer()
    assert position.context == tokenizer.decode(before.tolist())
    assert position.true == tokenizer.decode([true])
    dense = sample.targets.to_dense(cache.vocab_size)[position.position]
    shown = [(choice.is_drawn, -choice.probability) for choice in position.teacher]
    assert shown == sorted(shown)  # the ids that are kept first
    known = [choice for choice in position.teacher if not choice.is_drawn]
    assert known[0].probability == pytest.approx(float(dense.max()), abs=1 / 32)
    assert sum(choice.probability for choice in position.teacher) <= 1 + 1e-6
    assert len(position.student) == 6 and 0 < position.student_true < 1
    probabilities = [choice.probability for choice in position.student]
    assert probabilities == sorted(probabilities, reverse=True)
    assert [choice.probability for choice in position.student if choice.is_true] in ([], [position.student_true])


def test_the_teacher_as_its_own_student_is_nearer_than_another_model(made: Path) -> None:
    cache = TeacherCache(made / "cache")
    own, other = (sample_positions(made / name, cache, eval_samples=HELD_OUT) for name in ("teacher", "student"))
    middle = [chosen.positions[5].divergence for chosen in (own, other)]
    assert middle[0] < 0.05 < middle[1]


def test_a_student_that_is_not_there_and_a_cache_of_no_held_out_sample_are_one_sentence(made: Path) -> None:
    cache = TeacherCache(made / "cache")
    with pytest.raises(ConfigError, match="the student in .*nowhere cannot be loaded"):
        sample_positions(made / "nowhere", cache, eval_samples=HELD_OUT)
    with pytest.raises(ConfigError, match="no sample with a target was held out"):
        sample_positions(made / "student", cache, eval_samples=0)


def test_a_token_is_what_it_adds_to_the_text_or_its_name() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("the old dog")["input_ids"]
    assert (
        "".join(token_text(tokenizer, ids[:n], ids[n]) for n in range(1, len(ids)))
        == "the old dog"[len(tokenizer.decode(ids[:1])) :]
    )
    half = tokenizer("é")["input_ids"][0]
    assert token_text(tokenizer, ids, half) == tokenizer.convert_ids_to_tokens(half)
    assert token_text(tokenizer, ids, 319) == "id 319"  # of a padded vocabulary
