"""A shard file: exact round trip, and every kind of damage or malice refused, quickly, with one sentence."""

import hashlib
import json
import os
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pytest

from accel_distill import shard as shard_module
from accel_distill.errors import DamagedCache, RunError
from accel_distill.shard import CHUNK, FORMAT, HEADER_BYTES, ShardFile, read_header, shard_bytes

FIELDS = {
    "cache_id": "c" * 64,
    "group": 3,
    "lane": 1,
    "first_sample": 25,
    "samples": 4,
    "sequences": 4,
    "tokens": 12,
    "positions": 9,
    "empty": 1,
    "truncated": 0,
    "untargeted": 1,
    "nonfinite": 0,
    "texts_sha256": "d" * 64,
}
SMALL = {
    "bytes": np.array([0, 1, 255], "u1"),
    "ids": np.array([0, 65_535, 7], "<u2"),
    "wide": np.array([262_207, 0], "<u4"),
    "signed": np.array([-(2**62), 5], "<i8"),
    "none": np.zeros(0, "<u2"),
}


def dtypes(columns: dict[str, np.ndarray]) -> dict[str, np.dtype]:
    return {name: column.dtype for name, column in columns.items()}


def large_columns() -> dict[str, np.ndarray]:
    """Columns around and beyond the size of a chunk."""
    rng = np.random.default_rng(0)
    sizes = {"below": CHUNK - 1, "exact": CHUNK, "above": CHUNK + 1, "many": 3 * CHUNK + 77}
    return {name: rng.integers(0, 60_000, size).astype("<u2") for name, size in sizes.items()}


def forge(path: Path, image: bytes, **changes: Any) -> Path:
    """Write a shard file around any HDF5 image, with a header whose hashes are right."""
    payload = {"payload_bytes": len(image), "payload_sha256": hashlib.sha256(image).hexdigest()}
    header = json.dumps({"format": FORMAT, **FIELDS, **payload, **changes}).encode()
    path.write_bytes(framed(header) + image)
    return path


def framed(header: bytes, *, length: int | None = None) -> bytes:
    said = len(header) if length is None else length
    front = (b"ADSHARD1" + struct.pack("<I", said) + header).ljust(HEADER_BYTES - 32, b"\0")
    return front + hashlib.sha256(front).digest()


def image_of(build: Callable[[h5py.File], None]) -> bytes:
    with h5py.File("forged", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        build(file)
        file.flush()
        return file.id.get_file_image()


def add_column(file: h5py.File, name: str, *, dtype: str = "<u2", size: int = 3, **settings: Any) -> h5py.Dataset:
    """Add a column as the format wants it, but for `settings`."""
    wanted: dict[str, Any] = {"chunks": (min(size, CHUNK),), "shuffle": True, "compression": "gzip"} | settings
    return file.create_dataset(name, shape=(size,), dtype=dtype, **wanted)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.h5"
    path.write_bytes(shard_bytes(FIELDS, SMALL))
    return path


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Nothing that a file says may cost much time or memory; this bounds the time."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < 8


def test_columns_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    columns = SMALL | large_columns()
    path.write_bytes(shard_bytes(FIELDS, columns))
    shard = ShardFile(path, dtypes=dtypes(columns))
    for name, column in columns.items():
        found = shard.read(name)
        assert found.dtype == column.dtype
        assert shard.length(name) == len(column)
        np.testing.assert_array_equal(found, column)
    shard.close()


def test_any_range_of_a_column_is_that_range(tmp_path: Path) -> None:
    path, columns, choice = tmp_path / "shard.h5", large_columns(), random.Random(1)
    path.write_bytes(shard_bytes(FIELDS, columns))
    shard = ShardFile(path, dtypes=dtypes(columns))
    edges = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]
    for name, column in columns.items():
        for _ in range(50):
            start, stop = sorted(choice.choice([choice.randint(0, len(column)), *edges]) for _ in range(2))
            start, stop = min(start, len(column)), min(stop, len(column))
            np.testing.assert_array_equal(shard.read(name, start, stop), column[start:stop])
    for start, stop in [(-1, 3), (0, CHUNK), (5, 4), (CHUNK, CHUNK + 1)]:
        with pytest.raises(DamagedCache, match=f"column below has {CHUNK - 1} elements"):
            shard.read("below", start, stop)
    shard.close()


