"""A power cut at any step: no acknowledged shard is lost, no name has half its content; and the test can tell."""

import random
from pathlib import Path

import pytest

from accel_distill import publish as publishing
from accel_distill.publish import publish, replace
from reliability.power import File, ForgetfulOs, Killed, PowerCut

HISTORIES = 1000
SHARDS, SCRATCH = Path("/cache/shards"), Path("/cache/.tmp")
NAMES = ["shard-a", "shard-b", "shard-c", "shard-d"]


def content(name: str) -> bytes:
    """The bytes of a shard depend on its name alone."""
    return name.encode() * 7


class History:
    """One machine: processes publish shards, are killed, run at once, and the power fails."""

    def __init__(self, choice: random.Random, *, syncs_files: bool = True, syncs_directories: bool = True) -> None:
        self.choice = choice
        self.disk = ForgetfulOs(str(SHARDS), str(SCRATCH), before=self.before)
        self.disk.has_links = choice.random() < 0.8
        self.disk.syncs_files, self.disk.syncs_directories = syncs_files, syncs_directories
        self.shards = self.disk.directories[str(SHARDS)]
        self.acknowledged: set[str] = set()
        self.in_hand = ""
        self.end: type[BaseException] | None = None  # of the process that runs
        self.cuts = self.kills = self.rivals = 0

    def before(self, step: str) -> None:
        """Let something happen before a step; after its end a process does nothing more."""
        happens = self.choice.random()
        if self.end is None and happens < 0.06:
            self.end = PowerCut if happens < 0.03 else Killed
        if self.end is not None:
            raise self.end
        if step in ("link", "rename") and happens > 0.8 and self.in_hand not in self.shards.names:
            data = content(self.in_hand)  # another run was faster, and is killed before it syncs the directory
            self.shards.names[self.in_hand] = File(data, data)
            self.rivals += 1

    def run(self, *, steps: int) -> None:
        """Publish, now and then again, in one process after the other."""
        for _ in range(steps):
            self.in_hand, self.end = self.choice.choice(NAMES), None
            try:
                publish(content(self.in_hand), SHARDS / self.in_hand, scratch=SCRATCH)
                self.acknowledged.add(self.in_hand)
                if self.choice.random() < 0.2:
                    self.cut()
            except Killed:
                self.kills += 1
            except PowerCut:
                self.cut()
        self.cut()

    def cut(self) -> None:
        """Cut the power, and look at what is there when it comes back."""
        self.cuts += 1
        self.disk.cut(self.choice)
        for name, file in self.shards.names.items():
            assert file.data == content(name), f"{name} is there and holds {file.data!r}"
        assert self.acknowledged <= set(self.shards.names), f"lost: {self.acknowledged - set(self.shards.names)}"


def histories(seed: int, monkeypatch: pytest.MonkeyPatch, **missing: bool) -> dict[str, int]:
    """Run them all; return how much has happened in them."""
    choice, counts = random.Random(seed), dict.fromkeys(("cuts", "kills", "rivals", "acknowledged"), 0)
    for _ in range(HISTORIES):
        history = History(choice, **missing)
        with monkeypatch.context() as patch:
            patch.setattr(publishing, "os", history.disk)
            history.run(steps=8)
        for name in ("cuts", "kills", "rivals"):
            counts[name] += getattr(history, name)
        counts["acknowledged"] += len(history.acknowledged)
    return counts


def test_no_acknowledged_shard_is_lost_and_no_name_has_half_its_content(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = histories(seed, monkeypatch)
    assert counts["cuts"] > HISTORIES and counts["acknowledged"] > HISTORIES
    assert counts["kills"] > HISTORIES / 10 and counts["rivals"] > HISTORIES / 10


def test_without_the_files_fsync_a_name_has_half_its_content(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="is there and holds"):
        histories(seed, monkeypatch, syncs_files=False)


def test_without_the_directorys_fsync_a_shard_is_lost(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="lost: "):
        histories(seed, monkeypatch, syncs_directories=False)


def test_a_shard_that_another_run_published_is_durable_before_it_counts(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the directory synced only where the name is new, as it once was, what a dead rival linked is lost."""
    linked, sync = publishing._linked, publishing.sync_directory
    is_new: list[bool] = []

    def remember(*arguments: Path) -> bool:
        is_new.append(linked(*arguments))
        return is_new[-1]

    monkeypatch.setattr(publishing, "_linked", remember)
    monkeypatch.setattr(publishing, "sync_directory", lambda path: sync(path) if is_new[-1] else None)
    with pytest.raises(AssertionError, match="lost: "):
        histories(seed, monkeypatch)


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, seen = random.Random(seed), set()
    for _ in range(HISTORIES):
        plan = History(choice)
        plan.shards.names["plan"] = File(b"old", b"old")
        plan.shards.durable = dict(plan.shards.names)
        acknowledged = False
        with monkeypatch.context() as patch:
            patch.setattr(publishing, "os", plan.disk)
            try:
                replace(b"newer", SHARDS / "plan", scratch=SCRATCH)
                acknowledged = True
            except (Killed, PowerCut):
                pass
        plan.disk.cut(choice)
        found = plan.shards.names["plan"].data
        seen.add(found)
        assert found == b"newer" or (found == b"old" and not acknowledged)
    assert seen == {b"old", b"newer"}
