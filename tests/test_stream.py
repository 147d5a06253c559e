"""The text stream and its walk: the same shards for every number of ranks, and a change of the text is noticed."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from accel_distill.config import DatasetConfig
from accel_distill.deal import Layout
from accel_distill.errors import CacheMismatch, ConfigError
from accel_distill.stream import OpenShard, TextStream, Walk, _identity_of
from accel_distill.text_hash import TextHash, hash_texts

BOTH = pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "not streaming"])
Committed = dict[tuple[int, int], tuple[int, str]]
Shards = dict[tuple[int, int], list[str | None]]


def write(path: Path, rows: Sequence[Any]) -> str:
    """Write JSON lines; a row that is text already is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def open_stream(files: str | list[str], streaming: bool, **changes: Any) -> TextStream:
    values = {"name": "json", "data_files": files, "streaming": streaming, "max_samples": 10**6, "eval_samples": 0}
    return TextStream(DatasetConfig.model_validate(values | changes))


def refusal(files: str | list[str], streaming: bool, **changes: Any) -> str:
    """Return the one sentence with which a dataset is refused, at the opening or while it is read."""
    with pytest.raises(ConfigError) as caught:
        list(open_stream(files, streaming, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@BOTH
def test_texts_come_in_the_order_of_the_file_and_again_from_the_first(streaming: bool, tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(2500)]
    stream = open_stream(write(tmp_path / "a.jsonl", [{"id": n, "text": t} for n, t in enumerate(texts)]), streaming)
    assert list(stream) == texts
    assert list(itertools.islice(stream, 3)) == texts[:3]
    assert stream.length == (None if streaming else 2500)


@BOTH
def test_a_missing_or_null_text_is_none(streaming: bool, tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": None, "id": 2}, {"id": 3}, {"text": "", "id": 4}]
    assert list(open_stream(write(tmp_path / "a.jsonl", rows), streaming)) == ["a", None, None, ""]


@BOTH
def test_a_first_sample_without_text_is_no_error(streaming: bool, tmp_path: Path) -> None:
    assert list(open_stream(write(tmp_path / "a.jsonl", [{"text": None}, {"text": "x"}]), streaming)) == [None, "x"]


@BOTH
def test_an_empty_dataset_is_refused(streaming: bool, tmp_path: Path) -> None:
    assert "empty" in refusal(write(tmp_path / "a.jsonl", []), streaming)


@BOTH
def test_a_column_that_is_not_there_is_named_with_those_that_are(streaming: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"title": "t", "content": "c"}])
    assert refusal(path, streaming) == "dataset.text_column: 'text' is not there; the columns are ['content', 'title']"


@BOTH
def test_a_chat_column_is_refused_with_those_that_hold_text(streaming: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": [{"role": "user", "content": "hi"}], "id": "x", "n": 1}])
    assert refusal(path, streaming) == (
        "dataset.text_column: 'text' holds a list (a chat?) at sample 0, expected text; "
        "the columns with text are ['id']"
    )


@BOTH
@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (["x"], "a list"), ({"a": 1}, "dict")])
def test_a_later_sample_that_is_no_text_is_named(value: object, kind: str, streaming: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a"}] * 3 + [{"text": value}])
    message = refusal(path, streaming)
    assert f"'text' holds {kind}" in message and message.endswith("at sample 3, expected text")


@BOTH
def test_a_split_that_is_not_there_is_named_with_those_that_are(streaming: bool, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", [{"text": "a"}]), streaming, split="validation")
    assert "validation" in message and "'train'" in message


@BOTH
def test_a_file_that_is_not_there_is_named(streaming: bool, tmp_path: Path) -> None:
    assert f"{tmp_path}/no.jsonl" in refusal(f"{tmp_path}/no.jsonl", streaming)


@BOTH
def test_a_directory_that_is_not_there_is_named(streaming: bool, tmp_path: Path) -> None:
    message = refusal("unused", streaming, name=f"{tmp_path}/nowhere", data_files=None)
    assert message.startswith(f"dataset.name: {tmp_path}/nowhere cannot be opened")


@BOTH
def test_a_file_that_is_no_json_is_refused(streaming: bool, tmp_path: Path) -> None:
    assert "JSON parse error" in refusal(write(tmp_path / "a.jsonl", ["hello world"]), streaming)


@BOTH
def test_a_second_file_with_other_columns_is_refused_with_both(streaming: bool, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", [{"text": "a"}] * 5), write(tmp_path / "b.jsonl", [{"body": "b"}])]
    message = refusal(files, streaming)
    assert "text" in message and "body" in message
    assert "sample 5" in message or not streaming


@BOTH
def test_shuffling_permutes_the_files_by_the_seed_and_keeps_the_order_in_each(streaming: bool, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", [{"text": f"{n}{letter}"} for letter in "abc"]) for n in range(6)]
    plain = list(open_stream(files, streaming))
    orders = [list(open_stream(files, streaming, shuffle_files=seed)) for seed in (0, 0, 1)]
    assert plain == [f"{n}{letter}" for n in range(6) for letter in "abc"]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in (plain, orders[0], orders[2])}) == 3
    for order in orders:
        assert sorted(order) == sorted(plain)
        assert [text[1] for text in order] == list("abc") * 6
        assert all(len({text[0] for text in order[at : at + 3]}) == 1 for at in range(0, 18, 3))


def test_shuffled_files_come_in_one_order_whether_streaming_or_not(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", [{"text": str(n)}]) for n in range(6)]
    orders = [list(open_stream(files, streaming, shuffle_files=7)) for streaming in (True, False)]
    assert orders[0] == orders[1] != [str(n) for n in range(6)]


def test_part_of_a_split_is_read_and_identified_by_the_files_of_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(10)])
    stream = open_stream(path, False, split="train[2:5]")
    assert list(stream) == ["2", "3", "4"]
    assert stream.source == open_stream(path, False).source
    assert "whole" in refusal(path, False, split="train[2:5]", shuffle_files=1)


def test_the_source_is_name_size_and_content_of_the_files_and_not_their_place(tmp_path: Path) -> None:
    rows = [{"text": "abc"}]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = open_stream(write(tmp_path / "one" / "a.jsonl", rows), True).source
    moved = open_stream(write(tmp_path / "two" / "a.jsonl", rows), True).source
    other = open_stream(write(tmp_path / "two" / "a.jsonl", [{"text": "abd"}]), True).source
    assert first["files"][0][:2] == ["a.jsonl", 16]
    assert first == moved != other


def test_a_hash_of_texts_knows_where_each_ends_and_takes_none_for_empty() -> None:
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    assert hash_texts([None, "a"]) == hash_texts(["", "a"]) != hash_texts(["a"])
    assert hash_texts([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    assert hash_texts(["\ud800"]) != hash_texts(["?"])  # a lone surrogate, which UTF-8 has no bytes for
    first_two = TextHash(2)
    for text in ["ab", "c", "d"]:
        first_two.add(text)
    assert first_two.hexdigest() == hash_texts(["ab", "c"])


# ---- the walk


LAYOUT = Layout(lanes=3, samples_per_shard=2)  # groups of 6


def texts_of(count: int) -> list[str | None]:
    return [None if n % 7 == 3 else f"text {n}" for n in range(count)]


def walk_all(
    texts: Sequence[str | None],
    *,
    world_size: int = 1,
    max_samples: int | None = None,
    committed: Committed | None = None,
    layout: Layout = LAYOUT,
) -> tuple[Shards, list[Walk]]:
    """Walk on every rank; return all shards and the walks. No shard may be made twice."""
    made: Shards = {}
    walks = []
    for rank in range(world_size):
        walk = Walk(
            iter(texts),
            layout=layout,
            max_samples=max_samples,
            committed=committed or {},
            rank=rank,
            world_size=world_size,
        )
        for shard in walk:
            assert (shard.group, shard.lane) not in made
            made[shard.group, shard.lane] = shard.texts
        walks.append(walk)
    return made, walks


def expected(texts: Sequence[str | None], layout: Layout = LAYOUT) -> Shards:
    found: Shards = {}
    for group, lane, samples in layout.shards(len(texts)):
        first = layout.first_sample(group, lane)
        found[group, lane] = list(texts[first : first + samples * layout.lanes : layout.lanes])
    return found


def commit(shards: Shards) -> Committed:
    return {place: (len(texts), hash_texts(texts)) for place, texts in shards.items()}


def test_a_walk_of_seven_samples_makes_these_shards() -> None:
    made, (walk,) = walk_all(list("abcdefg"))
    assert made == {(0, 0): ["a", "d"], (0, 1): ["b", "e"], (0, 2): ["c", "f"], (1, 0): ["g"]}
    assert (walk.total, walk.stream_end) == (7, "exhausted")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 12, 13, 20])
def test_every_world_size_makes_the_same_shards(world_size: int, count: int) -> None:
    made, walks = walk_all(texts_of(count), world_size=world_size)
    assert made == expected(texts_of(count))
    assert [(walk.total, walk.stream_end) for walk in walks] == [(count, "exhausted")] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("cap", [1, 5, 6, 7, 12, 13])
def test_the_cap_is_on_the_index_in_the_stream_and_nothing_beyond_it_is_read(world_size: int, cap: int) -> None:
    for rank in range(world_size):
        texts = iter(texts_of(100))
        walk = Walk(texts, layout=LAYOUT, max_samples=cap, committed={}, rank=rank, world_size=world_size)
        for _ in walk:
            pass
        assert (walk.total, walk.stream_end) == (cap, "cap")
        assert len(list(texts)) == 100 - cap
    assert walk_all(texts_of(100), world_size=world_size, max_samples=cap)[0] == expected(texts_of(cap))


def test_a_stream_that_ends_just_at_the_cap_ended_at_the_cap() -> None:
    for count in (5, 6, 12):
        _, (walk,) = walk_all(texts_of(count), max_samples=count)
        assert (walk.total, walk.stream_end) == (count, "cap")


def test_a_stream_that_ends_before_the_cap_is_exhausted_also_at_the_end_of_a_group() -> None:
    for count in (5, 6, 12):
        made, (walk,) = walk_all(texts_of(count), max_samples=13)
        assert (walk.total, walk.stream_end) == (count, "exhausted")
        assert made == expected(texts_of(count))


def test_a_shard_comes_as_soon_as_its_last_sample_is_read() -> None:
    read: list[int] = []

    def texts() -> Iterator[str]:
        for n in range(30):
            read.append(n)
            yield str(n)

    walk = Walk(texts(), layout=LAYOUT, max_samples=None, committed={}, rank=0, world_size=1)
    at = [(shard.group, shard.lane, len(read)) for shard in walk]
    assert at[:4] == [(0, 0, 6), (0, 1, 6), (0, 2, 6), (1, 0, 12)]


def test_an_error_of_the_stream_is_never_an_end() -> None:
    def texts() -> Iterator[str]:
        yield from "abcdefgh"
        raise ConfigError("the network is gone")

    made: list[OpenShard] = []
    walk = Walk(texts(), layout=LAYOUT, max_samples=None, committed={}, rank=0, world_size=1)
    with pytest.raises(ConfigError, match="the network is gone"):
        for shard in walk:
            made.append(shard)
    assert walk.stream_end is None
    assert [(shard.group, shard.lane, len(shard.texts)) for shard in made] == [(0, 0, 2), (0, 1, 2), (0, 2, 2)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_after_any_crash_the_rest_is_made_by_any_number_of_ranks(world_size: int) -> None:
    texts, choice = texts_of(20), random.Random(world_size)
    whole = expected(texts)
    for _ in range(40):
        there = {place: shard for place, shard in whole.items() if choice.random() < 0.5}
        made, walks = walk_all(texts, world_size=world_size, committed=commit(there))
        assert {**there, **made} == whole
        assert not set(there) & set(made)
        assert {walk.total for walk in walks} == {20}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_larger_cap_makes_the_short_shards_again(world_size: int) -> None:
    texts = texts_of(40)
    for before, after in itertools.combinations([1, 4, 6, 7, 11, 12, 20], 2):
        there = expected(texts[:before])
        made, _ = walk_all(texts, world_size=world_size, max_samples=after, committed=commit(there))
        whole = expected(texts[:after])
        assert {**there, **made} == whole
        assert {place for place in made if place in there} == {
            place for place, shard in there.items() if len(shard) < len(whole[place])
        }


@pytest.mark.parametrize("changed", range(20))
def test_a_changed_text_is_refused_with_the_range_that_holds_it(changed: int) -> None:
    texts = texts_of(20)
    there = commit(expected(texts))
    texts[changed] = "another text"
    with pytest.raises(CacheMismatch, match="the stream changed") as caught:
        walk_all(texts, committed=there)
    group, lane, _ = LAYOUT.place(changed)
    first = LAYOUT.first_sample(group, lane)
    last = min(first + LAYOUT.lanes, LAYOUT.first_sample(3, lane) if group == 3 else 10**9)
    assert f"samples {first} to {last} (lane {lane}, every 3)" in str(caught.value)


def test_an_inserted_sample_is_refused() -> None:
    texts = texts_of(20)
    there = commit(expected(texts))
    with pytest.raises(CacheMismatch, match=r"the stream changed: samples 6 to 9 \(lane 0, every 3\)"):
        walk_all([*texts[:7], "new", *texts[7:]], committed=there)


def test_every_rank_checks_the_texts_of_shards_that_others_made() -> None:
    texts = texts_of(20)
    there = commit({place: shard for place, shard in expected(texts).items() if place != (2, 1)})
    texts[0] = "another text"
    for rank in range(4):
        with pytest.raises(CacheMismatch, match="samples 0 to 3"):
            list(Walk(iter(texts), layout=LAYOUT, max_samples=None, committed=there, rank=rank, world_size=4))


@pytest.mark.parametrize("count", range(1, 20))
def test_a_stream_that_became_shorter_is_refused(count: int) -> None:
    there = commit(expected(texts_of(20)))
    with pytest.raises(CacheMismatch, match="the stream changed"):
        walk_all(texts_of(count), committed=there)
    with pytest.raises(CacheMismatch, match="the stream changed"):  # only the last shard is there
        walk_all(texts_of(count), committed={(3, 1): there[3, 1]})


def test_a_stream_that_became_longer_gives_what_is_missing() -> None:
    there = expected(texts_of(20))
    made, _ = walk_all(texts_of(25), world_size=2, committed=commit(there))
    assert {**there, **made} == expected(texts_of(25))
    assert made[3, 0] == [texts_of(25)[18], texts_of(25)[21]]  # it was short before


def test_the_identity_of_a_hub_dataset_names_its_files_and_their_order() -> None:
    commit = "0123456789" * 4
    first, second = (f"hf://datasets/org/name@{commit}/data/{n}.parquet" for n in (1, 2))
    identities = [_identity_of(files, fallback=None) for files in ([first], [second], [first, second], [second, first])]
    assert all(identity["commit"] == commit for identity in identities)
    assert len({identity["files_sha256"] for identity in identities}) == 4
    assert _identity_of([first], fallback=None) == identities[0]


def test_a_glob_that_matches_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset.data_files: there is no file .*/none-\*.jsonl"):
        TextStream(DatasetConfig(name="json", data_files=[str(tmp_path / "none-*.jsonl")]))
