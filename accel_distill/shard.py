"""One shard of a cache: a 4096-byte header and an HDF5 image behind it; writer and reader side by side.

The one decision: HDF5 is the container, not the writer. The image is built in memory, the chunks are compressed and
inflated here (a bounded inflate, outside the interpreter's lock), and a file is opened only when its header and the
hash of its image are right. It costs a hash of the file (about 1 GB/s) on first use in a process.

    bytes 0-7 magic, 8-11 length of the JSON (u32 little-endian), the JSON, zeros, 4064-4095 sha256 of bytes 0-4063
    bytes 4096-  the HDF5 image: one-dimensional little-endian integers, chunked, byte shuffle + gzip

HDF5 tools skip the header (they look for their signature at 0, 512, 1024, 2048, 4096).
"""

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from accel_distill.errors import DamagedCache, RunError
from accel_distill.regular_file import MEBIBYTE, open_regular, parse_json_object

MAGIC = b"ADSHARD1"
FORMAT = 2
HEADER_BYTES = 4096
HASHED_BYTES = HEADER_BYTES - 32
CHUNK = 16_384  # elements; with 4 Ki a position takes 2 % more bytes, as each chunk has Huffman tables of its own
GZIP_LEVEL = 6
GZIP_MEMORY = 9  # of zlib: with less, it begins new Huffman tables inside a chunk
LARGEST_IMAGE = 1 << 34  # bytes: whoever opens a shard reads all of it once
LEAST_CHUNK_BYTES = 8  # of a zlib stream: a column that claims more chunks than the file has room for is not counted
# A shard's columns are this many bytes at most for its size: zlib makes a thousand zeros one byte, and a bomb of them.
MOST_INFLATED = 64
ALWAYS_ALLOWED = 8 * MEBIBYTE  # however small the shard: of empty texts nothing is left but zeros
LIBVER = ("v110", "v110")  # 9 kB of metadata a shard; h5py's default spends 27 to 42 kB

_verified: set[tuple[int, int, int, int]] = set()  # (device, inode, size, mtime in ns) of images hashed in this process


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself; counts are of the whole shard."""

    format: int
    cache_id: str
    group: int
    lane: int
    first_sample: int  # index in the stream; the lane's next samples follow at a distance of `lanes`
    samples: int  # of the stream
    sequences: int  # rows of the per-sequence columns; more than samples where long documents are split
    tokens: int
    positions: int  # that carry a target
    empty: int  # samples without text
    truncated: int  # samples cut at max_length
    untargeted: int  # sequences without any target
    nonfinite: int  # positions left out because a logit was not finite
    texts_sha256: str
    payload_bytes: int
    payload_sha256: str
    numerics: str = ""  # JSON of the numeric settings that were not those of cache.json; left out where they were


def shard_bytes(fields_: Mapping[str, object], columns: Mapping[str, np.ndarray]) -> bytes:
    """Return a whole shard file: `fields_` are those of `ShardHeader` but format and payload.

    Raises RunError where the columns compress so well that a reader takes the file for a bomb.
    """
    image = _image(columns)
    _refuse_unreadable(sum(values.nbytes for values in columns.values()), len(image))
    payload = {"payload_bytes": len(image), "payload_sha256": hashlib.sha256(image).hexdigest()}
    header = ShardHeader(**{"format": FORMAT, **fields_, **payload})  # type: ignore[arg-type]
    return _front(header) + image


def _refuse_unreadable(inflated: int, stored: int) -> None:
    if stored > LARGEST_IMAGE:
        raise RunError(f"a shard takes {stored:,} bytes, more than {LARGEST_IMAGE:,}; lower cache.samples_per_shard")
    if inflated > most_inflated(stored):
        raise RunError(
            f"a shard's {inflated:,} bytes of columns compress to {stored:,}, which readers take for a bomb: the "
            "texts are all alike; lower cache.samples_per_shard"
        )


def most_inflated(stored: int) -> int:
    """Return how many bytes the columns of a shard may have whose image takes `stored` bytes."""
    return ALWAYS_ALLOWED + MOST_INFLATED * stored


def header_sha256(header: ShardHeader) -> str:
    """Return the sha256 of a shard's header; as the header holds the hash of the rest, it stands for the whole file."""
    return hashlib.sha256(_front(header)).hexdigest()


