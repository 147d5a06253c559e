"""What `generate` looks at before it begins: a run that cannot fit is refused, and no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_teacher, run_config, story, write_jsonl

from accel_distill import run_plan
from accel_distill.command_line import GENERATE_FLAGS, parse_flagged
from accel_distill.config import RunConfig
from accel_distill.disk_space import DiskSpace, Room
from accel_distill.errors import DiskGuard, DoesNotFit
from accel_distill.generate import generate, main
from accel_distill.run_file import to_yaml
from accel_distill.run_plan import refuse_what_cannot_fit

TEXTS = [story(n) for n in range(400)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    make_teacher(path / "teacher")
    write_jsonl(path / "data.jsonl", TEXTS)
    return path


@pytest.fixture
def config(place: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function from changes to a run with a cache of its own."""
    return lambda **changes: run_config(place / "teacher", place / "data.jsonl", tmp_path / "cache", **changes)


def no_reading(*arguments: Any, **more: Any) -> None:
    raise AssertionError("the dataset was opened")


def test_a_run_that_fits_at_its_largest_is_not_looked_at(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "open_plan", no_reading)
    refuse_what_cannot_fit(config(), processes=1)
    with pytest.raises(AssertionError):  # it is looked at where it may not
        refuse_what_cannot_fit(config(dataset={"max_samples": 10**12}), processes=1)
    with pytest.raises(AssertionError):  # or where no cap says how many tokens there are
        refuse_what_cannot_fit(config(dataset={"long_documents": "split"}), processes=1)


def test_a_run_is_refused_only_when_the_least_that_it_takes_is_too_much(config: Callable[..., RunConfig]) -> None:
    # 400 samples of 26 positions: 10,000 positions of 3 bytes at least, and 100 shards of 12.3 kB
    def run(max_bytes: int) -> RunConfig:
        return config(dataset={"max_samples": 400}, cache={"max_bytes": max_bytes})

    with pytest.raises(DoesNotFit, match=r"at least 1\.\d+ MB are still to be written, and there is room for 1.00 MB"):
        refuse_what_cannot_fit(run(1_000_000), processes=1)
    refuse_what_cannot_fit(run(1_500_000), processes=1)


def test_a_cap_far_beyond_the_end_of_local_files_does_not_refuse_what_fits(config: Callable[..., RunConfig]) -> None:
    def run(max_bytes: int) -> RunConfig:
        return config(dataset={"max_samples": 10**10}, cache={"max_bytes": max_bytes})

    refuse_what_cannot_fit(run(3_000_000), processes=1)
    with pytest.raises(DoesNotFit):
        refuse_what_cannot_fit(run(100_000), processes=1)


def test_local_files_that_are_not_read_to_their_end_count_for_what_they_may_hold(
    config: Callable[..., RunConfig],
) -> None:
    plan = run_plan.open_plan(config(dataset={"max_samples": 10**10}), processes=1, counted=100, seconds=0)
    assert plan.lengths.population == 10**10 and plan.lengths.read == 64
    assert 64 < plan.least_samples < 400


def test_where_there_is_no_room_at_all_the_disk_guard_speaks(config: Callable[..., RunConfig]) -> None:
    refuse_what_cannot_fit(config(cache={"min_free_disk": "99.9999%"}), processes=1)


def test_a_cache_that_has_shards_is_judged_by_them(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(config())
    monkeypatch.setattr(run_plan, "open_plan", no_reading)
    used = DiskSpace(config().cache.path, min_free=0, max_bytes=None).used()
    quota = 2 * used
    refuse_what_cannot_fit(config(cache={"max_bytes": quota}), processes=1)  # all of it is there
    refuse_what_cannot_fit(config(dataset={"max_samples": 60}, cache={"max_bytes": quota}), processes=1)
    with pytest.raises(DoesNotFit, match="are still to be written, and there is room for"):
        refuse_what_cannot_fit(config(dataset={"max_samples": 120}, cache={"max_bytes": quota}), processes=1)


def test_a_cache_that_lost_its_directory_of_shards_is_looked_at_as_a_new_one(config: Callable[..., RunConfig]) -> None:
    config().cache.path.mkdir()
    (config().cache.path / "cache.json").write_text("{}")
    refuse_what_cannot_fit(config(), processes=1)


def test_generate_refuses_with_status_3_before_it_writes_and_force_begins_all_the_same(
    config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(to_yaml(config(cache={"max_bytes": 60_000}).model_dump(mode="json")))
    assert main(["--config", str(run_file)]) == 3
    assert "--force begins all the same" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main(["--config", str(run_file), "--force"]) == DiskGuard.exit_status
    assert (tmp_path / "cache" / "cache.json").is_file()


def test_force_is_a_flag_that_check_knows_too() -> None:
    assert parse_flagged(["--config", "a", "--force", "b=1"], "check", flags=GENERATE_FLAGS).force is True
    assert parse_flagged(["--config", "a"], "check", flags=GENERATE_FLAGS).force is False


def test_the_room_is_what_is_free_above_the_reserve_or_what_is_left_of_the_quota(tmp_path: Path) -> None:
    assert Room(used=5, free=100, reserve=30, max_bytes=None).left == 70
    assert Room(used=5, free=100, reserve=30, max_bytes=40).left == 35
    assert Room(used=50, free=None, reserve=0, max_bytes=40).left == -10
    assert Room(used=5, free=None, reserve=0, max_bytes=None).left is None
    there = tmp_path / "cache"
    there.mkdir()
    (there / "file").write_bytes(b"123")
    found = DiskSpace(there, min_free="1MB", max_bytes="2MB").room()
    assert (found.used, found.reserve, found.max_bytes) == (3, 10**6, 2 * 10**6)
    not_yet = DiskSpace(there / "a" / "b", min_free="1MB", max_bytes=None).room()
    assert not_yet.used == 0 and not_yet.free is not None and not_yet.free > 0
