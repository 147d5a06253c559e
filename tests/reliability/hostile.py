"""Damaged and hostile caches, made here: each kind changes a good small cache, with consistent hashes where it can.

`KINDS` maps the name of a kind to what is done to the cache and the words that the error must have. A kind that is
`foreign` is a file of another cache; a kind that only `verify --deep` has to find is `deep`.
"""

import hashlib
import json
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from made_cache import PARAMETERS, Row, make_cache, make_record, make_rows, write_shards

from accel_distill.codec import tail_counts, weight_scale
from accel_distill.manifest import Record, read_record, write_manifest, write_plan
from accel_distill.shard import CHUNK, FORMAT, HEADER_BYTES, ShardFile, read_header, shard_bytes
from accel_distill.targets import SparseTargets, concatenate

LENGTHS = [[9], [0], [1], [2], [17], [5], [0], [30], [3], [8], [4], [12], [6]]  # 13 samples
SETTINGS: dict[str, Any] = {"lanes": 2, "samples_per_shard": 3, "vocab": 50, "tokenizer_size": 48}
IDS = 48  # that the tokenizer makes: the teacher's output layer is padded
PLACE = (0, 0, 3)  # the shard that is damaged: samples 0, 2 and 4
TOTAL = weight_scale("threshold", PARAMETERS["threshold"])  # of the weights of a position
COLUMN = "entropy"  # the column that is forged: <i8, one value a row
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """What is done to a cache, and the words of the error."""

    make: Callable[[Record], object]
    words: str
    foreign: bool = False
    deep: bool = False


def good_cache(path: Path) -> Record:
    """Make the cache that is to be damaged."""
    return make_cache(path, made_rows(), **SETTINGS)


def made_rows() -> list[Row]:
    """Return rows whose ids the tokenizer can make."""
    return make_rows(LENGTHS, vocab=IDS)


# ---- forging a shard whose hashes are right


def reforge(
    record: Record, *, columns: Callable[[Columns], object] | None = None, fields: dict[str, Any] | None = None
) -> None:
    """Write the shard again, with changed columns or header, and the manifest that belongs to it."""
    path = record.shard_path(*PLACE)
    read, said = read_columns(record), header_fields(path)
    if columns is not None:
        columns(read)
    path.unlink()
    path.write_bytes(shard_bytes({**said, **(fields or {})}, read))
    rewrite_manifest(record)


def reforge_image(record: Record, image: bytes, **fields: Any) -> None:
    """Write the shard again around any HDF5 image."""
    path = record.shard_path(*PLACE)
    said = header_fields(path)
    payload = {"payload_bytes": len(image), "payload_sha256": hashlib.sha256(image).hexdigest()}
    path.write_bytes(framed({"format": FORMAT, **said, **payload, **fields}) + image)
    rewrite_manifest(record)


def read_columns(record: Record) -> Columns:
    """Return all columns of the shard, as they are stored."""
    shard = ShardFile(record.shard_path(*PLACE), dtypes=record.dtypes)
    columns = {name: shard.read(name).copy() for name in record.dtypes}
    shard.close()
    return columns


def header_fields(path: Path) -> dict[str, Any]:
    """Return the header of a shard without what is said of its image."""
    said = asdict(read_header(path))
    return {name: value for name, value in said.items() if not name.startswith(("payload", "format", "numerics"))}


def framed(header: dict[str, Any] | bytes) -> bytes:
    """Return the 4096 bytes in front of an image, with the right hash."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    front = (b"ADSHARD1" + struct.pack("<I", len(text)) + text).ljust(HEADER_BYTES - 32, b"\0")
    return front + hashlib.sha256(front).digest()


def rewrite_manifest(record: Record) -> None:
    """Let the manifest say what the shards' headers say, as whoever forges a cache would."""
    (record.path / "manifest.json").unlink()
    write_manifest(record, total=len(LENGTHS), stream_end="exhausted")


# ---- HDF5 images in which one column is not what it should be


