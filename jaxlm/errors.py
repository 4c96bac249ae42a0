"""Errors a user can fix: one sentence that names the value, where it is, and the way out."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class InputError(Exception):
    """Bad input. Scripts print its message alone, without a traceback, and exit with 2."""


def note(text: str) -> None:
    """One line on stderr, away from answers: what was cut, dropped or changed in the input."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def report_input_errors() -> Iterator[None]:
    """Around a script: bad input ends it with one line and exit code 2, Ctrl-C with 130.

    If nothing reads its output any more, as after ``| head``, it ends silently. File names that are
    too long, and an output that cannot be written, are bad input as well. What a terminal's
    encoding lacks, such as a bar or an emoji, is printed as ``?`` and ends nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
        print(end="", flush=True)
    except InputError as error:
        _give_up(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _takes_output()
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _give_up(f"{error.filename}: {error.strerror}; name a shorter one")
        if error.filename is not None or _takes_output("\n"):  # it was another file or connection
            raise
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from None
        _give_up(f"the output cannot be written: {error.strerror}")


def _give_up(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    _takes_output()
    raise SystemExit(2) from None


def _takes_output(text: str = "") -> bool:
    """Whether it can be printed; if not, all is dropped, of which Python would complain at exit."""
    try:
        print(end=text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