def read_header(path: Path) -> ShardHeader:
    """Read and check a shard's header and the file's size; raise DamagedCache naming what is wrong."""
    descriptor = _open(path)
    try:
        return _checked_header(path, os.pread(descriptor, HEADER_BYTES, 0), os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


class ShardFile:
    """A shard opened for reading: checked, then read a range of a column at a time."""

    def __init__(self, path: Path, *, dtypes: Mapping[str, np.dtype], keep_chunks: bool = False) -> None:
        """Open `path` and check it against its header and the columns that it must have.

        With `keep_chunks` what was inflated stays in memory until `close`: for a reader of small ranges everywhere.
        """
        self.path = path
        self._kept: dict[tuple[str, int], np.ndarray] | None = {} if keep_chunks else None
        self.header = _verify_image(path)
        with _hdf5(path, "it cannot be opened"):
            self._file = h5py.File(path, "r", locking=False)
        try:
            with _hdf5(path, "its columns cannot be read"):
                self._columns = {name: self._checked_column(name, dtype) for name, dtype in dtypes.items()}
                # asking h5py takes 20 microseconds, and a row is read from ten columns
                self._sizes = {name: (column.shape[0], column.chunks[0]) for name, column in self._columns.items()}
                extra = sorted(set(self._file) - set(dtypes))
            if extra:
                raise _damaged(path, f"it has columns that do not belong to it: {extra[:10]}")
            inflated = sum(column.shape[0] * column.dtype.itemsize for column in self._columns.values())
            if inflated > (most := most_inflated(self.header.payload_bytes)):
                raise _damaged(path, f"its columns claim {inflated:,} bytes, expected at most {most:,} for its size")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def length(self, name: str) -> int:
        """Return the number of elements of a column."""
        return self._sizes[name][0]

    def stored_bytes(self, name: str) -> int:
        """Return how many bytes a column's chunks take in the file, compressed."""
        return self._columns[name].id.get_storage_size()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return elements `start` to `stop` of a column, inflating only the chunks that hold them."""
        length, chunk = self._sizes[name]
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise _damaged(self.path, f"column {name} has {length} elements, and {start}:{stop} is asked for")
        if start == stop:
            return np.zeros(0, self._columns[name].dtype)
        first = start // chunk * chunk
        parts = [self._chunk(name, at) for at in range(first, stop, chunk)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[start - first : stop - first]

    def _chunk(self, name: str, at: int) -> np.ndarray:
        if self._kept is None:
            return self._inflate(name, at)
        if (name, at) not in self._kept:
            self._kept[name, at] = self._inflate(name, at)
        return self._kept[name, at]

    def _inflate(self, name: str, at: int) -> np.ndarray:
        """Return one chunk, never inflating more than its declared size."""
        column = self._columns[name]
        size = column.chunks[0] * column.dtype.itemsize
        with _hdf5(self.path, f"column {name} cannot be read at {at}"):
            mask, raw = column.id.read_direct_chunk((at,))
            inflater = zlib.decompressobj()
            data = inflater.decompress(raw, size + 1)
        if mask or len(data) != size or not inflater.eof:
            raise _damaged(self.path, f"column {name}: the chunk at {at} does not hold exactly {size} bytes")
        shuffled = np.frombuffer(data, np.uint8).reshape(column.dtype.itemsize, -1)
        return np.ascontiguousarray(shuffled.T).view(column.dtype)[:, 0]

    def _checked_column(self, name: str, dtype: np.dtype) -> h5py.Dataset:
        link = self._file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(self._file[name], h5py.Dataset):
            raise _damaged(self.path, f"column {name} is not there as a plain dataset (found {type(link).__name__})")
        column = self._file[name]
        settings = column.id.get_create_plist()
        found = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
        if column.ndim != 1 or column.dtype != dtype:
            raise _damaged(self.path, f"column {name} is {column.dtype} {column.shape}, expected {dtype}, 1-D")
        if settings.get_layout() != h5py.h5d.CHUNKED or column.chunks[0] > CHUNK:
            raise _damaged(self.path, f"column {name} is not stored in chunks of at most {CHUNK} elements")
        chunks = -(-column.shape[0] // column.chunks[0])
        if chunks * LEAST_CHUNK_BYTES > self.header.payload_bytes or column.id.get_num_chunks() != chunks:
            raise _damaged(self.path, f"column {name} lacks chunks of its {column.shape[0]} elements")
        if found != [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]:
            raise _damaged(self.path, f"column {name} has the filters {found}, expected shuffle and gzip")
        return column


def _front(header: ShardHeader) -> bytes:
    """Return the 4096 bytes of a header."""
    said = {name: value for name, value in asdict(header).items() if name != "numerics" or value}
    text = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > HASHED_BYTES - 12:
        raise RunError(
            f"a shard's header has no room for {len(text):,} bytes; is teacher.attn_implementation that long?"
        )
    front = (MAGIC + len(text).to_bytes(4, "little") + text).ljust(HASHED_BYTES, b"\0")
    return front + hashlib.sha256(front).digest()


def _image(columns: Mapping[str, np.ndarray]) -> bytes:
    """Build the HDF5 image in memory; the same columns give the same bytes."""
    name = uuid.uuid4().hex  # of no file: HDF5 only refuses to have one name open twice in a process
    with h5py.File(name, "w", driver="core", backing_store=False, libver=LIBVER) as file:
        for name, values in columns.items():
            _add_column(file, name, values)
        file.flush()
        return file.id.get_file_image()


def _add_column(file: h5py.File, name: str, values: np.ndarray) -> None:
    chunk = min(CHUNK, max(1, len(values)))
    column = file.create_dataset(
        name,
        shape=values.shape,
        maxshape=values.shape if len(values) else (None,),
        dtype=values.dtype,
        chunks=(chunk,),
        shuffle=True,
        compression="gzip",
        compression_opts=GZIP_LEVEL,
    )
    for start in range(0, len(values), chunk):
        part = np.zeros(chunk, values.dtype)
        part[: len(values) - start] = values[start : start + chunk]
        shuffled = part.view(np.uint8).reshape(chunk, -1).T.tobytes()
        column.id.write_direct_chunk((start,), _gzip(shuffled))


def _gzip(data: bytes) -> bytes:
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, GZIP_MEMORY)
    return compressor.compress(data) + compressor.flush()


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        raise _damaged(path, f"it cannot be opened ({error.strerror})") from error


def _checked_header(path: Path, front: bytes, size: int) -> ShardHeader:
    if foreign := _foreign(front):
        raise _damaged(path, foreign)
    if len(front) < HEADER_BYTES:
        raise _damaged(path, f"it has {size} bytes, less than its header's {HEADER_BYTES}")
    if front[:8] != MAGIC:
        raise _damaged(path, f"it starts with {front[:8]!r}, expected {MAGIC!r}")
    if hashlib.sha256(front[:HASHED_BYTES]).digest() != front[HASHED_BYTES:]:
        raise _damaged(path, "its header does not have the hash that it says")
    length = int.from_bytes(front[8:12], "little")
    try:
        header = parse_json_object(front[12 : 12 + length])
    except ValueError as error:
        raise _damaged(path, f"its header: {error}") from error
    if type(found := header.get("format")) is not int or found != FORMAT:
        raise _damaged(path, f"its format is {found!r}, this version reads {FORMAT}")
    known = {"numerics": "", **header}
    for field in fields(ShardHeader):
        value = known.get(field.name)
        if type(value) is not field.type or (isinstance(value, int) and value < 0):
            raise _damaged(path, f"its header says {field.name} = {value!r:.100}")
    if set(known) != {field.name for field in fields(ShardHeader)}:
        raise _damaged(path, "its header has fields that do not belong to it")
    try:
        parse_json_object(known["numerics"].encode() or b"{}")
    except ValueError as error:
        raise _damaged(path, f"its header's numerics: {error}") from error
    if header["payload_bytes"] > LARGEST_IMAGE:
        raise _damaged(path, f"its header says {header['payload_bytes']:,} bytes, more than {LARGEST_IMAGE:,}")
    if size != HEADER_BYTES + header["payload_bytes"]:
        expected = HEADER_BYTES + header["payload_bytes"]
        raise _damaged(path, f"it has {size} bytes, and its header says {expected}")
    return ShardHeader(**header)


def _foreign(front: bytes) -> str | None:
    """Say what a file is that was put in a shard's place by a download that went wrong."""
    if front.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the file, which `git lfs pull` fetches"
    if front.lstrip()[:1] == b"<":
        return "it is a web page, not a shard"
    return None


def _sha256_of_rest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(MEBIBYTE):
        digest.update(block)
    return digest.hexdigest()


def _verify_image(path: Path) -> ShardHeader:
    """Check header and hash of the image, the hash once a process as long as the file does not change."""
    descriptor = _open(path)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        header = _checked_header(path, file.read(HEADER_BYTES), status.st_size)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in _verified:
            if _sha256_of_rest(file) != header.payload_sha256:
                raise _damaged(path, "its data do not have the hash that its header says")
            _verified.add(key)
    return header


@contextlib.contextmanager
def _hdf5(path: Path, what: str) -> Iterator[None]:
    """Turn all that h5py raises where HDF5 or zlib cannot make sense of a file into DamagedCache."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, zlib.error) as error:
        raise _damaged(path, f"{what} ({error})") from error


def _damaged(path: Path, what: str) -> DamagedCache:
    return DamagedCache(f"shard {path}: {what}; delete this file and run generate again, which makes just it anew")
