"""What scripts/compare_peft.py refuses, with stand-ins for the libraries that it compares with."""

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from jaxlm.errors import InputError

SCRIPT = Path(__file__).parent.parent / "scripts" / "compare_peft.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("peft", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    return runpy.run_path(str(SCRIPT))


def test_examples(script: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("good\t1\nso\tso\t0\n")
    assert script["read"]("sst2", path) == [(["good"], ["1"]), (["so\tso"], ["0"])]
    path.write_text("a\tO\nb\tB-x\n\n\nc\tO")
    assert script["read"]("wnut17", path) == [(["a", "b"], ["O", "B-x"]), (["c"], ["O"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\t1\nbad\n", "data:2 is no text, a tab and a label: 'bad'"),
        (b"good\t \n", "data:1 is no text, a tab and a label"),
        (b"\n\n", "data holds no examples"),
        (b"\xff\t1", "data cannot be read: .*0xff"),
    ],
)
def test_bad_data(script: dict[str, Any], tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data").write_bytes(content)
    for task in ("sst2", "wnut17"):
        with pytest.raises(InputError, match=message):
            script["read"](task, tmp_path / "data")


@pytest.mark.parametrize("line", ["3", "{", "{}", '{"dev": 1, "test": 1, "seconds": null}', "\xff"])
def test_a_damaged_line_of_the_output(script: dict[str, Any], tmp_path: Path, line: str) -> None:
    out = tmp_path / "out"
    out.write_text('{"dev": 1, "test": 1, "seconds": 2}\n' + line, encoding="latin-1")
    with pytest.raises(InputError, match="out:2 is no result of a run: remove that line"):
        script["read_rows"](out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds 0 is not a number above 0"),
        (["--epochs", "nan"], "--epochs nan is not"),
        (["--peak-lr", "inf"], "--peak-lr inf is not"),
        (["--first-seed", "-1"], "--first-seed -1"),
        ([], "--model .*: no config.json is in it"),
    ],
)
def test_bad_options(
    script: dict[str, Any],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = [f"--{name}={tmp_path / name}" for name in ("model", "data", "out")]
    monkeypatch.setattr(sys, "argv", ["compare_peft.py", *needed, *options])
    with pytest.raises(InputError, match=message):
        script["main"]()