def test_the_header_comes_back_and_says_what_the_image_is(good: Path) -> None:
    header = asdict(read_header(good))
    image = good.read_bytes()[HEADER_BYTES:]
    payload = {"payload_bytes": len(image), "payload_sha256": hashlib.sha256(image).hexdigest()}
    assert header == {"format": FORMAT, **FIELDS, **payload, "numerics": ""}
    assert b"numerics" not in good.read_bytes()[:HEADER_BYTES]


def test_the_same_columns_give_the_same_bytes() -> None:
    first = shard_bytes(FIELDS, SMALL | large_columns())
    time.sleep(1.1)  # HDF5 can store times in seconds
    assert shard_bytes(FIELDS, SMALL | large_columns()) == first


def test_shards_can_be_built_in_threads_at_once() -> None:
    columns = SMALL | large_columns()
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: shard_bytes(FIELDS, columns), range(20)))
    assert set(built) == {shard_bytes(FIELDS, columns)}


def test_the_file_is_what_the_format_says_byte_by_byte(good: Path) -> None:
    data = good.read_bytes()
    length = struct.unpack("<I", data[8:12])[0]
    assert data[:8] == b"ADSHARD1"
    assert json.loads(data[12 : 12 + length])["samples"] == 4
    assert set(data[12 + length : 4064]) == {0}
    assert data[4064:4096] == hashlib.sha256(data[:4064]).digest()
    assert data[4096:4104] == b"\x89HDF\r\n\x1a\n"


def test_plain_h5py_reads_a_shard(tmp_path: Path) -> None:
    path, columns = tmp_path / "shard.h5", SMALL | large_columns()
    path.write_bytes(shard_bytes(FIELDS, columns))
    with h5py.File(path, "r") as file:
        assert set(file) == set(columns)
        for name, column in columns.items():
            np.testing.assert_array_equal(file[name][:], column)
            assert (file[name].compression, file[name].shuffle) == ("gzip", True)


def test_every_flipped_byte_is_refused(good: Path, tmp_path: Path) -> None:
    data, choice = good.read_bytes(), random.Random(2)
    header_end = 12 + struct.unpack("<I", data[8:12])[0]
    places = {*range(0, 16), *range(4060, 4112), header_end, len(data) - 1}
    places |= {choice.randrange(len(data)) for _ in range(400)} | {choice.randrange(header_end) for _ in range(100)}
    for place in sorted(places):
        path = tmp_path / f"flipped-{place}.h5"
        flipped = bytearray(data)
        flipped[place] ^= 1 << choice.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DamagedCache, match=rf"shard {path}: .*delete this file and run generate again"):
            ShardFile(path, dtypes=dtypes(SMALL))
        path.unlink()


