"""How long a run that goes on takes to be back where it was, with and without a hint.

    python bench/resume.py [--samples 1000000]

Writes a local JSONL of so many samples of about 200 bytes, and a record of the shards that a cache of them would have
(no teacher is run: nothing is computed or tokenised for a sample that is there). Then it opens the stream anew and
walks to the last group, as `generate` does, and prints the seconds of both ways.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from accel_distill.config import DatasetConfig
from accel_distill.deal import Layout
from accel_distill.hints import NAME, Hint, read_hints, start_late
from accel_distill.manifest import make_directories
from accel_distill.stream import TextStream, Walk
from accel_distill.text_hash import TextHash

LAYOUT = Layout(lanes=8, samples_per_shard=1024)
WORDS = "the quick brown fox jumps over the lazy dog and " * 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        make_directories(place / "cache")
        config = DatasetConfig(
            name="json",
            data_files=[str(write(place / "data.jsonl", samples))],
            streaming=True,
            max_samples=samples,
            eval_samples=0,
        )
        committed = pass_once(config, place / "cache")
        size = (place / "data.jsonl").stat().st_size
        print(f"{samples:,} samples, {size / 1e6:.0f} MB of JSONL, {len(committed):,} shards there")
        with_hint = seconds_to_resume(config, place / "cache", committed)
        (place / "cache" / NAME).unlink()
        without = seconds_to_resume(config, place / "cache", committed)
        print(f"resume with a hint {with_hint:.2f} s, without {without:.2f} s")


def write(path: Path, samples: int) -> Path:
    """Write the texts."""
    with path.open("w") as file:
        for n in range(samples):
            file.write(json.dumps({"text": f"{n} {WORDS}"}) + "\n")
    return path


def pass_once(config: DatasetConfig, cache: Path) -> dict[tuple[int, int], tuple[int, str]]:
    """Read the stream once; leave a hint at each group, and return what is there when all whole groups are made."""
    committed: dict[tuple[int, int], tuple[int, str]] = {}
    hints = []
    reading = TextStream(config).read()
    for group in range((config.max_samples or 0) // LAYOUT.group_samples):
        hints.append(Hint(reading.index, reading.mark().state))
        hashes = [TextHash() for _ in range(LAYOUT.lanes)]
        for n in range(LAYOUT.group_samples):
            hashes[n % LAYOUT.lanes].add(next(reading))
        full = LAYOUT.samples_per_shard
        committed |= {(group, lane): (full, texts.hexdigest()) for lane, texts in enumerate(hashes)}
    (cache / NAME).write_text(json.dumps([hint.__dict__ for hint in hints[-64:]]))
    assert read_hints(cache)
    return committed


def seconds_to_resume(config: DatasetConfig, cache: Path, committed: dict[tuple[int, int], tuple[int, str]]) -> float:
    """Open the stream and walk to its first missing shard."""
    begun = time.perf_counter()
    stream = TextStream(config)
    reading = start_late(cache, committed, layout=LAYOUT, read=stream.read)
    walk = Walk(
        reading,
        layout=LAYOUT,
        max_samples=config.max_samples,
        committed=committed,
        rank=0,
        world_size=1,
        first_group=reading.index // LAYOUT.group_samples,
    )
    next(iter(walk))
    assert walk.total == config.max_samples
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