def image(record: Record, build: Callable[[h5py.File, np.ndarray], object]) -> bytes:
    """Return an image with all columns but one as they are; `build` adds that one, given its values."""
    with h5py.File("forged", "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        for name, values in read_columns(record).items():
            if name == COLUMN:
                build(file, values)
            else:
                plain(file, name, values)
        file.flush()
        return file.id.get_file_image()


def plain(file: h5py.File, name: str, values: np.ndarray, **settings: Any) -> h5py.Dataset:
    """Add a column as the format wants it, but for `settings`."""
    wanted: dict[str, Any] = {"chunks": (min(max(len(values), 1), CHUNK),), "shuffle": True, "compression": "gzip"}
    wanted["maxshape"] = values.shape if len(values) else (None,)
    return file.create_dataset(name, data=values, **(wanted | settings))


def hdf5(build: Callable[[h5py.File, np.ndarray], object]) -> Callable[[Record], object]:
    """Return a kind whose image has a forged column."""
    return lambda record: reforge_image(record, image(record, build))


def chunked(raw: Callable[[np.ndarray], bytes], *, mask: int = 0) -> Callable[[Record], object]:
    """Return a kind whose column has `raw` as its one stored chunk."""

    def build(file: h5py.File, values: np.ndarray) -> None:
        column = file.create_dataset(
            COLUMN, shape=values.shape, dtype=values.dtype, chunks=values.shape, shuffle=True, compression="gzip"
        )
        column.id.write_direct_chunk((0,), raw(values), filter_mask=mask)

    return hdf5(build)


def huge(size: int) -> Callable[[h5py.File, np.ndarray], None]:
    """Return a builder of a column that claims `size` elements and stores the first and the last chunk."""

    def build(file: h5py.File, values: np.ndarray) -> None:
        column = file.create_dataset(
            COLUMN, shape=(size,), maxshape=(None,), dtype="<i8", chunks=(CHUNK,), shuffle=True, compression="gzip"
        )
        for start in {0, min((size - 1) // CHUNK, 2**32 - 2) * CHUNK}:
            column.id.write_direct_chunk((start,), zlib.compress(bytes(8 * CHUNK)))

    return build


def bomb_of_many_chunks(file: h5py.File, values: np.ndarray) -> None:
    """Add a column of 256 MB of zeros, each of its chunks as it should be."""
    size, chunk = 32 << 20, zlib.compress(bytes(8 * CHUNK), 9)
    column = file.create_dataset(COLUMN, shape=(size,), dtype="<i8", chunks=(CHUNK,), shuffle=True, compression="gzip")
    for start in range(0, size, CHUNK):
        column.id.write_direct_chunk((start,), chunk)


def bomb_in_one_chunk(values: np.ndarray) -> bytes:
    """Return a small stream that inflates to 64 MB."""
    inflater = zlib.compressobj(9)
    return b"".join(inflater.compress(bytes(1 << 20)) for _ in range(64)) + inflater.flush()


def shuffled(values: np.ndarray) -> bytes:
    """Return the bytes of a column as the shuffle filter leaves them."""
    return values.view(np.uint8).reshape(len(values), -1).T.tobytes()


def virtual(file: h5py.File, values: np.ndarray) -> None:
    layout = h5py.VirtualLayout(shape=values.shape, dtype=values.dtype)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=values.shape)
    file.create_virtual_dataset(COLUMN, layout)


def soft_link(file: h5py.File, values: np.ndarray) -> None:
    file[COLUMN] = h5py.SoftLink("/elsewhere")
    plain(file, "elsewhere", values)


def unknown_filter(file: h5py.File, values: np.ndarray) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(values.shape)
    settings.set_filter(60_000, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(file.id, COLUMN.encode(), h5py.h5t.STD_I64LE, space, settings)
    file[COLUMN].id.write_direct_chunk((0,), values.tobytes())


def vlen(file: h5py.File, values: np.ndarray) -> None:
    column = file.create_dataset(COLUMN, shape=values.shape, dtype=h5py.vlen_dtype(np.dtype("<i8")))
    column[0] = values


def external_storage(file: h5py.File, values: np.ndarray) -> None:
    file.create_dataset(COLUMN, shape=values.shape, dtype="<i8", external=[("/etc/passwd", 0, values.nbytes)])


def and_also(name: str, add: Callable[[h5py.File, str], object]) -> Callable[[h5py.File, np.ndarray], None]:
    """Return a builder of the column as it should be, and of something more."""

    def build(file: h5py.File, values: np.ndarray) -> None:
        plain(file, COLUMN, values)
        add(file, name)

    return build


# ---- values that no teacher can have said, in columns that fit each other


def rows_changed(
    change: Callable[[Row], Row], *, settings: dict[str, Any] | None = None, fields: dict[str, Any] | None = None
) -> Callable[[Record], object]:
    """Return a kind whose sample 4, of 17 tokens, is changed before everything is encoded and hashed."""

    def make(record: Record) -> None:
        method = (settings or {}).get("method", "threshold")
        rows = make_rows(LENGTHS, vocab=IDS, method=method)
        rows[4] = change(rows[4])
        path = record.path
        shutil.rmtree(path)
        made = make_record(path, **SETTINGS | (settings or {}))
        write_plan(path, max_samples=None)
        write_shards(made, rows)
        write_manifest(made, total=len(LENGTHS), stream_end="exhausted")
        if fields:
            reforge(made, fields=fields)

    return make


def without_a_target(row: Row) -> Row:
    """Leave out the target of position 3, as where a logit is not finite."""
    parts = [row.targets.position_slice(0, 3), row.targets.position_slice(4, len(row.targets))]
    return replace(row, targets=concatenate(parts), left_out=(3,))


def many_heads(arrays: dict[str, np.ndarray]) -> None:
    """Give the first position 21 heads of weight 1, where at most 20 ids can have a probability of 0.05."""
    tails = int(tail_counts(PARAMETERS["threshold"])[TOTAL - 21])
    rest, tail_rest = int(arrays["head_count"][0]), int(arrays["tail_count"][0])
    arrays["head_ids"] = np.concatenate([np.arange(21), arrays["head_ids"][rest:]])
    arrays["head_values"] = np.concatenate([np.ones(21, np.int64), arrays["head_values"][rest:]])
    arrays["tail_ids"] = np.concatenate([np.arange(21, 21 + tails), arrays["tail_ids"][tail_rest:]])
    arrays["head_count"][0], arrays["tail_count"][0] = 21, tails


def a_head_less(arrays: dict[str, np.ndarray]) -> None:
    """Take the last head id of the first position away."""
    last = int(arrays["head_count"][0]) - 1
    for name in ("head_ids", "head_values"):
        arrays[name] = np.delete(arrays[name], last)
    arrays["head_count"][0] = last


def drawn_elsewhere(arrays: dict[str, np.ndarray]) -> None:
    """Move a draw from one tail id of the first position to the other."""
    arrays["tail_values"][:2] = 0, 2


def with_ids(ids: Sequence[int]) -> Callable[[Row], Row]:
    return lambda row: replace(row, ids=np.concatenate([ids, row.ids[len(ids) :]]).astype(np.int64))


def with_targets(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Row], Row]:
    """Return a change of the plain arrays of a row's targets."""

    def changed(row: Row) -> Row:
        arrays = {name: array.copy() for name, array in row.targets.arrays().items()}
        change(arrays)
        made = SparseTargets.from_arrays(arrays, method=row.targets.method, parameter=row.targets.parameter)
        return replace(row, targets=made)

    return changed


def at(name: str, place: int, value: int) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays[name].__setitem__(place, value)


def head_twice(arrays: dict[str, np.ndarray]) -> None:
    """Let the tail of the first position that has one name its head id."""
    position = int(np.flatnonzero(arrays["tail_count"])[0])
    arrays["tail_ids"][arrays["tail_count"][:position].sum()] = arrays["head_ids"][position]


def cut(name: str) -> Callable[[Record], object]:
    return lambda record: reforge(record, columns=lambda columns: columns.update({name: columns[name][:-1]}))


def longer(name: str) -> Callable[[Record], object]:
    return lambda record: reforge(
        record,
        columns=lambda columns: columns.update({name: np.append(columns[name], np.zeros(1, columns[name].dtype))}),
    )


def value(name: str, place: int, number: int) -> Callable[[Record], object]:
    return lambda record: reforge(record, columns=lambda columns: columns[name].__setitem__(place, number))


def all_bits(record: Record) -> None:
    reforge(record, columns=lambda columns: columns["target_mask"].__setitem__(slice(None), 255))


# ---- files that are not shards


def victim(make: Callable[[Path], object]) -> Callable[[Record], object]:
    """Return a kind that puts something else in the place of the shard."""

    def changed(record: Record) -> None:
        path = record.shard_path(*PLACE)
        path.unlink()
        make(path)

    return changed


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Record], object]:
    return lambda record: record.shard_path(*PLACE).write_bytes(change(record.shard_path(*PLACE).read_bytes()))


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def claims_a_tebibyte(record: Record) -> None:
    """Put a header before a sparse file that is as large as it says: to hash it would take a quarter of an hour."""
    path, size = record.shard_path(*PLACE), 1 << 40
    header = {"format": FORMAT, **header_fields(path), "payload_bytes": size, "payload_sha256": "0" * 64}
    sparse(path, HEADER_BYTES + size)
    with open(path, "r+b") as file:
        file.write(framed(header))