def test_a_file_that_was_good_is_checked_again_once_it_has_changed(good: Path) -> None:
    ShardFile(good, dtypes=dtypes(SMALL)).close()
    data = bytearray(good.read_bytes())
    data[-200] ^= 1
    status = good.stat()
    good.write_bytes(data)
    os.utime(good, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    with pytest.raises(DamagedCache, match="do not have the hash"):
        ShardFile(good, dtypes=dtypes(SMALL))


def test_an_image_is_hashed_once_in_a_process(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    real = shard_module._sha256_of_rest

    def counting(file: BinaryIO) -> str:
        hashed.append(file.tell())
        return real(file)

    monkeypatch.setattr(shard_module, "_sha256_of_rest", counting)
    for _ in range(3):
        ShardFile(good, dtypes=dtypes(SMALL)).close()
    assert hashed == [HEADER_BYTES]


@pytest.mark.parametrize("size", [0, 1, 11, 4000, 4095, 4096, 4097, -1])
def test_a_truncated_file_is_refused(size: int, good: Path) -> None:
    good.write_bytes(good.read_bytes()[:size])
    for reader in (read_header, lambda path: ShardFile(path, dtypes=dtypes(SMALL))):
        with pytest.raises(DamagedCache, match=r"it has \d+ bytes"):
            reader(good)


def test_an_extended_file_is_refused(good: Path) -> None:
    good.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(DamagedCache, match=r"it has \d+ bytes, and its header says"):
        read_header(good)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(good: Path, tmp_path: Path) -> None:
    fifo, link, nothing = tmp_path / "fifo.h5", tmp_path / "link.h5", tmp_path / "nothing.h5"
    os.mkfifo(fifo)
    link.symlink_to(good)
    cases = {
        fifo: "not a regular file",
        tmp_path: "not a regular file",
        link: "a symbolic link",
        nothing: "No such file",
    }
    for path, words in cases.items():
        for reader in (read_header, lambda path: ShardFile(path, dtypes=dtypes(SMALL))):
            with pytest.raises(DamagedCache, match=words):
                reader(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": FORMAT + 1}, f"its format is {FORMAT + 1}, this version reads {FORMAT}"),
        ({"format": True}, "its format is True|format = True"),
        ({"samples": "4"}, "samples = '4'"),
        ({"samples": -1}, "samples = -1"),
        ({"samples": 4.0}, "samples = 4.0"),
        ({"samples": True}, "samples = True"),
        ({"cache_id": None}, "cache_id = None"),
        ({"numerics": {"device": "cuda"}}, "numerics = {'device': 'cuda'}"),
        ({"numerics": "cuda"}, "its header's numerics: it is not JSON"),
        ({"note": "more"}, "fields that do not belong"),
        ({"payload_bytes": 10**30}, "its header says"),
        ({"payload_bytes": 2**34}, "it has .* bytes, and its header says"),
        ({"payload_bytes": 2**34 + 1}, "its header says 17,179,869,185 bytes, more than 17,179,869,184"),
    ],
)
def test_a_header_with_a_right_hash_and_wrong_content_is_refused(
    changes: dict[str, Any], words: str, good: Path, tmp_path: Path
) -> None:
    path = forge(tmp_path / "forged.h5", good.read_bytes()[HEADER_BYTES:], **changes)
    with pytest.raises(DamagedCache, match=words):
        read_header(path)


@pytest.mark.parametrize(
    "front",
    [
        framed(b"[1, 2]"),
        framed(b"7"),
        framed(b"{}"),
        framed(b"\xff\xfe"),
        framed(b"{", length=2**32 - 1),
        framed(b'{"format": 1}', length=3),
        framed(b'{"format": NaN}'),
        framed(b"[" * 4000),
    ],
)
def test_a_header_that_is_no_header_is_refused(front: bytes, tmp_path: Path) -> None:
    path = tmp_path / "forged.h5"
    path.write_bytes(front + b"image")
    with pytest.raises(DamagedCache, match="its header|its format"):
        read_header(path)


def test_an_image_that_is_no_hdf5_is_refused(tmp_path: Path) -> None:
    for n, image in enumerate([b"", b"x", os.urandom(5000), b"\x89HDF\r\n\x1a\n" + bytes(3000)]):
        with pytest.raises(DamagedCache, match="it cannot be opened"):
            ShardFile(forge(tmp_path / f"{n}.h5", image), dtypes=dtypes(SMALL))


def test_a_missing_and_an_extra_column_are_refused(good: Path) -> None:
    with pytest.raises(DamagedCache, match="column other is not there"):
        ShardFile(good, dtypes=dtypes(SMALL) | {"other": np.dtype("u1")})
    with pytest.raises(DamagedCache, match=r"columns that do not belong to it: \['wide'\]"):
        ShardFile(good, dtypes={name: dtype for name, dtype in dtypes(SMALL).items() if name != "wide"})


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(3,), dtype="<u2")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(3,))
    file.create_virtual_dataset("x", layout)


def external_file(file: h5py.File) -> None:
    file.create_dataset("x", shape=(3,), dtype="<u2", external=[("/etc/passwd", 0, 6)])


def soft_link(file: h5py.File) -> None:
    file["x"] = h5py.SoftLink("/elsewhere")
    add_column(file, "elsewhere")


def filled(file: h5py.File, **settings: Any) -> None:
    """A column with all its data, so that it is refused for its settings."""
    add_column(file, "x", **settings)[:] = np.zeros(3)


def two_dimensions(file: h5py.File) -> None:
    whole: dict[str, Any] = {"chunks": (3, 2), "shuffle": True, "compression": "gzip"}
    file.create_dataset("x", data=np.zeros((3, 2), "<u2"), **whole)


