"""What a user sees while a run trains: a bar on a terminal or in a notebook, else plain lines."""

import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jaxlm.runtime.console import make_console

# (key of the values, how it is shown)
SHOWN: tuple[tuple[str, str], ...] = (
    ("loss", "loss {:.3f}"),
    ("accuracy", "accuracy {:.1%}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("mfu", "MFU {:.1%}"),
)


class Progress:
    """A bar with step, loss, masked accuracy, speed and time left; a context manager.

    In a notebook it is one line, which is written anew, and the plots of the run stand below it.
    Elsewhere each update is one plain line.

    Args:
        total_steps: None for a run that ends by the clock: then the share of its time is shown.
        visible: False on all processes but one.
    """

    def __init__(
        self, total_steps: int | None, *, visible: bool = True, console: Console | None = None
    ):
        self._console = console or make_console(quiet=not visible)
        self._total_steps = total_steps
        self._status: Spinner | None = None
        self._fraction = 0.0
        self._parts: list[str] = []
        self._first: tuple[float, float] | None = None  # (time, fraction) of the first update
        self._in_notebook = self._console.is_jupyter and not self._console.quiet
        self._bar = ""
        self._displays: dict[str, Any] = {}  # what a notebook shows, and can show anew
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def update(self, step: int, fraction: float, values: Mapping[str, float | int]) -> None:
        """Show where the run stands: ``fraction`` of it is done, in [0, 1]."""
        total = "" if self._total_steps is None else f"/{self._total_steps:,}"
        self._fraction = fraction
        self._parts = [
            f"step {step:,}{total}",
            f"{fraction:.0%}",
            *(form.format(values[key]) for key, form in SHOWN if key in values),
            self._time_left(),
        ]
        plain = " · ".join(part for part in self._parts if part)
        if self._in_notebook:
            self._show_bar(plain)
        elif not self._console.is_terminal:
            self._line(plain)

    def finish(self, step: int, how: str = "finished") -> None:
        """The run is at its end: the bar, which updates in steps of its own, is full."""
        if self._parts:
            total = "" if self._total_steps is None else f"/{self._total_steps:,}"
            share = "100%" if how == "finished" else self._parts[1]
            self._fraction = 1.0
            self._parts = [f"step {step:,}{total}", share, *self._parts[2:-1], how]
            if self._in_notebook:
                self._show_bar(" · ".join(self._parts))

    def print(self, text: str) -> None:
        """A line above the bar."""
        self._line(text)

    def warn(self, text: str) -> None:
        """A line above the bar that stands out."""
        self._line(f"warning: {text}", style="yellow")

    def picture(self, path: Path) -> None:
        """Show a PNG file in a notebook, in the place of what it was before; nowhere else."""
        if self._in_notebook:
            png = base64.b64encode(path.read_bytes()).decode()
            self._display(str(path), {"image/png": png, "text/plain": str(path)})

    @contextmanager
    def status(self, doing: str) -> Iterator[None]:
        """Say what takes its time, such as "compiling the train step", then how long it took."""
        began = time.perf_counter()
        if self._console.is_terminal:
            self._status = Spinner("dots", Text(f"{doing} …"), style="cyan")
        elif self._in_notebook:
            self._display("bar", {"text/plain": f"{doing} …"})
        else:
            self._line(f"{doing} …")
        try:
            yield
        finally:
            self._status = None
            if self._in_notebook:
                self._display("bar", {"text/plain": self._bar})
        self._line(f"{doing}: {time.perf_counter() - began:.1f} s", style="dim")

    def _show_bar(self, plain: str) -> None:
        done = round(20 * self._fraction)
        self._bar = f"{'━' * done}{'┄' * (20 - done)} {plain}"
        self._display("bar", {"text/plain": self._bar})

    def _display(self, name: str, content: dict[str, str]) -> None:
        # A notebook has it; nothing else needs it.
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        if name in self._displays:
            self._displays[name].update(content, raw=True)
        else:
            self._displays[name] = display(content, raw=True, display_id=True)

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _time_left(self) -> str:
        now = time.perf_counter()
        if self._first is None:  # compiling came before, and is no measure of what is to come
            self._first = (now, self._fraction)
        began, done_before = self._first
        if self._fraction <= done_before:
            return ""
        left = (now - began) * (1 - self._fraction) / (self._fraction - done_before)
        return f"{_duration(left)} left" if self._fraction < 1 else ""

    def _render(self) -> RenderableType:
        if self._status is not None:
            return self._status
        if not self._parts:
            return ""
        where, share, *values, left = self._parts
        first = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):  # the bar takes the room that is left
            first.add_column(ratio=ratio, no_wrap=True)
        first.add_row(where, ProgressBar(total=1.0, completed=self._fraction), share, left)
        return Group(first, Text(" · ".join(values), style="cyan"))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
