"""Everything that can be known to be wrong with one shard without its texts and its teacher.

The one decision: a shard is checked against the record of its cache and against itself, never against another shard, in
ranges of rows that fit the memory whatever the file's size. It costs a sort of the ids of each position.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from accel_distill.codec import LOGPROB_STEPS, Arrays, offsets
from accel_distill.errors import DamagedCache
from accel_distill.manifest import Record, checked_header, manifest_entry
from accel_distill.rows import RowReader, Rows
from accel_distill.shard import ShardHeader

ENTRIES_AT_ONCE = 1 << 19  # head and tail ids, and positions: some 100 MB of arrays
ROWS_AT_ONCE = 4096
TOLERANCE = 1e-3  # nats a position, and of a sum of probabilities: what rounding to steps can make


def check_shard(
    record: Record, place: tuple[int, int, int], *, expected: dict[str, Any] | None, deep: bool
) -> tuple[ShardHeader, dict[str, int]]:
    """Check the shard of a place; return its header and its numbers of tokens, positions, heads and tails.

    `expected` is what the manifest says of it, None without one; `deep` decodes all of it. Raises DamagedCache, and
    CacheMismatch for a shard of another cache.
    """
    path = record.shard_path(*place)
    header = checked_header(record, path, place)
    if expected is not None and (found := manifest_entry(path.name, header)) != expected:
        key = next(key for key in found if found[key] != expected[key])
        raise DamagedCache(
            f"shard {path}: its {key} is {found[key]!r}, but manifest.json says {expected[key]!r}; delete this file "
            "and run generate again"
        )
    reader = RowReader(path, method=record.method, parameter=record.parameter, ids_by_rank=record.ids_by_rank)
    try:
        _check_whole(record, reader)
        for first, last in row_ranges(reader) if deep else ():
            rows = reader.read(first, last)
            with reader.damaged_by(f"rows {first} to {last - 1}: "):
                check_rows(record, rows, every_position=not header.nonfinite, distinct=True)
        return header, reader.totals()
    finally:
        reader.close()


def row_ranges(reader: RowReader) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of ranges of rows that are decoded at once; a range has at least one row."""
    totals, positions = reader.totals(), offsets(reader.row_positions)
    a_position = 1 + (totals["heads"] + totals["tails"]) / max(totals["positions"], 1)
    most = max(1, int(ENTRIES_AT_ONCE / a_position))
    first = 0
    while first < len(reader):
        fitting = int(np.searchsorted(positions, positions[first] + most, side="right")) - 1
        last = min(max(fitting, first + 1), first + ROWS_AT_ONCE, len(reader))
        yield first, last
        first = last


def check_rows(record: Record, rows: Rows, *, every_position: bool, distinct: bool) -> None:
    """Raise ValueError, naming the column, where rows say what a teacher cannot have said.

    `every_position`: each token but a row's last carries a target, as it does where no logit was not finite.
    `distinct`: see also that no position names an id twice, which takes longer than all the rest.
    """
    lengths, positions = np.diff(rows.tokens), np.diff(rows.positions)
    ids_there_are = min(record.vocab_size, record.identity["tokenizer"]["size"])
    longest = record.identity["sequence"]["max_length"]
    if lengths.max(initial=0) > longest:
        raise ValueError(f"a row has {lengths.max()} tokens, and max_length is {longest}")
    _check_ids(rows.input_ids, "input_ids", below=ids_there_are)
    if every_position and not np.array_equal(positions, np.maximum(lengths - 1, 0)):
        raise ValueError("column target_mask leaves out positions, and its header says that all logits were finite")
    for name in ("head_ids", "tail_ids"):
        _check_ids(rows.targets[name], name, below=ids_there_are)
    if distinct:
        _check_distinct(rows.targets, ids=record.vocab_size)
    _CHECKS[record.method](rows.targets, record.parameter, ids_there_are)
    largest = positions * (np.log(ids_there_are) + TOLERANCE) + TOLERANCE * 10
    if ((rows.entropy < 0) | (rows.entropy > largest)).any():
        raise ValueError("column entropy holds what no distribution has: below 0, or above that of a uniform one")
    if (rows.logprob > TOLERANCE * 10).any() or (rows.logprob[positions == 0] != 0).any():
        raise ValueError("column logprob holds what no probability has: above 0, or of a row without targets")


