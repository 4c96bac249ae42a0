import io
import re
import sys
import types

import pytest
from rich.console import Console

from jaxlm.train import progress
from jaxlm.train.progress import Progress

VALUES = {"loss": 5.1234, "accuracy": 0.1234, "tokens_per_s": 12345.6}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def test_without_a_terminal_there_are_plain_lines(clock):
    plain = console(terminal=False)
    with Progress(1000, console=plain) as bar:
        with bar.status("compiling the train step"):
            clock[0] += 12.34
        bar.update(100, 0.1, VALUES)
        clock[0] += 60
        bar.update(200, 0.2, VALUES | {"mfu": 0.415})
        bar.print("evaluation at step 200: loss 5.0 [MASK]")
        bar.warn("3 masked tokens did not fit")
        clock[0] += 480
        bar.update(1000, 1.0, {"loss": 4.0})
    assert plain.file.getvalue().splitlines() == [
        "compiling the train step …",
        "compiling the train step: 12.3 s",
        "step 100/1,000 · 10% · loss 5.123 · accuracy 12.3% · 12,346 tokens/s",
        "step 200/1,000 · 20% · loss 5.123 · accuracy 12.3% · 12,346 tokens/s · MFU 41.5%"
        " · 8:00 left",
        "evaluation at step 200: loss 5.0 [MASK]",
        "warning: 3 masked tokens did not fit",
        "step 1,000/1,000 · 100% · loss 4.000",
    ]


def test_on_a_terminal_there_is_one_bar_below_the_lines(clock):
    terminal = console(terminal=True)
    with Progress(None, console=terminal) as bar:
        with bar.status("compiling the train step"):
            bar._live.refresh()
            assert "compiling the train step …" in terminal.file.getvalue()
            clock[0] += 3
        bar.update(7, 0.25, VALUES)
        bar._live.refresh()
        clock[0] += 3600
        bar.update(9, 0.5, VALUES)
        bar.print("evaluation")
    text = terminal.file.getvalue()
    assert "compiling the train step: 3.0 s" in text
    assert text.rindex("evaluation") < text.rindex("step 9")
    first, second = text[text.rindex("step 9") :].splitlines()[:2]
    assert re.search(r"━ +50% +2:00:00 left", first)
    assert "loss 5.123 · accuracy 12.3% · 12,346 tokens/s" in second


def test_a_finished_run_has_a_full_bar(clock):
    """Updates come every few steps and from the middle of one, so the last is not at the end."""
    terminal = console(terminal=True)
    with Progress(60, console=terminal) as bar:
        bar.update(40, 0.675, VALUES)
        clock[0] += 60
        bar.update(50, 0.825, VALUES)
        bar.finish(60)
    last = terminal.file.getvalue().rsplit("step ", 1)[1]
    assert last.startswith("60/60 ")
    assert "100% finished" in last
    assert "left" not in last
    assert "loss 5.123" in last


def test_a_run_that_stops_early_says_so(clock, monkeypatch):
    terminal, notebook = console(terminal=True), Notebook()
    with Progress(60, console=terminal) as bar:
        bar.update(40, 0.675, VALUES)
        bar.finish(42, "stopped early")
    last = terminal.file.getvalue().rsplit("step ", 1)[1]
    assert last.startswith("42/60 ")
    assert "68% stopped early" in last
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    with Progress(4, console=Console(force_jupyter=True)) as bar:
        bar.update(1, 0.25, VALUES)
        bar.finish(4)
    assert "━ step 4/4 · 100% · " in notebook.shown[0]["text/plain"]
    assert notebook.shown[0]["text/plain"].endswith(" · finished")


class Notebook(types.ModuleType):
    """Stands for IPython.display: what is shown, in the order in which it came to be."""

    def __init__(self):
        super().__init__("IPython.display")
        self.shown = []

    def display(self, content, *, raw, display_id):
        assert raw
        assert display_id
        self.shown.append(content)
        place = len(self.shown) - 1
        return types.SimpleNamespace(update=lambda new, raw: self.shown.__setitem__(place, new))


def test_in_a_notebook_there_is_one_line_that_is_written_anew(clock, monkeypatch, tmp_path):
    notebook, png = Notebook(), tmp_path / "loss.png"
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    console = Console(force_jupyter=True)
    monkeypatch.setattr(console, "print", lambda text, **_: notebook.shown.append(str(text)))
    with Progress(4, console=console) as bar:
        with bar.status("compiling the train step"):
            assert notebook.shown == [{"text/plain": "compiling the train step …"}]
            clock[0] += 1
        assert notebook.shown[0] == {"text/plain": ""}
        bar.update(1, 0.25, VALUES)
        assert notebook.shown[0]["text/plain"].startswith("━━━━━┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ step 1/4 · 25% · ")
        with bar.status("evaluating"):
            assert notebook.shown[0] == {"text/plain": "evaluating …"}
        assert notebook.shown.pop() == "evaluating: 0.0 s"
        for content in (b"1", b"2"):
            png.write_bytes(content)
            bar.picture(png)
        bar.update(4, 1.0, {"loss": 4.0})
    assert notebook.shown == [
        {"text/plain": "━━━━━━━━━━━━━━━━━━━━ step 4/4 · 100% · loss 4.000"},
        "compiling the train step: 1.0 s",
        {"image/png": "Mg==", "text/plain": str(png)},
    ]
    notebook.shown.clear()
    with Progress(4, console=Console(force_jupyter=True, quiet=True)) as bar:
        bar.update(1, 0.25, VALUES)
        bar.picture(png)
    assert notebook.shown == []


def test_elsewhere_no_picture_is_shown(tmp_path):
    plain = console(terminal=False)
    Progress(4, console=plain).picture(tmp_path / "none.png")
    assert plain.file.getvalue() == ""


def test_an_invisible_one_is_silent(capfd):
    with Progress(10, visible=False) as bar:
        with bar.status("compiling"):
            pass
        bar.update(1, 0.1, VALUES)
        bar.print("text")
        bar.warn("text")
    assert capfd.readouterr() == ("", "")


def test_an_error_leaves_the_terminal_clean():
    terminal = console(terminal=True)
    with (
        pytest.raises(RuntimeError, match="diverged"),
        Progress(10, console=terminal) as bar,
        bar.status("compiling"),
    ):
        raise RuntimeError("diverged")
    assert terminal.file.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
