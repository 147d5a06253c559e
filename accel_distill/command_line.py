"""The arguments that the commands share: `--config FILE [section.key=value ...]`.

The one decision: a wrong argument is a `ConfigError`, so it costs one sentence and exit status 2 like
every other mistake in a configuration; argparse's own two-line usage message is given up for that.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from accel_distill.errors import ConfigError

GENERATE_FLAGS = {
    "--allow-numerics-drift": "go on with a cache on another device, or with other batch sizes or attention: the new "
    "shards then differ in rounding from the others, and each of them says so"
}


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser that raises where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` with argparse's message and where to find help."""
        raise ConfigError(f"{message}; `{self.prog} --help` shows what is expected")


def parse_arguments(argv: Sequence[str] | None, prog: str) -> tuple[Path, list[str]]:
    """Return the run file and the overrides; `None` for `argv` means the process's own arguments.

    Raises `ConfigError`; `--help` prints and exits with status 0.
    """
    arguments = parse_flagged(argv, prog, flags={})
    return arguments.config, arguments.overrides


def parse_flagged(argv: Sequence[str] | None, prog: str, *, flags: Mapping[str, str]) -> argparse.Namespace:
    """Return the run file as `config`, the `overrides`, and each of `flags` (name to help) as true or false."""
    parser = OneSentenceParser(prog=prog, allow_abbrev=False, description=f"{prog}: reads one run file.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run file (YAML)")
    for flag, meaning in flags.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replaces one value of the run file, for example dataset.max_samples=2000",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None:  # not `required=True`: that would hide a misspelt flag behind this message
        parser.error("--config FILE is missing")
    return arguments
