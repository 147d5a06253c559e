"""`accel-distill estimate --config run.yaml`: what the run's cache will take, measured on some of its samples.

The one decision: lengths and bytes are measured apart. Lengths differ most and cost only the tokenizer, so thousands
are counted; the teacher sees 64 of these. Every figure comes with the interval that such a sample leaves
(projection.py), and whatever is assumed is printed.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from accel_distill.codec import Method
from accel_distill.command_line import OneSentenceParser
from accel_distill.config import RunConfig, load_config
from accel_distill.disk_space import Room
from accel_distill.errors import DoesNotFit, exit_with
from accel_distill.estimate_table import as_text
from accel_distill.figures import number_of
from accel_distill.identity import RANKED_TOKENS
from accel_distill.probe import Probe, padding, run_probe
from accel_distill.projection import (
    Interval,
    ShardBytes,
    most_samples,
    product,
    shard_count,
    speed_up,
    verdict,
)
from accel_distill.run_plan import ALTERNATIVES, Plan, from_curves, open_plan, samples_there, too_large
from accel_distill.screen import terminal_width
from accel_distill.teacher_mode import refuse_without_cache

log = logging.getLogger("accel_distill.estimate")

COUNTED = 4096  # samples that are tokenised
PROBED = 64  # of these, that the teacher sees
READ_FOR = 20.0  # seconds of reading a stream, and as many of tokenising
NOT_SEEN = 0.02  # of the bytes: what a probe cannot see, as that a full shard has fuller tables
IN_HAND = 16  # times a shard's targets in memory, while one is made and one is encoded; measured: 15
A_STUDENT = 100_000  # positions a second, to say what reading a cache takes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""

    def run() -> int:
        arguments = parse_arguments(argv)
        config = load_config(arguments.config, arguments.overrides)
        _set_up_logging()
        found = estimate(
            config,
            probe=None if arguments.no_teacher else arguments.probe,
            processes=arguments.processes,
            positions_per_second=arguments.positions_per_second,
        )
        print(
            json.dumps(found, indent=1) if arguments.json else as_text(found, width=terminal_width(sys.stdout)),
            flush=True,
        )
        if found["advice"]:
            raise DoesNotFit(found["advice"])
        return 0

    return exit_with(run)


def estimate(
    config: RunConfig, *, probe: int | None, processes: int, positions_per_second: float | None = None
) -> dict[str, Any]:
    """Return what the run will take; `probe` samples go through the teacher, with None it is not loaded.

    `positions_per_second` of all processes replaces the measured speed. Raises the RunErrors of errors.py.
    """
    refuse_without_cache(config.teacher.mode, "estimate")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.info("counting the lengths of at most %s samples", f"{COUNTED:,}")
    plan = open_plan(config, processes=processes, counted=COUNTED, seconds=READ_FOR)
    measured: Probe | None = None
    if probe is None:
        shard, others = from_curves(config)
    else:
        log.info("%s of %s samples through the teacher on %s", probe, f"{len(plan.lengths.texts):,}", device.type)
        measured = run_probe(
            config, plan.lengths, tokenizer=plan.tokenizer, wanted=probe, others=ALTERNATIVES, device=device
        )
        each = measured.shard.per_position.within(NOT_SEEN)
        shard, others = ShardBytes(measured.shard.fixed, each), {k: each.times(v) for k, v in measured.others.items()}
    seconds = _seconds(plan, measured, positions_per_second, config=config, device=device)
    positions = plan.positions.mid * plan.lengths.population
    return {
        "teacher": config.teacher.model,
        "method": config.targets.method,
        "parameter": config.targets.parameter,
        "processes": processes,
        **_samples(plan, measured),
        **_disk(plan, shard, path=config.cache.path),
        "seconds": asdict(seconds) if seconds else None,
        "positions_per_second": positions / seconds.mid if seconds and seconds.mid else None,
        "host_bytes_per_process": round(_host_bytes(plan, measured)) if measured else None,
        "device_bytes": measured.device_bytes if measured else None,
        "device": measured.device if measured else None,
        "alternatives": _alternatives(plan, shard, others),
        "assumptions": _assumptions(
            plan, measured, positions_per_second, device=device, parallelism=config.teacher.parallelism
        ),
    }


def _samples(plan: Plan, probe: Probe | None) -> dict[str, Any]:
    """Return how much text there is, and of how much of it that is known."""
    lengths = plan.lengths
    return {
        "samples": lengths.population,
        "tokens": round(plan.tokens.mid * lengths.population),
        "positions": round(plan.positions.mid * lengths.population),
        "tokens_per_sample": asdict(plan.tokens),
        "counted_samples": len(lengths.texts),
        "read_samples": lengths.read,
        "probed_samples": probe.samples if probe else 0,
        "probed_positions": probe.positions if probe else 0,
    }


def _disk(plan: Plan, shard: ShardBytes, *, path: Path) -> dict[str, Any]:
    """Return what the cache takes on its disk, and whether it fits."""
    samples, room = plan.lengths.population, plan.space.room()
    total = plan.total(samples, shard)
    needed = total.plus(-room.used)
    answer = verdict(needed, room.left)
    largest = None
    if answer == "does not fit" and room.left is not None:
        largest = most_samples(lambda n: plan.total(n, shard), there=room.used, room=room.left)
        largest = largest if largest > samples_there(path) else None  # a cache does not shrink
    each = _per_position(plan, total)
    return {
        "bytes_per_position": each,
        "variable_bytes_per_position": asdict(shard.per_position),
        "bytes_per_shard": shard.fixed,
        "shards": shard_count(plan.layout, samples),
        "total_bytes": _rounded(total),
        "cache_bytes_now": room.used,
        "free_bytes": room.free,
        "free_bytes_after": None if room.free is None else round(room.free - max(0.0, needed.mid)),
        "reserve_bytes": room.reserve,
        "max_bytes": room.max_bytes,
        "room_bytes": room.left,
        "verdict": answer,
        "advice": too_large(path, needed.mid, room, what="about") if answer == "does not fit" else None,
        "largest_max_samples": largest,
        "training_bytes_per_second": None if each is None else {f"{A_STUDENT}_positions_per_second": each * A_STUDENT},
    }


def _rounded(interval: Interval) -> dict[str, int]:
    """Return the ends of an interval as whole numbers."""
    return {name: round(end) for name, end in asdict(interval).items()}


def _alternatives(
    plan: Plan, shard: ShardBytes, others: Mapping[tuple[Method, float], Interval]
) -> list[dict[str, Any]]:
    """Return what the same run takes with other targets."""
    room: Room = plan.space.room()
    found = []
    for (method, parameter), each in others.items():
        total = plan.total(plan.lengths.population, ShardBytes(shard.fixed, each))
        found.append(
            {
                "method": method,
                "parameter": parameter,
                "bytes_per_position": _per_position(plan, total),
                "total_bytes": _rounded(total),
                "verdict": verdict(total.plus(-room.used), room.left),
            }
        )
    return found


def _per_position(plan: Plan, total: Interval) -> float | None:
    """Return the bytes of the shards for each position, as `inspect` says them of a cache that is there."""
    positions = plan.positions.mid * plan.lengths.population
    return (total.mid - plan.beside_shards(plan.lengths.population)) / positions if positions else None


def _seconds(
    plan: Plan, probe: Probe | None, rate: float | None, *, config: RunConfig, device: torch.device
) -> Interval | None:
    """Return the seconds of the run; None: nothing is known of the teacher's speed."""
    lengths, samples = plan.lengths, plan.lengths.population
    positions = plan.positions.times(samples)
    ranking = lengths.seconds_per_token * min(RANKED_TOKENS, plan.tokens.mid * samples)
    alone = ranking + lengths.seconds_per_sample * samples + (probe.load_seconds if probe else 0.0)
    if rate is not None:
        return positions.times(1 / rate).plus(alone)
    if probe is None:
        return None
    batches = padding(
        lengths,
        samples_per_shard=plan.layout.samples_per_shard,
        tokens_per_batch=config.teacher.tokens_per_batch,
    )
    each = probe.seconds_per_padded_token.times(batches)
    if device.type == "cpu":  # on an accelerator the writer's thread encodes beside it
        each = each.plus(probe.encode_seconds)
    return product(positions, each).times(1 / _speed_up(plan, device)).plus(alone)


