"""Distil language models from a teacher's cached sparse distributions.

The one decision: the public names load on first use, so that `import accel_distill` (and with it
`accel-distill --help` and `check`) imports neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_distill.cache import TeacherCache
    from accel_distill.collator import CachedLogitCollator
    from accel_distill.trainer import DistillationTrainer

__version__ = "0.1.0"
__all__ = ["CachedLogitCollator", "DistillationTrainer", "TeacherCache", "__version__"]

_HOMES = {
    "CachedLogitCollator": "accel_distill.collator",
    "DistillationTrainer": "accel_distill.trainer",
    "TeacherCache": "accel_distill.cache",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
