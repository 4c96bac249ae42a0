"""A trial in a separate process.

Running trials one after another in one process saves little: learning rate and seed are constants
of a compiled step, so each trial compiles its own. A tiny trial takes 6.0 s of CPU there, 7.5 s in
a fresh process, which imports again, and 5.1 s where those share a compile cache, since evaluation
and the like are the same in all. And what runs out of memory, or crashes, takes only itself along.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.config import Config, FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.runtime.preemption import stop_on_signal
from jaxlm.runtime.storage import on_disk

RunTrial = Callable[[Config], object]  # trains in config.directory; raises where it fails
TRIAL, LOG = "trial.json", "log.txt"  # in a trial's folder: the config as planned, and the output
CACHE = "JAX_COMPILATION_CACHE_DIR"


@contextlib.contextmanager
def processes(scripts: Path) -> Iterator[RunTrial]:
    """What trains the config that a trial's folder holds, with the script for its kind.

    Ctrl-C is passed on: the trial saves where it stands, then KeyboardInterrupt is raised.
    """
    with tempfile.TemporaryDirectory(prefix="jaxlm-compiled-") as cache:
        environment = dict(os.environ)
        if CACHE not in environment:
            environment |= {CACHE: cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

        def run_trial(config: Config) -> None:
            name = "finetune.py" if isinstance(config, FinetuneConfig) else "pretrain.py"
            command = [sys.executable, str(scripts / name), str(config.directory / TRIAL)]
            path = on_disk(config.directory / LOG)
            with path.open("ab") as log, stop_on_signal() as stop:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches it once, through this process
                    close_fds=False,  # a trial that outlives its sweep holds the sweep's lock
                )
                while process.poll() is None and not stop.is_set():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=0.2)
                if stop.is_set():
                    try:
                        process.terminate()
                        process.wait()
                    except KeyboardInterrupt:  # the second Ctrl-C
                        process.kill()
                    raise KeyboardInterrupt
            if process.returncode:
                raise InputError(_reason(process.returncode, path))

        yield run_trial


def _reason(code: int, log: Path) -> str:
    """Why a process failed, by its exit code and the last line that it wrote."""
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"it was killed by {signal.Signals(-code).name}{hint}; its output is in {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    last = lines[-1].strip() or "it said nothing"
    if code == 2 and last.startswith("error: "):
        return last.removeprefix("error: ")
    return f"it ended with exit code {code}: {last}; its output is in {log}"
