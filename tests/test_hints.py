"""Hints: a run that goes on jumps to them, and never believes one."""

import json
import logging
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny import make_teacher, run_config, shard_files, story, write_jsonl

from accel_distill import generate as command
from accel_distill import hints as module
from accel_distill.config import DatasetConfig, RunConfig
from accel_distill.deal import Layout
from accel_distill.generate import generate
from accel_distill.hints import NAME, Hint, HintWriter, read_hints, start_late
from accel_distill.manifest import make_directories
from accel_distill.reading import Mark, Reading
from accel_distill.stream import TextStream, is_pinned
from accel_distill.text_hash import hash_texts

LAYOUT = Layout(lanes=4, samples_per_shard=25)
GROUP = 100
TEXTS = [f"text {n}" for n in range(3000)]
Committed = dict[tuple[int, int], tuple[int, str]]


@pytest.fixture(autouse=True)
def every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint at each group."""
    monkeypatch.setattr(module, "EVERY", 0.0)


def write_data(place: Path, kind: str) -> dict[str, Any]:
    """Write the texts in two files; return what a dataset section says of them."""
    if kind == "parquet":
        import datasets

        for n in range(2):
            part = TEXTS[n * 1500 : (n + 1) * 1500]
            datasets.Dataset.from_dict({"text": part}).to_parquet(place / f"{n}.parquet", batch_size=100)
        return {"name": "parquet", "data_files": [str(place / f"{n}.parquet") for n in range(2)]}
    files = [write_jsonl(place / f"{n}.jsonl", TEXTS[n * 1500 : (n + 1) * 1500]) for n in range(2)]
    return {"name": "json", "data_files": [str(file) for file in files]}


def open_stream(section: dict[str, Any], *, streaming: bool = True) -> TextStream:
    values = {"max_samples": 3000, "eval_samples": 0, "streaming": streaming}
    return TextStream(DatasetConfig.model_validate(section | values))


def committed(groups: int) -> Committed:
    """Return what a cache says of its shards that has so many groups."""
    places = [(group, lane) for group in range(groups) for lane in range(4)]
    return {(g, lane): (25, hash_texts(TEXTS[g * GROUP + lane : (g + 1) * GROUP : 4])) for g, lane in places}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache's directory."""
    make_directories(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_stream_begins_at_the_last_hint_whose_group_is_there(
    kind: str, streaming: bool, cache: Path, tmp_path: Path
) -> None:
    section = write_data(tmp_path, kind)
    passed = HintWriter(open_stream(section, streaming=streaming).read(), cache, group_samples=GROUP)
    assert list(passed) == TEXTS
    hints = read_hints(cache)
    assert [hint.at for hint in hints] == list(range(GROUP, 3001, GROUP))
    for groups, expected in [(0, 0), (1, 0), (2, 100), (15, 1400), (16, 1500), (30, 2900)]:
        stream = open_stream(section, streaming=streaming)
        reading = start_late(cache, committed(groups), layout=LAYOUT, read=stream.read)
        assert reading.index == expected
        assert list(islice(reading, 150)) == TEXTS[expected : expected + 150]


def written(cache: Path, *hints: Hint) -> None:
    (cache / NAME).write_text(json.dumps([hint.__dict__ for hint in hints]))


def reading_at(texts: list[str]) -> Callable[[Mark], Reading]:
    """Return how to read a list whose state is the index."""
    return lambda mark: Reading(
        lambda at: iter(texts[at.at if not at.at else at.state :]),
        state=lambda: None,
        name="x",
        start=mark,
        tell=print,
    )


WRONG: dict[str, Any] = {
    "another place": Hint(200, 300),
    "a place that is no group's": Hint(150, 150),
    "the state of one, the place of another": Hint(300, 200),
    "beyond the end": Hint(200, 2999),
    "no state": Hint(200, {"a": [1, 2]}),
    "a group that is not there": Hint(1000, 1000),
    "negative": Hint(-100, -100),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_hint_that_is_not_confirmed_is_passed_over_for_an_older_one(kind: str, cache: Path) -> None:
    written(cache, Hint(100, 100), WRONG[kind])
    reading = start_late(cache, committed(10), layout=LAYOUT, read=reading_at(TEXTS))
    assert reading.index == 100
    assert list(reading) == TEXTS[100:]
    written(cache, WRONG[kind])
    assert list(start_late(cache, committed(10), layout=LAYOUT, read=reading_at(TEXTS))) == TEXTS


@pytest.mark.parametrize("changed", [400, 433, 499])
def test_a_hint_before_a_text_that_changed_is_not_used(changed: int, cache: Path) -> None:
    written(cache, Hint(200, 200), Hint(400, 400))
    texts = [*TEXTS[:changed], "changed", *TEXTS[changed + 1 :]]
    assert start_late(cache, committed(5), layout=LAYOUT, read=reading_at(texts)).index == 200


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '[{"at": 100}]', '{"at": 100}', '[{"at": "x", "state": 0}]', "null"]
)
def test_a_file_of_hints_that_is_no_such_file_is_as_none(content: str, cache: Path) -> None:
    (cache / NAME).write_text(content)
    assert read_hints(cache) == []
    assert start_late(cache, committed(10), layout=LAYOUT, read=reading_at(TEXTS)).index == 0


