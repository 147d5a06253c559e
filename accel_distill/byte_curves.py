"""Bytes a position by method and parameter, as measured with two teachers, for when none can be run.

The one decision: one teacher is sure of its text (1.4 nats, a small vocabulary), the other is not (4.7 nats); a large
model on web text lies between (the file of targets of a large vocabulary: 12.9 at 0.06). So the middle is their
geometric mean, and the ends are outside of both. It costs a factor of 2 to 5 between low and high.
"""

import math

from accel_distill.codec import Method
from accel_distill.projection import Interval

# python bench/targets.py --teacher ../shared/data/models/stories260K --text ../shared/data/text/tinystories_valid.jsonl
# python bench/targets.py --teacher DEMO/teacher --text DEMO/documents.jsonl      (DEMO of `accel-distill demo`)
# parameter: (bytes + input of the first, of the second)
CURVES: dict[Method, dict[float, tuple[float, float]]] = {
    "threshold": {
        0.12: (4.37, 9.11),
        0.06: (6.49, 15.61),
        0.03: (9.64, 26.92),
        0.02: (12.19, 37.35),
        0.01: (17.07, 63.67),
    },
    "random": {12: (5.56, 13.32), 25: (7.81, 22.45), 50: (10.61, 36.93), 100: (14.14, 60.23), 200: (18.42, 96.55)},
    "top_k": {4: (10.12, 10.87), 8: (19.38, 20.30), 16: (37.34, 38.73), 32: (72.59, 74.74), 64: (141.52, 145.33)},
}
SURER = 0.5  # of the first curve: a teacher that is surer still
LESS_SURE = 1.25  # of the second
SHARD_BYTES = 12_300  # that a shard takes beside its columns: header, HDF5, and the ends of the columns


def stored_bytes_per_position(method: Method, parameter: float) -> Interval:
    """Return what a position takes, its token included; between what it lies for any teacher and text."""
    sure, unsure = (_interpolated(method, parameter, column) for column in (0, 1))
    return Interval(SURER * sure, math.sqrt(sure * unsure), LESS_SURE * unsure)


def _interpolated(method: Method, parameter: float, column: int) -> float:
    """Return a curve's value, straight between its points in logarithms, and beyond the ends as at the ends."""
    points = sorted((math.log(at), math.log(pair[column])) for at, pair in CURVES[method].items())
    x = math.log(parameter)
    inner = [k for k in range(1, len(points) - 1) if points[k][0] < x]
    (x0, y0), (x1, y1) = points[len(inner)], points[len(inner) + 1]
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
