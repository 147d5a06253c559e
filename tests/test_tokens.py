"""How a text becomes the token sequences of a cache, and how two tokenizers are told apart."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tiny import make_tokenizer, story
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.tokens import (
    SequenceRule,
    check_same_tokenizer,
    load_tokenizer,
    tokenizer_identity,
    tokenizer_size,
)

BOS, EOS = 0, 1
LONG = " ".join(story(n) for n in range(12))


def tokenizer(template: str = "$A") -> PreTrainedTokenizerFast:
    """The tiny tokenizer, putting around a text what the template says."""
    made = make_tokenizer()
    special = [("<s>", BOS), ("</s>", EOS)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return made


def rule(max_length: int = 1000, **changes: Any) -> SequenceRule:
    values = {"long_documents": "truncate", "add_special_tokens": True, "append_eos": True}
    return SequenceRule(max_length, **{**values, **changes})


def ids_of(text: str | None, template: str = "$A", **changes: Any) -> list[list[int]]:
    rows, _ = rule(**changes).sequences([text], [5], tokenizer=tokenizer(template))
    assert all(row.ids.dtype == np.int64 and row.sample_index == 5 for row in rows)
    return [row.ids.tolist() for row in rows]


def plain(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_the_end_of_a_text_is_marked_once() -> None:
    body = plain("the old dog ran")
    assert len(body) > 2 and EOS not in body
    assert ids_of("the old dog ran") == [[*body, EOS]]
    assert ids_of("the old dog ran", "<s> $A") == [[BOS, *body, EOS]]
    assert ids_of("the old dog ran", "<s> $A </s>") == [[BOS, *body, EOS]]  # the tokenizer does it by itself


def test_without_append_eos_the_text_is_as_the_tokenizer_makes_it() -> None:
    body = plain("the old dog ran")
    assert ids_of("the old dog ran", append_eos=False) == [body]
    assert ids_of("the old dog ran", "<s> $A </s>", append_eos=False) == [[BOS, *body, EOS]]


def test_special_tokens_can_be_left_out() -> None:
    body = plain("the old dog ran")
    assert ids_of("the old dog ran", "<s> $A", add_special_tokens=False) == [[*body, EOS]]
    assert ids_of("the old dog ran", "<s> $A", add_special_tokens=False, append_eos=False) == [body]


def test_a_tokenizer_without_end_of_text_marks_none() -> None:
    bare = tokenizer()
    bare.eos_token = None
    rows, _ = rule().sequences(["the dog"], [0], tokenizer=bare)
    assert rows[0].ids.tolist() == plain("the dog")


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["", None])
def test_a_sample_without_text_is_a_sequence_without_tokens(text: str | None, template: str) -> None:
    assert ids_of(text, template) == [[]]
    assert ids_of(text, template, long_documents="split") == [[]]


def test_a_text_is_cut_at_max_length_and_then_has_no_end() -> None:
    whole = [*plain(LONG), EOS]
    texts, cuts = ["the dog", LONG, "", LONG], []
    for max_length in (2, 10, len(whole) - 1, len(whole), len(whole) + 1):
        rows, cut = rule(max_length).sequences(texts, range(4), tokenizer=tokenizer())
        assert [row.sample_index for row in rows] == [0, 1, 2, 3]
        assert rows[1].ids.tolist() == rows[3].ids.tolist() == whole[:max_length]
        assert (EOS in rows[1].ids) == (max_length >= len(whole))
        cuts.append(cut)
    assert cuts == [3, 2, 2, 0, 0]  # "the dog" and its end are three tokens or more: cut at 2


@pytest.mark.parametrize("max_length", [2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_split_pieces_cover_every_next_token_exactly_once(template: str, max_length: int) -> None:
    whole = ids_of(LONG, template)[0]
    rows, cut = rule(max_length, long_documents="split").sequences([LONG], [3], tokenizer=tokenizer(template))
    covered = []
    for row in rows:
        assert 2 <= len(row.ids) <= max_length and row.sample_index == 3
        assert row.ids.tolist() == whole[row.start : row.start + len(row.ids)]
        covered += list(range(row.start + 1, row.start + len(row.ids)))
    assert covered == list(range(1, len(whole)))
    assert cut == 0 and whole[-1] == EOS == rows[-1].ids[-1]
    assert (len(rows) == 1) == (max_length == 10_000)


def test_split_pieces_overlap_by_one_token_and_a_short_text_stays_whole() -> None:
    rows, _ = rule(4, long_documents="split").sequences(["aaaa", "b"], [0, 1], tokenizer=_Letters())
    assert [(row.sample_index, row.start, row.ids.tolist()) for row in rows] == [
        (0, 0, [97, 97, 97, 97]),
        (0, 3, [97, 9]),
        (1, 0, [98, 9]),
    ]
    rows, _ = rule(4, long_documents="split").sequences(["aaa", "aaaaaa"], [0, 1], tokenizer=_Letters())
    assert [(row.sample_index, row.start, len(row.ids)) for row in rows] == [(0, 0, 4), (1, 0, 4), (1, 3, 4)]


class _Letters:
    """A tokenizer with one id for each character, and 9 for the end."""

    eos_token_id = 9

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_no_texts_are_no_sequences() -> None:
    assert rule().sequences([], [], tokenizer=tokenizer()) == ([], 0)


def test_a_tokenizer_saved_with_truncation_and_padding_still_gives_the_whole_text(tmp_path: Path) -> None:
    odd = tokenizer()
    odd.backend_tokenizer.enable_truncation(3)
    odd.backend_tokenizer.enable_padding(length=10)
    odd.model_max_length = 5
    odd.save_pretrained(tmp_path)
    rows, cut = rule().sequences([LONG, "the"], [0, 1], tokenizer=load_tokenizer(tmp_path))
    assert [row.ids.tolist() for row in rows] == [[*plain(LONG), EOS], [*plain("the"), EOS]]
    assert cut == 0


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no tokenizer can be loaded from {tmp_path}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_size_is_the_largest_id_and_one() -> None:
    made = tokenizer()
    assert tokenizer_size(made) == 300
    made.add_tokens(["<new>"])
    assert tokenizer_size(made) == 301


def test_a_saved_and_loaded_tokenizer_is_the_same(tmp_path: Path) -> None:
    made = tokenizer("<s> $A")
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_tokenizer(made, loaded, name="student")
    assert tokenizer_identity(made) == tokenizer_identity(loaded)


def test_a_student_may_know_more_ids_than_the_cache() -> None:
    more = tokenizer()
    more.add_tokens(["<new>"])
    check_same_tokenizer(tokenizer(), more, name="student")
    with pytest.raises(CacheMismatch, match="student: .* id 300 is None, in the cache '<new>'"):
        check_same_tokenizer(more, tokenizer(), name="student")


def test_the_first_other_id_is_named() -> None:
    from tokenizers import Tokenizer

    changed = tokenizer().backend_tokenizer.to_str()
    assert changed.count('"</s>"') > 1
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(changed.replace('"</s>"', '"<end>"')))
    with pytest.raises(CacheMismatch, match="id 1 is '<end>', in the cache '</s>'"):
        check_same_tokenizer(tokenizer(), other, name="student")
    assert tokenizer_identity(tokenizer())["vocab_sha256"] != tokenizer_identity(other)["vocab_sha256"]


def test_the_same_ids_with_another_rule_are_told_by_a_text() -> None:
    with pytest.raises(CacheMismatch, match="'The quick brown fox jumps over 13 lazy dogs.' becomes"):
        check_same_tokenizer(tokenizer(), tokenizer("<s> $A"), name="student")
    ours, theirs = tokenizer_identity(tokenizer()), tokenizer_identity(tokenizer("<s> $A"))
    assert ours["vocab_sha256"] == theirs["vocab_sha256"]
    assert ours["canaries_sha256"] != theirs["canaries_sha256"]


@pytest.mark.parametrize("long_documents", ["truncate", "split"])
def test_a_real_tokenizer_that_begins_texts_gives_beginning_text_and_end(
    long_documents: Literal["truncate", "split"], shared_data: Path
) -> None:
    real = load_tokenizer(shared_data / "models" / "stories260K")
    text = "Once upon a time, there was a little girl named Lily."
    rows, cut = rule(512, long_documents=long_documents).sequences([text, ""], [0, 1], tokenizer=real)
    assert rows[0].ids.tolist() == [real.bos_token_id, *real(text, add_special_tokens=False)["input_ids"], 2]
    assert real.decode(rows[0].ids[1:-1]) == text
    assert (len(rows[1].ids), cut, tokenizer_size(real)) == (0, 0, 512)


def test_a_tokenizer_file_that_cannot_be_parsed_is_one_sentence(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_the_same_ids_but_other_merges_is_another_one() -> None:
    mine, other = make_tokenizer(), make_tokenizer()
    content = json.loads(other.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )
    assert other.get_vocab() == mine.get_vocab()
    assert tokenizer_identity(other) != tokenizer_identity(mine)
    with pytest.raises(CacheMismatch, match="the same ids, but another merges"):
        check_same_tokenizer(mine, other, name="student")