def _set_up_logging() -> None:
    """Say on standard error what is done, and keep the libraries' own bars away."""
    import datasets
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _speed_up(plan: Plan, device: torch.device) -> float:
    """Return how much faster the run's processes are than the one that was measured."""
    if device.type != "cpu":
        return float(plan.processes)
    return speed_up(plan.processes, cores=os.cpu_count() or 1, threads=torch.get_num_threads())


def _host_bytes(plan: Plan, probe: Probe) -> float:
    """Return the most memory of one process: what the probe took, the texts of its open shards, and shards in hand."""
    layout, each = plan.layout, plan.layout.samples_per_shard
    texts = (
        math.ceil(layout.lanes / plan.processes) * min(each * 1.0, plan.lengths.population) * plan.lengths.text_bytes
    )
    positions = min(each, plan.lengths.population) * plan.positions.mid
    return probe.host_bytes + texts + IN_HAND * probe.target_bytes * positions


def _assumptions(
    plan: Plan, probe: Probe | None, rate: float | None, *, device: torch.device, parallelism: str
) -> list[str]:
    """Return what the figures rest on, in sentences."""
    lengths, processes = plan.lengths, number_of(plan.processes, "process")
    said = []
    if lengths.read < lengths.population:
        said.append(
            f"only the first {lengths.read:,} samples of the stream could be read in the time, and their lengths are "
            "taken for all; that the stream has as many samples as dataset.max_samples is not known either"
        )
    if probe is None:
        said.append("bytes a position are those of two other teachers (byte_curves.py), and lie between for most")
    if rate is not None:
        said.append(f"the speed is given: {rate:,.0f} positions a second in all")
    elif probe is None:
        said.append("the time is not known without the teacher; --positions-per-second says how fast it is")
    elif device.type == "cpu":
        said.append(
            f"{processes} on the {number_of(os.cpu_count() or 1, 'core')} of this machine, which they share, against "
            f"the one of {number_of(torch.get_num_threads(), 'thread')} that was measured: "
            f"{_speed_up(plan, device):g} times as fast"
        )
    else:
        said.append(f"{processes}, each on a device of its own like this one ({probe.device})")
    if probe is not None and parallelism != "replicate":
        said.append(
            f"teacher.parallelism is {parallelism}: one process measured it over all devices of this machine, and the "
            "memory of a device is that of the first; what processes that share a teacher send each other is not there"
        )
    if plan.space.room().used:
        said.append("bytes and time are those of the whole cache, also of what is there already")
    if rate is None and probe is not None:
        said.append("the machine stays as busy as it is now")
    return said


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command was given; raise ConfigError for what it does not know."""
    parser = OneSentenceParser(
        prog="accel-distill estimate",
        allow_abbrev=False,
        description="Say what a run's cache will take on the disk, and how long making it: measured on some samples.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run file (YAML)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--probe", type=int, default=PROBED, metavar="N", help="samples for the teacher (64)")
    parser.add_argument("--processes", type=int, default=1, metavar="W", help="of the run, on this machine (1)")
    parser.add_argument("--no-teacher", action="store_true", help="count lengths only; bytes from stored curves")
    parser.add_argument("--positions-per-second", type=float, metavar="Y", help="of all processes, where it is known")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces one value of the run file")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None:
        parser.error("--config FILE is missing")
    for name in ("probe", "processes", "positions_per_second"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected more than 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