@pytest.mark.parametrize("thing", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_hints_that_are_no_regular_file_are_as_none_and_not_waited_for(
    thing: Callable[[Path], object], cache: Path
) -> None:
    thing(cache / NAME)
    assert read_hints(cache) == []
    assert start_late(cache, committed(10), layout=LAYOUT, read=reading_at(TEXTS)).index == 0


def test_of_many_hints_the_older_ones_thin_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 8)
    passed = HintWriter(reading_at(TEXTS)(Mark(0)), cache, group_samples=10)
    assert list(passed) == TEXTS
    found = [hint.at for hint in read_hints(cache)]
    assert len(found) <= 8
    assert found[-4:] == [2970, 2980, 2990, 3000]
    assert found[0] < 2900


def test_only_content_that_the_identity_pins_is_passed_over() -> None:
    assert is_pinned({"files": [["a.jsonl", 3, "ab" * 32]]})
    assert is_pinned({"commit": "ab" * 20, "files": 3, "files_sha256": "cd" * 32})
    assert not is_pinned({"fingerprint": "x", "files": ["https://host/a.jsonl"]})
    assert not is_pinned({"fingerprint": "x", "files": 7})


# ---- in generate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, data and a complete cache."""
    path = tmp_path_factory.mktemp("hints")
    make_teacher(path / "teacher")
    write_jsonl(path / "data.jsonl", [story(n) for n in range(120)])
    generate(small(path, path / "cache"))
    return path


def small(place: Path, cache: Path) -> RunConfig:
    dataset = {"max_samples": 100, "max_length": 8}
    return run_config(place / "teacher", place / "data.jsonl", cache, dataset=dataset)


class Read:
    """Counts the texts that a run reads after the opening."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts = 0
        read, count = TextStream.read, self

        def counted(self: TextStream, *arguments: Any, **named: Any) -> Reading:
            reading = read(self, *arguments, **named)
            note = reading._note

            def noted(text: Any) -> None:
                count.texts += 1
                note(text)

            reading._note = noted  # type: ignore[method-assign]
            return reading

        monkeypatch.setattr(TextStream, "read", counted)


def stopped_late(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Make all but the last group; return the run."""
    config = small(place, cache)
    generate(config)
    (cache / "manifest.json").unlink()
    for shard in sorted((cache / "shards").iterdir())[-2:]:
        shard.unlink()
    return config


def test_a_run_that_goes_on_reads_from_the_last_hint_and_makes_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped_late(place, tmp_path / "cache", monkeypatch)
    assert [hint.at for hint in read_hints(tmp_path / "cache")] == list(range(8, 100, 8))
    read = Read(monkeypatch)
    generate(config)
    assert shard_files(tmp_path / "cache") == shard_files(place / "cache")
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == (place / "cache" / "manifest.json").read_bytes()
    jumped = read.texts
    config = stopped_late(place, tmp_path / "again", monkeypatch)
    (tmp_path / "again" / NAME).unlink()
    read.texts = 0
    generate(config)
    assert jumped == 8 + 12  # the last whole group, to be sure, and from it to the end
    assert read.texts == 100
    assert shard_files(tmp_path / "again") == shard_files(place / "cache")


def test_hints_of_another_stream_change_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stopped_late(place, tmp_path / "cache", monkeypatch)
    hints = read_hints(tmp_path / "cache")
    written(tmp_path / "cache", *(Hint(hint.at + 8, hint.state) for hint in hints))
    generate(config)
    assert shard_files(tmp_path / "cache") == shard_files(place / "cache")


def test_a_stream_that_the_identity_does_not_pin_is_read_whole(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped_late(place, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(command, "is_pinned", lambda source: False)
    read = Read(monkeypatch)
    generate(config)
    assert read.texts == 100


def test_a_network_that_fails_while_a_cache_is_made_is_told_and_changes_no_byte(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("accel_distill.reading.FIRST_WAIT", 0.0)
    monkeypatch.setattr("accel_distill.reading.MARK_EVERY", 10)
    texts, reads = TextStream._texts, iter(range(10**6))

    def flaky(self: TextStream, start: Mark) -> Any:
        for text in texts(self, start):
            if next(reads) % 77 == 76:
                raise ConnectionResetError("reset by peer")
            yield text

    monkeypatch.setattr(TextStream, "_texts", flaky)
    with caplog.at_level(logging.WARNING):
        generate(small(place, tmp_path / "cache"))
    told = [message for message in caplog.messages if "reset by peer" in message]
    assert len(told) >= 2
    assert shard_files(tmp_path / "cache") == shard_files(place / "cache")
