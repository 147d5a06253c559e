"""What a terminal shows: how wide it is, and rows of a name and a text that break between words.

The one decision: only a terminal gets broken lines. A file or a pipe gets each row as one line, which `grep` finds.
"""

import os
import shutil
import textwrap
from collections.abc import Mapping
from typing import TextIO


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that `stream` is; None: it is none."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # a terminal that does not tell, or only plays one
        return shutil.get_terminal_size().columns


def labelled(rows: Mapping[str, str], *, at: int, width: int | None) -> list[str]:
    """Return each row as its name and, from column `at` on, its text; broken between words before `width`."""
    lines = []
    for name, text in rows.items():
        first = f"{name:{at}}"
        if width is None:
            lines.append(first + text)
        else:
            lines += textwrap.wrap(
                text,
                max(width - 1, 2 * at),
                initial_indent=first,
                subsequent_indent=" " * at,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines
