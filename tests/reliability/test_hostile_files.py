"""Every damaged or hostile shard is refused by its name, quickly and in little memory, by reader and by `verify`."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from accel_distill.cache import TeacherCache
from accel_distill.deal import shard_name
from accel_distill.errors import CacheMismatch, DamagedCache
from accel_distill.manifest import read_record
from accel_distill.verify import exit_status, verify_cache
from reliability.hostile import (
    FILES,
    IDS,
    KINDS,
    PLACE,
    STRUCTURE,
    VALUES,
    cut,
    damaged,
    good_cache,
    longer,
    read_columns,
    reforge,
    rewrite_manifest,
)

NAME = shard_name(*PLACE)
SAMPLES = (4, 0, 2)  # of the damaged shard
SECONDS = 1.0  # of processor time, whatever else the machine does


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "good"
    good_cache(path)
    return path


def test_there_are_forty_and_the_good_one_is_good(good: Path) -> None:
    """So that what follows is refused for what was done to it."""
    assert len(KINDS) == len(FILES) + len(STRUCTURE) + len(VALUES) >= 40
    assert verify_cache(good, deep=True)["ok"]
    assert len([sample for sample in TeacherCache(good) if len(sample.targets)]) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_the_file_and_what_is_wrong_in_under_a_second(kind: str, good: Path, tmp_path: Path) -> None:
    path = damaged(kind, good, tmp_path / "cache")
    begun = time.process_time()
    found = verify_cache(path, deep=True)
    assert time.process_time() - begun < SECONDS
    problems = [problem for problem in found["problems"] if problem["file"] == f"shards/{NAME}"]
    assert len(problems) == 1, found["problems"]
    assert NAME in problems[0]["what"] and "generate" in problems[0]["what"]
    with pytest.raises((DamagedCache, CacheMismatch), match=KINDS[kind].words):
        raise DamagedCache(problems[0]["what"])
    assert exit_status(found) == (5 if KINDS[kind].foreign else 6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].deep])
def test_no_sample_of_it_is_ever_read(kind: str, good: Path, tmp_path: Path) -> None:
    path, expected = damaged(kind, good, tmp_path / "cache"), TeacherCache(good)
    begun, samples = time.process_time(), []
    with pytest.raises(DamagedCache, match=KINDS[kind].words) as caught:
        cache = TeacherCache(path)
        for item in SAMPLES:
            samples.append(cache[item])
    assert time.process_time() - begun < SECONDS
    assert NAME in str(caught.value) and "generate" in str(caught.value)
    assert len(samples) < len(SAMPLES)
    for sample in samples:  # of rows that are whole
        good_one = expected[sample.sample_index]
        assert torch.equal(sample.input_ids, good_one.input_ids)
        if cache.method == expected.method:
            assert torch.equal(sample.targets.to_dense(50), good_one.targets.to_dense(50))


CHILD = """
import json, resource, sys
from pathlib import Path
from accel_distill.manifest import read_record
from accel_distill.verify import verify_cache
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = [verify_cache(path, deep=True)["problems"][0]["what"] for path in sorted(Path(sys.argv[1]).iterdir())]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([len(refused), grown, sorted({"torch", "transformers"} & set(sys.modules))]))
"""


def test_one_process_with_little_memory_refuses_them_all(good: Path, tmp_path: Path) -> None:
    """Also a crash inside HDF5 would show here."""
    for number, kind in enumerate(KINDS):
        damaged(kind, good, tmp_path / "all" / str(number))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "all")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, grown, imported = json.loads(done.stdout)
    assert refused == len(KINDS)
    assert grown < 100 << 10  # kB
    assert imported == []


def is_refused(path: Path, words: str = "generate") -> None:
    with pytest.raises(DamagedCache, match=words) as caught:
        TeacherCache(path)[2]
    assert NAME in str(caught.value)


def test_a_shard_cut_or_extended_to_any_length_is_refused(good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good, tmp_path / "cache")
    shard, choice = path / "shards" / NAME, random.Random(4)
    data = shard.read_bytes()
    lengths = {*range(0, 32), 4063, 4064, 4095, 4096, 4097, len(data) - 1, len(data) + 1, 2 * len(data)}
    lengths |= {choice.randrange(2 * len(data)) for _ in range(150)} - {len(data)}
    for length in sorted(lengths):
        shard.write_bytes((data + data)[:length])
        is_refused(path, "it has .* bytes|it starts with")
    shard.write_bytes(data)
    assert TeacherCache(path)[2].sample_index == 2


def parts_of(data: bytes) -> dict[str, range]:
    """Return where the header's text, its padding and hash, and HDF5's metadata and chunks are."""
    text = 12 + int.from_bytes(data[8:12], "little")
    return {
        "magic": range(8),
        "header": range(8, text),
        "padding": range(text, 4064),
        "hash": range(4064, 4096),
        "metadata": range(4096, 4096 + 1024),
        "data": range(4096 + 1024, len(data)),
    }


@pytest.mark.parametrize("part", parts_of(bytes(4096)))
def test_a_bit_flipped_anywhere_is_refused(part: str, good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good, tmp_path / "cache")
    shard, choice = path / "shards" / NAME, random.Random(5)
    data = shard.read_bytes()
    places = parts_of(data)[part]
    for place in choice.sample(places, min(len(places), 60)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << choice.randrange(8)
        shard.write_bytes(flipped)
        is_refused(path)


def test_every_column_with_a_value_more_or_less_is_refused(good: Path, tmp_path: Path) -> None:
    values = read_columns(read_record(good))
    assert len(values) > 8
    for name in values:
        for change in (cut, longer) if len(values[name]) else (longer,):
            path = shutil.copytree(good, tmp_path / name / change.__name__)
            change(name)(read_record(path))
            is_refused(path)
            assert not verify_cache(path)["ok"]


def test_any_value_of_any_column_is_refused_or_makes_a_sample_that_fits(good: Path, tmp_path: Path) -> None:
    """With hashes that are right: no other exception, no crash, no hang, and ids that exist."""
    path = shutil.copytree(good, tmp_path / "cache")
    record, refused = read_record(path), 0
    original = record.shard_path(*PLACE).read_bytes()
    for name, values in read_columns(record).items():
        dtype = values.dtype
        for number in (0, 1, np.iinfo(dtype).max, np.iinfo(dtype).max // 2):
            for place in (0, slice(None)) if len(values) else ():
                record.shard_path(*PLACE).unlink()  # or HDF5 would take it for the file that is still open
                record.shard_path(*PLACE).write_bytes(original)
                rewrite_manifest(record)
                reforge(record, columns=lambda columns: columns[name].__setitem__(place, number))  # noqa: B023
                try:
                    cache = TeacherCache(path)
                    for item in SAMPLES:
                        sample = cache[item]
                        assert sample.input_ids.lt(IDS).all() and sample.targets.head_ids.lt(IDS).all()
                        assert len(sample.targets) == int(sample.target_mask.sum())
                except DamagedCache as error:
                    refused += 1
                    assert NAME in str(error)
                verify_cache(path, deep=True)
    assert refused > 50


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow_sweep)])
def test_mutated_images_with_right_hashes_neither_crash_nor_hang(count: int, seed: int, tmp_path: Path) -> None:
    """Most are refused; in some only bytes that mean nothing have changed, or values that another cache could have."""
    script = Path(__file__).with_name("mutated_images.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cache"), str(seed), str(count)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["refused"] > count / 2 and found["refused"] + found["read"] == count
    assert found["longest"] < SECONDS
