"""A trial in a process of its own: why it failed, and what Ctrl-C does to it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from jaxlm.config import FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.sweep.process import processes


def write_script(folder: Path, body: str) -> None:
    (folder / "finetune.py").write_text(f"import os, signal, sys, time\n{body}\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('error: no such column', file=sys.stderr); sys.exit(2)", "^no such column$"),
        (
            "print('error: no column a\\u2028b', file=sys.stderr); sys.exit(2)",
            "^no column a\u2028b$",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, perhaps .* memory.*log.txt"),
        ("print(1); raise ValueError('odd')", "exit code 1: ValueError: odd; its output is in"),
        ("sys.exit(3)", "exit code 3: it said nothing"),
    ],
)
def test_why_a_process_failed(
    config: FinetuneConfig, tmp_path: Path, body: str, message: str
) -> None:
    write_script(tmp_path, body)
    config.directory.mkdir(parents=True)
    with processes(tmp_path) as run_trial, pytest.raises(InputError, match=message):
        run_trial(config)


def test_ctrl_c_lets_the_trial_save(config: FinetuneConfig, tmp_path: Path) -> None:
    write_script(
        tmp_path,
        "def save(*_):\n    time.sleep(0.3); print('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True)\n"
        "while True: signal.pause()",
    )
    config.directory.mkdir(parents=True)
    log = config.directory / "log.txt"

    def press() -> None:
        # With its line's end, which comes in a write of its own where output is not buffered.
        while not (log.is_file() and "ready\n" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    with processes(tmp_path) as run_trial, pytest.raises(KeyboardInterrupt):
        run_trial(config)
    thread.join()
    assert log.read_text().split() == ["ready", "saved"]
