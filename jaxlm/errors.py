"""What a person can mend: one sentence that names the value, the place, and the way out."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input. Scripts print its message alone, without a traceback, and exit with 2."""


@contextmanager
def report_input_errors() -> Iterator[None]:
    """Around a script: bad input ends it with one line and exit code 2, Ctrl-C with 130.

    Where nobody reads on, as behind ``| head``, it ends without a word.
    """
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # another connection broke, and that is news
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains
        raise SystemExit(1) from None
