"""Where runs print."""

from rich.console import Console


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints text as it is: ``[v1]`` in a path is no markup, ``:x:`` no emoji."""
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False)
