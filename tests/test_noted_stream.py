"""Training that goes on in the middle of a stream begins near its place, and believes no note of it."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from accel_distill import hints as module
from accel_distill.config import DatasetConfig
from accel_distill.hints import MOST, NAME, read_hints
from accel_distill.noted_stream import AFTER, NotedStream
from accel_distill.reading import START, Mark, Reading
from accel_distill.stream import TextStream

TEXTS = [f"text {n}" for n in range(400)]


@pytest.fixture(autouse=True)
def every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note as soon as the one before is written."""
    monkeypatch.setattr(module, "EVERY", 0.0)


class Counted:
    """A stream of two files that counts what is read of it."""

    def __init__(self, place: Path, kind: str = "json", texts: list[str] = TEXTS, *, streaming: bool = True) -> None:
        import datasets

        place.mkdir(exist_ok=True)
        files = []
        for n in range(2):
            part = datasets.Dataset.from_dict({"text": texts[n * 200 : (n + 1) * 200]})
            files.append(str(place / f"{n}.{kind}"))
            part.to_parquet(files[-1], batch_size=50) if kind == "parquet" else part.to_json(files[-1])
        section = {"name": kind, "data_files": files, "max_samples": 400, "eval_samples": 0, "streaming": streaming}
        self.stream, self.starts = TextStream(DatasetConfig.model_validate(section)), list[int]()

    def read(self, start: Mark = START) -> Reading:
        self.starts.append(start.at)
        return self.stream.read(start)

    def noted(self, place: Path, *, source: str = "", is_writer: bool = True) -> NotedStream:
        return NotedStream(self.read, place, source={"of": source}, is_writer=is_writer)


def texts_at(stream: NotedStream, index: int, count: int) -> list[Any]:
    reading = stream.open(index)
    return list(islice(reading, index - reading.index, index - reading.index + count))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_stream_is_opened_again_near_the_place_that_is_wanted(tmp_path: Path, kind: str) -> None:
    first, again = Counted(tmp_path / "data", kind), Counted(tmp_path / "data", kind)
    assert texts_at(first.noted(tmp_path), 0, 400) == TEXTS
    assert 0 < len(read_hints(tmp_path)) <= MOST
    for index in (399, 250, 200, 199, 60, 1, 0):
        again.starts.clear()
        assert texts_at(again.noted(tmp_path), index, 3) == TEXTS[index : index + 3]
        if index >= 60:
            assert index - 40 < again.starts[-1] <= index


def test_another_rank_reads_from_there_too_and_writes_nothing(tmp_path: Path) -> None:
    stream = Counted(tmp_path / "data")
    assert texts_at(stream.noted(tmp_path, is_writer=False), 0, 400) == TEXTS and not read_hints(tmp_path)
    texts_at(stream.noted(tmp_path), 0, 100)
    before = (tmp_path / NAME).read_bytes()
    assert texts_at(stream.noted(tmp_path, is_writer=False), 90, 300) == TEXTS[90:390]
    assert stream.starts[-1] > 50 and (tmp_path / NAME).read_bytes() == before


@pytest.mark.parametrize("wrong", ["source", "texts", "state", "at", "no state", "not ours"])
def test_a_note_that_is_wrong_costs_time_and_no_sample(tmp_path: Path, wrong: str) -> None:
    texts_at(Counted(tmp_path / "data").noted(tmp_path), 0, 400)
    texts = [f"other {text}" for text in TEXTS] if wrong == "texts" else TEXTS
    stream = Counted(tmp_path / "data", texts=texts)
    hints = json.loads((tmp_path / NAME).read_text())
    states = [hint["state"] for hint in hints]
    for n, hint in enumerate(hints):
        changed = {"state": {"state": states[n - 1]}, "at": {"at": hint["at"] + 1}, "no state": {"state": None}}
        hint.update(changed.get(wrong, {}))
    (tmp_path / NAME).write_text("[1]" if wrong == "not ours" else json.dumps(hints))
    noted = stream.noted(tmp_path, source="another" if wrong == "source" else "", is_writer=False)
    assert texts_at(noted, 390, 10) == texts[390:]
    assert stream.starts[-1] == 0


def test_a_place_that_its_texts_tell_is_not_moved_by_a_sample(tmp_path: Path) -> None:
    texts_at(Counted(tmp_path / "data").noted(tmp_path), 0, 400)
    shifted = Counted(tmp_path / "data", texts=TEXTS[1:] + ["last"])
    assert texts_at(shifted.noted(tmp_path, is_writer=False), 300, 5) == TEXTS[301:306]
    assert shifted.starts[-1] == 0


def test_a_dataset_at_hand_goes_on_likewise(tmp_path: Path) -> None:
    stream = Counted(tmp_path / "data", streaming=False)
    texts_at(stream.noted(tmp_path), 0, 200)
    assert texts_at(stream.noted(tmp_path), 190, 3) == TEXTS[190:193] and stream.starts[-1] > 100


def test_a_disk_that_takes_no_note_does_not_stop_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "replace", refuse)
    assert texts_at(Counted(tmp_path / "data").noted(tmp_path), 0, 400) == TEXTS


class Rows(Dataset):
    """The texts of a stream as items, as text_rows.py has them."""

    def __init__(self, stream: NotedStream) -> None:
        self._stream, self._reading = stream, None

    def __getitem__(self, item: int) -> str:
        self._reading = self._reading or self._stream.open(item)
        (text,) = islice(self._reading, item - self._reading.index, item - self._reading.index + 1)
        return text


def loaded(stream: NotedStream, items: range, workers: int) -> Iterator[str]:
    torch.manual_seed(0)
    return iter(DataLoader(Rows(stream), batch_size=None, sampler=list(items), num_workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_of_a_loaders_workers_the_first_notes_and_all_go_on_from_there(tmp_path: Path, workers: int) -> None:
    stream = Counted(tmp_path / "data")
    assert list(loaded(stream.noted(tmp_path), range(300), workers)) == TEXTS[:300]
    places = [hint.at for hint in read_hints(tmp_path)]
    assert places == sorted(places) and places[-1] > 300 - 2 * AFTER - workers
    assert list(loaded(stream.noted(tmp_path), range(280, 400), workers)) == TEXTS[280:]
    reading = stream.noted(tmp_path).open(280)
    assert 240 < reading.index <= 280