NOT_PLAIN, NOT_CHUNKED = "column x is not there as a plain dataset", "column x is not stored in chunks of at most 16384"
HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "an external link": (lambda file: file.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/x")), NOT_PLAIN),
    "a soft link": (soft_link, NOT_PLAIN),
    "a link to nothing": (lambda file: file.__setitem__("x", h5py.SoftLink("/nowhere")), NOT_PLAIN),
    "a group": (lambda file: file.create_group("x"), NOT_PLAIN),
    "a named type": (lambda file: file.__setitem__("x", np.dtype("<u2")), NOT_PLAIN),
    "an external file's bytes": (external_file, NOT_CHUNKED),
    "a virtual dataset": (virtual, NOT_CHUNKED),
    "no chunks": (lambda file: file.create_dataset("x", data=np.zeros(3, "<u2")), NOT_CHUNKED),
    "huge chunks": (lambda file: add_column(file, "x", size=2**30, chunks=(2**29,)), NOT_CHUNKED),
    "another width": (lambda file: filled(file, dtype="<u4"), "column x is uint32"),
    "a sign": (lambda file: filled(file, dtype="<i2"), "column x is int16"),
    "the other byte order": (lambda file: filled(file, dtype=">u2"), "column x is >u2"),
    "floats": (lambda file: filled(file, dtype="<f2"), "column x is float16"),
    "objects": (lambda file: file.create_dataset("x", data=["a"], dtype=h5py.string_dtype()), "column x is object"),
    "two dimensions": (two_dimensions, r"column x is uint16 \(3, 2\), expected uint16, 1-D"),
    "a scalar": (lambda file: file.create_dataset("x", data=np.uint16(3)), r"column x is uint16 \(\), expected"),
    "no shuffle": (lambda file: filled(file, shuffle=False), "column x has the filters"),
    "no gzip": (lambda file: filled(file, compression=None), "column x has the filters"),
    "another filter": (lambda file: filled(file, compression="lzf"), "column x has the filters"),
    "one filter more": (lambda file: filled(file, fletcher32=True), "column x has the filters"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_column_that_is_not_plain_is_refused_when_the_shard_is_opened(kind: str, tmp_path: Path) -> None:
    build, words = HOSTILE[kind]
    path = forge(tmp_path / "forged.h5", image_of(lambda file: build(file) and None))
    with pytest.raises(DamagedCache, match=words):
        ShardFile(path, dtypes={"x": np.dtype("<u2")})


def read_forged(path: Path, build: Callable[[h5py.File], None]) -> np.ndarray:
    shard = ShardFile(forge(path, image_of(build)), dtypes={"x": np.dtype("<u2")})
    try:
        return shard.read("x")
    finally:
        shard.close()


def with_chunk(raw: bytes, *, mask: int = 0, size: int = 3) -> Callable[[h5py.File], None]:
    return lambda file: add_column(file, "x", size=size).id.write_direct_chunk((0,), raw, filter_mask=mask)


def test_the_forging_helpers_make_a_file_that_reads(tmp_path: Path) -> None:
    """So that what they forge below is refused for the right reason."""
    low_then_high = bytes([1, 2, 3, 0, 0, 1])
    np.testing.assert_array_equal(read_forged(tmp_path / "x.h5", with_chunk(zlib.compress(low_then_high))), [1, 2, 259])


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path) -> None:
    inflater = zlib.compressobj(9)
    bomb = b"".join(inflater.compress(bytes(1 << 20)) for _ in range(256)) + inflater.flush()
    assert len(bomb) < 1 << 19  # 256 MiB in it
    tracemalloc.start()
    with pytest.raises(DamagedCache, match="does not hold exactly 6 bytes"):
        read_forged(tmp_path / "x.h5", with_chunk(bomb))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20  # the bytes of the bomb, a few times
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (zlib.compress(bytes(5)), "does not hold exactly 6 bytes"),
        (zlib.compress(bytes(7)), "does not hold exactly 6 bytes"),
        (zlib.compress(b""), "does not hold exactly 6 bytes"),
        (zlib.compress(bytes(6))[:-2], "does not hold exactly 6 bytes"),
        (bytes(6), "cannot be read at 0"),
        (zlib.compress(bytes(6))[:-4] + bytes(4), "cannot be read at 0"),
    ],
)
def test_a_chunk_of_another_size_or_of_no_gzip_is_refused(raw: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedCache, match=words):
        read_forged(tmp_path / "x.h5", with_chunk(raw))


