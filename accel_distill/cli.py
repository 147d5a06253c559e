"""`accel-distill`: the commands that need no launcher.

The one decision: a command's module is imported when the command is called, so that `--help` answers at once.
Cost: the commands' names and one-line descriptions stand here, away from their modules.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accel_distill import __version__
from accel_distill.command_line import GENERATE_FLAGS, OneSentenceParser, parse_flagged
from accel_distill.errors import ConfigError, exit_with

if TYPE_CHECKING:
    from accel_distill.config import RunConfig

TEMPLATE = Path(__file__).with_name("run_file.yaml")
LAUNCHED = ("generate", "train")

HELP = f"""accel-distill {__version__}: distil a language model from a cache of its teacher

usage: accel-distill COMMAND [arguments]
       (`accel-distill COMMAND --help` explains one)

  init                     print a commented run file to start from
  check    --config FILE   say whether a run file is right; loads no model
  estimate --config FILE   say what the cache will take, measured on samples
  inspect  CACHE           say what is in a cache
  verify   CACHE           check every file of a cache; --repair moves bad ones
  audit    CACHE           run the teacher again over some samples, and compare
  report   RUN             write a training run as one HTML file, with its curves
  compare  RUN RUN ...     put training runs side by side, in a table and HTML
  sizes                    print what caches take, of 10 k to 100 M samples
  demo                     the whole way on a small example, in minutes on a CPU
  --version, --help

The two commands that run on several processes are started with a launcher:

  accelerate launch -m accel_distill.generate --config FILE
  accelerate launch -m accel_distill.train    --config FILE

--config FILE may be followed by section.key=value ..., which replace values.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_with(lambda: _dispatch(arguments))


def check(argv: list[str]) -> int:
    """Validate a run file and its overrides; say in one line what it would do, and which local paths are not there."""
    arguments = parse_flagged(argv, prog="accel-distill check", flags=GENERATE_FLAGS)  # the launch scripts pass them on
    path, overrides = arguments.config, arguments.overrides
    from accel_distill.config import load_config

    config = load_config(path, overrides)
    samples = "all samples" if config.dataset.max_samples is None else f"{config.dataset.max_samples:,} samples"
    into = "without a cache: the teacher is online" if config.teacher.mode == "online" else f"into {config.cache.path}"
    print(
        f"{path}: valid: teacher {config.teacher.model}, {samples} of {config.dataset.name},"
        f" {config.targets.described}, {into}"
    )
    for note in _not_here(config):
        print(f"note: {note} (seen from {Path.cwd()})")
    return 0


def _not_here(config: "RunConfig") -> Iterator[str]:
    """Yield a sentence for each local path that the run file names and that is not there."""
    models = {"teacher.model": config.teacher.model, "student.model": config.student and config.student.model}
    for key, name in models.items():
        if name and name.startswith(("/", "./", "../")) and not Path(name).is_dir():
            yield f"{key}: there is no directory {name}"
    for pattern in config.dataset.missing_files():
        yield f"dataset.data_files: there is no file {pattern}"


def init(argv: list[str]) -> int:
    """Print the commented run file."""
    OneSentenceParser(prog="accel-distill init", description="Print a commented run file.").parse_args(argv)
    print(TEMPLATE.read_text(encoding="utf-8"), end="")
    return 0


def estimate(argv: list[str]) -> int:
    """Say what a run will take."""
    from accel_distill import estimate as command

    return command.main(argv)


def inspect(argv: list[str]) -> int:
    """Say what is in a cache."""
    from accel_distill import inspect_cache

    return inspect_cache.main(argv)


def verify(argv: list[str]) -> int:
    """Check every file of a cache."""
    from accel_distill import verify as command

    return command.main(argv)


def audit(argv: list[str]) -> int:
    """Compare some samples of a cache with the teacher."""
    from accel_distill import audit as command

    return command.main(argv)


def report(argv: list[str]) -> int:
    """Write a training run as one HTML file."""
    from accel_distill import report as command

    return command.main(argv)


def compare(argv: list[str]) -> int:
    """Put training runs side by side."""
    from accel_distill import compare as command

    return command.main(argv)


def sizes(argv: list[str]) -> int:
    """Print what caches of several sizes take."""
    from accel_distill import sizes as command

    return command.main(argv)


def demo(argv: list[str]) -> int:
    """Run the main job end to end on an example that needs no download."""
    from accel_distill import demo as example

    return example.main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "init": init,
    "check": check,
    "estimate": estimate,
    "inspect": inspect,
    "verify": verify,
    "audit": audit,
    "report": report,
    "compare": compare,
    "sizes": sizes,
    "demo": demo,
}


def _dispatch(arguments: list[str]) -> int:
    word = arguments[0] if arguments else None
    if word in ("--help", "-h"):
        print(HELP, end="")
    elif word == "--version":
        print(f"accel-distill {__version__}")
    elif word in COMMANDS:
        return COMMANDS[word](arguments[1:])
    elif word in LAUNCHED:
        raise ConfigError(f"{word} runs under a launcher: accelerate launch -m accel_distill.{word} --config FILE")
    else:
        what = "no command" if word is None else f"unknown command or flag {word!r}"
        raise ConfigError(f"{what}; expected one of {', '.join(COMMANDS)}, --help, --version")
    return 0