def swapped(record: Record) -> None:
    first, second = record.shard_path(*PLACE), record.shard_path(0, 1, 3)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def of_another_cache(record: Record) -> None:
    path = record.path / "other"
    other = make_cache(path, make_rows(LENGTHS, vocab=40), **SETTINGS | {"vocab": 40, "tokenizer_size": 40})
    shutil.copy(other.shard_path(*PLACE), record.shard_path(*PLACE))
    shutil.rmtree(path)


def first_sample_of_another(record: Record) -> None:
    reforge(record, fields={"first_sample": 1})


def header_with(**fields: Any) -> Callable[[Record], object]:
    """Return a kind whose header says something else; the manifest stays as it was."""

    def make(record: Record) -> None:
        path = record.shard_path(*PLACE)
        data, said = path.read_bytes()[HEADER_BYTES:], asdict(read_header(path))
        del said["numerics"]
        path.write_bytes(framed({**said, **fields}) + data)

    return make


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258da\nsize 12\n"
)
PAGE = b"<!DOCTYPE html>\n<html><head><title>Access denied</title></head><body>Please log in.</body></html>\n"
NOT_PLAIN = f"column {COLUMN} is not there as a plain dataset"
NOT_CHUNKED = f"column {COLUMN} is not stored in chunks"
FILTERS = f"column {COLUMN} has the filters"
NOT_EXACT = "does not hold exactly 24 bytes"