def check_dealing(record: Record, header: ShardHeader, sample_index: np.ndarray) -> None:
    """Raise ValueError where a shard has not the samples that are dealt to it, each once, or in pieces, in order."""
    layout, split = record.layout, record.identity["sequence"]["long_documents"] == "split"
    if header.lane >= layout.lanes or not 1 <= header.samples <= layout.samples_per_shard:
        raise ValueError(f"it says lane {header.lane} and {header.samples} samples, and the layout is {layout}")
    first = layout.first_sample(header.group, header.lane)
    if header.first_sample != first:
        raise ValueError(f"its first_sample is {header.first_sample}, expected {first}")
    if not split and len(sample_index) != header.samples:
        raise ValueError(f"it has {len(sample_index)} rows for {header.samples} samples, and none is split")
    is_new = np.diff(sample_index, prepend=sample_index[:1] - 1) != 0
    if not np.array_equal(sample_index[is_new], first + layout.lanes * np.arange(header.samples)):
        raise ValueError("column sample_index does not hold the samples that are dealt to it, in order")


def _check_whole(record: Record, reader: RowReader) -> None:
    """Check what can be known of a shard without decoding its rows."""
    header, positions = reader.header, reader.row_positions
    longest, untargeted = record.identity["sequence"]["max_length"] - 1, int((positions == 0).sum())
    with reader.damaged_by():
        check_dealing(record, header, reader.sample_index)
        if positions.max(initial=0) > longest:
            raise ValueError(f"a row has {positions.max()} positions, and max_length allows {longest}")
        if header.untargeted != untargeted:
            raise ValueError(f"its header says {header.untargeted} rows without target, and it has {untargeted}")
        for name, most in (("empty", untargeted), ("truncated", header.samples)):
            if (found := getattr(header, name)) > most:
                raise ValueError(f"its header says {found} {name} samples, and at most {most} can be")


def _check_ids(ids: np.ndarray, name: str, *, below: int) -> None:
    if len(ids) and (ids.max() >= below or ids.min() < 0):
        raise ValueError(f"column {name}: id {int(ids.max())}, but the tokenizer makes {below} ids only")


def _check_distinct(targets: Arrays, *, ids: int) -> None:
    """Check that a position names no id twice."""
    counts = (targets["head_count"], targets["tail_count"])
    position = np.concatenate([np.repeat(np.arange(len(count)), count) for count in counts])
    keys = np.sort(position * ids + np.concatenate([targets["head_ids"], targets["tail_ids"]]))
    if (keys[1:] == keys[:-1]).any():
        twice = int(keys[1:][keys[1:] == keys[:-1]][0])
        raise ValueError(f"columns head_ids and tail_ids: id {twice % ids} is twice at a position")


def _check_threshold(targets: Arrays, parameter: float, ids: int) -> None:
    most = max(1, int(1 / (parameter * (1 - TOLERANCE))))
    if targets["head_count"].max(initial=0) > most:
        raise ValueError(
            f"column head_count: {targets['head_count'].max()}, and at most {most} ids reach the threshold"
        )


def _check_top_k(targets: Arrays, parameter: float, ids: int) -> None:
    if (targets["head_count"] != min(int(parameter), ids)).any():
        raise ValueError(f"column head_count: not {min(int(parameter), ids)} ids at each position")
    values = targets["head_values"].reshape(len(targets["head_count"]), min(int(parameter), ids))
    if (np.exp(values / -LOGPROB_STEPS).sum(axis=1) > 1 + TOLERANCE).any():
        raise ValueError("column head_values: probabilities that sum to more than 1")


def _check_random(targets: Arrays, parameter: float, ids: int) -> None:
    if targets["tail_values"].min(initial=1) < 1:
        raise ValueError("column tail_values: an id that was never drawn")
    drawn = np.zeros(len(targets["head_count"]), np.int64)
    for name in ("head", "tail"):
        ends = offsets(targets[f"{name}_count"])
        drawn += np.diff(offsets(targets[f"{name}_values"])[ends])
    if (drawn != int(parameter)).any():
        wrong = int(drawn[drawn != int(parameter)][0])
        raise ValueError(f"columns head_values and tail_values: {wrong} draws at a position, expected {int(parameter)}")


_CHECKS = {"threshold": _check_threshold, "top_k": _check_top_k, "random": _check_random}
