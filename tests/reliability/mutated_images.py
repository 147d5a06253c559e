"""A process that reads shards with mutated HDF5 images, hashes right: `mutated_images.py DIRECTORY SEED COUNT`.

It prints how many were refused and how many read, and the longest processor time of one. A crash inside HDF5 ends it.
"""

import hashlib
import json
import random
import resource
import sys
import time
from pathlib import Path

from accel_distill.errors import DamagedCache
from accel_distill.shard import FORMAT, HEADER_BYTES
from accel_distill.shard_checks import check_shard
from reliability.hostile import PLACE, framed, good_cache, header_fields

MEMORY = 3 << 30  # bytes of address space


def mutated(image: bytes, choice: random.Random) -> bytes:
    """Flip, overwrite or move some bytes, or cut the end."""
    data = bytearray(image)
    for _ in range(choice.choice([1, 1, 2, 4, 16])):
        at, width = choice.randrange(len(image) - 64), choice.choice([1, 2, 4, 8])
        aligned = at - at % width
        edges = (
            b"\xff" * width,
            bytes(width),
            b"\xff" * (width - 1) + b"\x7f",
            len(image).to_bytes(8, "little")[:width],
        )
        other = choice.randrange(len(image) - 64)
        change = choice.randrange(4)
        if change == 0:
            data[at] ^= 1 << choice.randrange(8)
        elif change == 1:
            data[aligned : aligned + width] = choice.choice(edges)
        elif change == 2:
            data[aligned : aligned + width] = choice.randbytes(width)
        else:
            data[at : at + 8 * width] = image[other : other + 8 * width]
    return bytes(data if choice.random() < 0.95 else data[: choice.randrange(len(data))])


def main(directory: Path, seed: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    record, choice = good_cache(directory), random.Random(seed)
    path = record.shard_path(*PLACE)
    image, fields = path.read_bytes()[HEADER_BYTES:], header_fields(path)
    refused, longest = 0, 0.0
    for _ in range(count):
        changed = mutated(image, choice)
        payload = {"payload_bytes": len(changed), "payload_sha256": hashlib.sha256(changed).hexdigest()}
        path.unlink()
        path.write_bytes(framed({"format": FORMAT, **fields, **payload}) + changed)
        begun = time.process_time()
        try:
            check_shard(record, PLACE, expected=None, deep=True)
        except DamagedCache:
            refused += 1
        longest = max(longest, time.process_time() - begun)
    print(json.dumps({"refused": refused, "read": count - refused, "longest": longest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
