"""Rows for a terminal, and for what is none."""

import io
import os
import pty

from accel_distill.screen import labelled, terminal_width

ROWS = {"disk": "8.17 MB (7.99 MB to 8.35 MB) in all files", "path": "/a/path/that/is/longer/than/the/terminal"}


def test_on_a_terminal_rows_break_between_words_below_their_text() -> None:
    assert labelled(ROWS, at=6, width=31) == [
        "disk  8.17 MB (7.99 MB to 8.35",
        "      MB) in all files",
        "path  /a/path/that/is/longer/than/the/terminal",
    ]


def test_elsewhere_each_row_is_one_line() -> None:
    assert labelled(ROWS, at=6, width=None) == [
        "disk  8.17 MB (7.99 MB to 8.35 MB) in all files",
        "path  /a/path/that/is/longer/than/the/terminal",
    ]


def test_the_width_is_that_of_the_terminal_and_none_elsewhere() -> None:
    assert terminal_width(io.StringIO()) is None
    _, end = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 67, 0, 0))
    with os.fdopen(end, "w") as stream:
        assert terminal_width(stream) == 67