FILES: dict[str, Kind] = {
    "an empty file": Kind(bytes_of(lambda data: b""), "it has 0 bytes"),
    "a header cut short": Kind(bytes_of(lambda data: data[:2000]), "it has 2000 bytes, less than its header"),
    "a header alone": Kind(bytes_of(lambda data: data[:4096]), "it has 4096 bytes, and its header says"),
    "a byte less": Kind(bytes_of(lambda data: data[:-1]), "and its header says"),
    "a byte more": Kind(bytes_of(lambda data: data + b"\0"), "and its header says"),
    "twice itself": Kind(bytes_of(lambda data: data + data), "and its header says"),
    "zeros": Kind(bytes_of(lambda data: bytes(len(data))), "it starts with"),
    "text": Kind(bytes_of(lambda data: b"hello\n" * 2000), "it starts with"),
    "an HDF5 file without header": Kind(bytes_of(lambda data: data[4096:]), "it starts with"),
    "a pointer of Git LFS": Kind(bytes_of(lambda data: LFS), "it is a pointer of Git LFS"),
    "a web page": Kind(bytes_of(lambda data: PAGE), "it is a web page"),
    "a flipped bit in the header": Kind(
        bytes_of(lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:]), "its header does not have the hash"
    ),
    "a flipped bit in the data": Kind(
        bytes_of(lambda data: data[:-99] + bytes([data[-99] ^ 1]) + data[-98:]), "its data do not have the hash"
    ),
    "no file": Kind(lambda record: record.shard_path(*PLACE).unlink(), "No such file|not there"),
    "a FIFO": Kind(victim(os.mkfifo), "not a regular file"),
    "a socket": Kind(victim(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)), "not a regular file"),
    "a directory": Kind(victim(Path.mkdir), "not a regular file"),
    "a link to a good shard": Kind(
        lambda record: victim(lambda path: path.symlink_to(shutil.copy(record.shard_path(0, 1, 3), record.path)))(
            record
        ),
        "a symbolic link",
    ),
    "a link to a device": Kind(victim(lambda path: path.symlink_to("/dev/zero")), "a symbolic link"),
    "a sparse file of a tebibyte": Kind(victim(lambda path: sparse(path, 1 << 40)), "it starts with"),
    "a tebibyte with a right header": Kind(claims_a_tebibyte, "its header says 1,099,511,627,776 bytes, more than"),
    "two shards that changed places": Kind(swapped, "which is not its name|header_sha256"),
    "a shard of another cache": Kind(of_another_cache, "belongs to the cache|header_sha256", foreign=True),
    "a header that is no JSON": Kind(bytes_of(lambda data: framed(b"{") + data[4096:]), "its header: it is not JSON"),
    "a header that is a list": Kind(bytes_of(lambda data: framed(b"[1]") + data[4096:]), "its header: it holds list"),
    "a header nested deep": Kind(bytes_of(lambda data: framed(b"[" * 4000) + data[4096:]), "nested too deep"),
    "a header of another format": Kind(header_with(format=99), "its format is 99, this version reads"),
    "a header with a word for a number": Kind(header_with(samples="3"), "its header says samples = '3'"),
    "a header with a negative count": Kind(header_with(tokens=-1), "its header says tokens = -1"),
    "a header with a field more": Kind(header_with(note=1), "fields that do not belong"),
    "counts that are not the manifest's": Kind(
        header_with(tokens=10**6), "its (header_sha256|tokens) is|its header says 1000000"
    ),
}

STRUCTURE: dict[str, Kind] = {
    "an image that is no HDF5": Kind(lambda record: reforge_image(record, b"x" * 5000), "it cannot be opened"),
    "an image cut short": Kind(
        lambda record: reforge_image(record, image(record, lambda file, values: plain(file, COLUMN, values))[:-800]),
        "cannot be (opened|read)",
    ),
    "an external link": Kind(
        hdf5(lambda file, values: file.__setitem__(COLUMN, h5py.ExternalLink("/etc/passwd", "/x"))), NOT_PLAIN
    ),
    "a soft link": Kind(hdf5(soft_link), NOT_PLAIN),
    "a link to itself": Kind(
        hdf5(lambda file, values: file.__setitem__(COLUMN, h5py.SoftLink(f"/{COLUMN}"))), NOT_PLAIN
    ),
    "a group": Kind(hdf5(lambda file, values: file.create_group(COLUMN)), NOT_PLAIN),
    "the root group under another name": Kind(
        hdf5(lambda file, values: file.__setitem__(COLUMN, file["/"])), NOT_PLAIN
    ),
    "a named type": Kind(hdf5(lambda file, values: file.__setitem__(COLUMN, np.dtype("<i8"))), NOT_PLAIN),
    "external storage": Kind(hdf5(external_storage), NOT_CHUNKED),
    "a virtual dataset": Kind(hdf5(virtual), NOT_CHUNKED),
    "no chunks": Kind(hdf5(lambda file, values: file.create_dataset(COLUMN, data=values)), NOT_CHUNKED),
    "huge chunks": Kind(
        hdf5(
            lambda file, values: file.create_dataset(
                COLUMN, shape=(2**30,), dtype="<i8", chunks=(2**28,), shuffle=True, compression="gzip"
            )
        ),
        NOT_CHUNKED,
    ),
    "narrower numbers": Kind(hdf5(lambda file, values: plain(file, COLUMN, values.astype("<i4"))), "is int32"),
    "unsigned numbers": Kind(hdf5(lambda file, values: plain(file, COLUMN, values.astype("<u8"))), "is uint64"),
    "the other byte order": Kind(hdf5(lambda file, values: plain(file, COLUMN, values.astype(">i8"))), "is >i8"),
    "floats": Kind(hdf5(lambda file, values: plain(file, COLUMN, values.astype("<f8"))), "is float64"),
    "text objects": Kind(
        hdf5(lambda file, values: file.create_dataset(COLUMN, data=["a"] * 3, dtype=h5py.string_dtype())), "is object"
    ),
    "ragged objects": Kind(hdf5(vlen), "is object"),
    "records": Kind(
        hdf5(lambda file, values: plain(file, COLUMN, values.view([("a", "<i4"), ("b", "<i4")]))), r"is \[\('a'"
    ),
    "two dimensions": Kind(
        hdf5(lambda file, values: plain(file, COLUMN, values[:, None], chunks=(3, 1))), r"is int64 \(3, 1\)"
    ),
    "a scalar": Kind(hdf5(lambda file, values: file.create_dataset(COLUMN, data=np.int64(3))), r"is int64 \(\)"),
    "nothing": Kind(
        hdf5(lambda file, values: file.create_dataset(COLUMN, dtype="<i8", data=h5py.Empty("<i8"))), f"column {COLUMN}"
    ),
    "no shuffle": Kind(hdf5(lambda file, values: plain(file, COLUMN, values, shuffle=False)), FILTERS),
    "no gzip": Kind(hdf5(lambda file, values: plain(file, COLUMN, values, compression=None)), FILTERS),
    "another compression": Kind(hdf5(lambda file, values: plain(file, COLUMN, values, compression="lzf")), FILTERS),
    "a filter more": Kind(hdf5(lambda file, values: plain(file, COLUMN, values, fletcher32=True)), FILTERS),
    "a filter that nobody knows": Kind(hdf5(unknown_filter), FILTERS),
    "a column less": Kind(hdf5(lambda file, values: None), NOT_PLAIN),
    "a column more": Kind(
        hdf5(and_also("more", lambda file, name: plain(file, name, np.zeros(3, "<i8")))),
        r"do not belong to it: \['more'",
    ),
    "a group more": Kind(hdf5(and_also("more", lambda file, name: file.create_group(name))), "do not belong to it"),
    "a huge shape": Kind(hdf5(huge(2**40)), "lacks chunks"),
    "a shape of 2 to the 60": Kind(hdf5(huge(2**60)), "lacks chunks"),
    "chunks that are not there": Kind(
        hdf5(
            lambda file, values: file.create_dataset(
                COLUMN, shape=(3,), dtype="<i8", chunks=(3,), shuffle=True, compression="gzip"
            )
        ),
        "lacks chunks",
    ),
    "a bomb that is declared": Kind(hdf5(bomb_of_many_chunks), "its columns claim 268,"),
    "a bomb that is not declared": Kind(chunked(bomb_in_one_chunk), NOT_EXACT),
    "a chunk too short": Kind(chunked(lambda values: zlib.compress(shuffled(values)[:-1])), NOT_EXACT),
    "a chunk too long": Kind(chunked(lambda values: zlib.compress(shuffled(values) + b"\0")), NOT_EXACT),
    "a chunk of nothing": Kind(chunked(lambda values: zlib.compress(b"")), NOT_EXACT),
    "a chunk cut short": Kind(chunked(lambda values: zlib.compress(shuffled(values))[:-3]), NOT_EXACT),
    "a chunk with a wrong checksum": Kind(
        chunked(lambda values: zlib.compress(shuffled(values))[:-4] + bytes(4)), "cannot be read at 0"
    ),
    "a chunk that is not compressed": Kind(chunked(shuffled), "cannot be read at 0"),
    "a chunk that says its filters are off": Kind(
        chunked(lambda values: zlib.compress(shuffled(values)), mask=3), NOT_EXACT
    ),
    "the columns of another length": Kind(cut(COLUMN), f"column {COLUMN} has 2 elements, expected 3"),
    "a value too many": Kind(longer("target_mask"), "column target_mask has 5 elements, expected 4"),
    "a count too few": Kind(cut("head_count"), "column head_count has"),
}

