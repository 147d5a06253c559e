"""Walks over, or makes a cache of, as many streamed samples as the argument says, and prints its peak memory in MB.

python generate_memory.py walk|generate SAMPLES DIRECTORY       the directory has teacher/ and data.jsonl
"""

import resource
import sys
from pathlib import Path

from tiny import run_config

from accel_distill.deal import Layout
from accel_distill.generate import generate
from accel_distill.stream import TextStream, Walk


def main(what: str, samples: int, place: Path) -> None:
    """Do it and print."""
    dataset = {"max_samples": samples, "max_length": 16}
    config = run_config(
        place / "teacher",
        place / "data.jsonl",
        place / f"cache-{samples}",
        teacher={"tokens_per_batch": 4096, "head_chunk": 256},
        dataset=dataset,
        cache={"samples_per_shard": 500, "lanes": 2},
    )
    if what == "generate":
        seen = generate(config)["samples"]
    else:
        walk = Walk(
            iter(TextStream(config.dataset)),
            layout=Layout(2, 500),
            max_samples=samples,
            committed={},
            rank=0,
            world_size=2,
        )
        shards = sum(len(shard.texts) for shard in walk)
        assert shards == samples // 2
        seen = walk.total
    assert seen == samples
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