def test_a_chunk_that_says_it_is_not_compressed_is_refused(tmp_path: Path) -> None:
    for raw in (bytes(6), zlib.compress(bytes(6))):
        with pytest.raises(DamagedCache, match="column x"):
            read_forged(tmp_path / "x.h5", with_chunk(raw, mask=3))


@pytest.mark.parametrize("size", [3, CHUNK + 1, 5 * CHUNK])
def test_a_missing_chunk_is_refused_and_not_read_as_zeros(size: int, tmp_path: Path) -> None:
    whole = zlib.compress(bytes(2 * min(size, CHUNK)))
    first_only, none = with_chunk(whole, size=size), lambda file: add_column(file, "x", size=size) and None
    for build in [first_only, none] if size > CHUNK else [none]:
        with pytest.raises(DamagedCache, match="column x lacks chunks"):
            read_forged(tmp_path / "x.h5", build)


@pytest.mark.parametrize("size", [2**30, 2**40])
def test_a_column_that_claims_to_be_huge_costs_nothing(size: int, tmp_path: Path) -> None:
    def huge(file: h5py.File) -> None:
        column = add_column(file, "x", size=size, maxshape=(None,))
        for start in (0, (size - 1) // CHUNK * CHUNK):  # to count the chunks between takes HDF5 15 s
            column.id.write_direct_chunk((start,), zlib.compress(bytes(2 * CHUNK)))

    with pytest.raises(DamagedCache, match="column x lacks chunks"):
        read_forged(tmp_path / "x.h5", huge)


def test_columns_that_inflate_to_far_more_than_the_file_are_refused_by_reader_and_writer(tmp_path: Path) -> None:
    size = 20 << 20  # 40 MB of zeros

    def bomb(file: h5py.File) -> None:
        column, chunk = add_column(file, "x", size=size), zlib.compress(bytes(2 * CHUNK))
        for start in range(0, size, CHUNK):
            column.id.write_direct_chunk((start,), chunk)

    with pytest.raises(DamagedCache, match=r"its columns claim 41,943,040 bytes, expected at most"):
        read_forged(tmp_path / "x.h5", bomb)
    with pytest.raises(RunError, match="a shard's 41,943,040 bytes of columns compress to .* lower cache.samples_per"):
        shard_bytes(FIELDS, {"x": np.zeros(size, "<u2")})


def test_an_image_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "LARGEST_IMAGE", 1000)
    with pytest.raises(RunError, match="a shard takes .* bytes, more than 1,000; lower cache.samples_per_shard"):
        shard_bytes(FIELDS, SMALL)


def test_a_header_that_has_no_room_is_not_cut() -> None:
    with pytest.raises(RunError, match="a shard's header has no room for"):
        shard_bytes({**FIELDS, "numerics": json.dumps({"attn_implementation": "x" * 4000})}, SMALL)


def test_numerics_are_in_the_header_only_where_they_are_not_the_caches(tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    path.write_bytes(shard_bytes({**FIELDS, "numerics": '{"device":"cuda"}'}, SMALL))
    assert read_header(path).numerics == '{"device":"cuda"}'
    assert shard_bytes({**FIELDS, "numerics": ""}, SMALL) == shard_bytes(FIELDS, SMALL)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "it is a web page"),
        (b"\n <html>" + bytes(5000), "it is a web page"),
    ],
)
def test_what_a_download_left_in_a_shards_place_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    path.write_bytes(content)
    with pytest.raises(DamagedCache, match=words):
        read_header(path)


def test_a_damaged_image_with_a_right_hash_is_refused_or_reads(good: Path, tmp_path: Path) -> None:
    """Whatever HDF5 says of broken metadata becomes DamagedCache: no other exception, no crash, no hang."""
    image, choice, refused = good.read_bytes()[HEADER_BYTES:], random.Random(3), 0
    for n in range(300):
        damaged = bytearray(image)
        for _ in range(choice.choice([1, 4])):
            damaged[choice.randrange(len(image))] = choice.choice([0, 1, 127, 255])
        path = forge(tmp_path / f"{n}.h5", bytes(damaged))
        try:
            shard = ShardFile(path, dtypes=dtypes(SMALL))
        except DamagedCache:
            refused += 1
            continue
        for name in SMALL:
            try:
                shard.read(name)
            except DamagedCache:
                refused += 1
        shard.close()
    assert refused > 200