VALUES: dict[str, Kind] = {
    "a header with other tokens": Kind(lambda record: reforge(record, fields={"tokens": 25}), "25"),
    "a header with other positions": Kind(lambda record: reforge(record, fields={"positions": 23}), "23"),
    "a header with another first sample": Kind(first_sample_of_another, "its first_sample is 1, expected 0"),
    "a header with more samples without text": Kind(
        lambda record: reforge(record, fields={"empty": 3}), "its header says 3 empty samples", deep=True
    ),
    "a header with more cut samples": Kind(
        lambda record: reforge(record, fields={"truncated": 4}), "its header says 4 truncated samples", deep=True
    ),
    "a header with fewer rows without target": Kind(
        lambda record: reforge(record, fields={"untargeted": 0}), "its header says 0 rows without target", deep=True
    ),
    "a row that is longer than a row can be": Kind(
        rows_changed(lambda row: row, settings={"max_length": 16}), "and max_length (is|allows)"
    ),
    "a position left out where all logits were finite": Kind(
        rows_changed(without_a_target, fields={"nonfinite": 0}), "column target_mask leaves out positions"
    ),
    "more heads than can reach the threshold": Kind(
        rows_changed(with_targets(many_heads)), "column head_count: 21, and at most 20 ids reach the threshold"
    ),
    "a head less than k": Kind(
        rows_changed(with_targets(a_head_less), settings={"method": "top_k"}), "column head_count: not 3 ids"
    ),
    "a sample of another shard": Kind(value("sample_index", 1, 3), "sample_index does not hold the samples"),
    "a sample twice": Kind(value("sample_index", 1, 0), "sample_index does not hold the samples"),
    "samples in another order": Kind(
        lambda record: reforge(
            record, columns=lambda columns: columns.update(sample_index=columns["sample_index"][::-1].copy())
        ),
        "sample_index does not hold the samples",
    ),
    "a position without head": Kind(value("head_count", 3, 0), "head_count is 0|head_ids"),
    "a count that disagrees with the ids": Kind(value("head_count", 3, 2), "head_ids|top_values|rest_values|values"),
    "the largest counts": Kind(value("head_count", 3, 255), "head_ids|values"),
    "an input id that the tokenizer cannot make": Kind(
        rows_changed(with_ids([1, 49])), "column input_ids: id 49, but the tokenizer makes 48"
    ),
    "a head id that the tokenizer cannot make": Kind(
        rows_changed(with_targets(at("head_ids", 2, 48))), "column head_ids: id 48, but the tokenizer makes 48"
    ),
    "a tail id that the tokenizer cannot make": Kind(
        rows_changed(with_targets(at("tail_ids", 2, 49))), "column tail_ids: id 49, but the tokenizer makes 48"
    ),
    "head weights above the total": Kind(
        rows_changed(with_targets(lambda arrays: arrays["head_values"].__iadd__(TOTAL))), "more than the total"
    ),
    "tails that the weights leave no room for": Kind(
        rows_changed(with_targets(at("head_values", 0, TOTAL))), "tail_ids"
    ),
    "an id twice at a position": Kind(
        rows_changed(with_targets(head_twice)), "head_ids and tail_ids: id .* is twice", deep=True
    ),
    "draws that do not sum to N": Kind(
        rows_changed(with_targets(at("head_values", 0, 19)), settings={"method": "random"}), "21 draws at a position"
    ),
    "an id that was never drawn": Kind(
        rows_changed(with_targets(drawn_elsewhere), settings={"method": "random"}), "never drawn"
    ),
    "probabilities that sum to more than 1": Kind(
        rows_changed(
            with_targets(lambda arrays: arrays["head_values"].__setitem__(slice(0, 3), 100)),
            settings={"method": "top_k"},
        ),
        "sum to more than 1",
    ),
    "an entropy below 0": Kind(rows_changed(lambda row: replace(row, entropy=-1.0)), "column entropy"),
    "an entropy above that of a uniform distribution": Kind(
        rows_changed(lambda row: replace(row, entropy=1e6)), "column entropy"
    ),
    "a probability above 1": Kind(rows_changed(lambda row: replace(row, logprob=3.0)), "column logprob"),
    "a mask of all ones": Kind(all_bits, "column target_mask"),
    "a mask of zeros": Kind(value("target_mask", 0, 0), "column target_mask"),
}

KINDS = FILES | STRUCTURE | VALUES


def damaged(kind: str, good: Path, path: Path) -> Path:
    """Copy the cache `good` to `path`, damage it in one way, and return the path."""
    shutil.copytree(good, path)
    KINDS[kind].make(read_record(path))
    return path
