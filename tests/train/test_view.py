import errno
import io
import os
import time

import numpy as np
import pytest
from rich.console import Console

from jaxlm.errors import InputError
from jaxlm.sums import Sums
from jaxlm.train.metrics import JsonlWriter, Throughput, read_jsonl
from jaxlm.train.plots import Reference
from jaxlm.train.progress import Progress
from jaxlm.train.view import View


class FullDisk:
    def write(self, step, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        pass


def make_view(directory, *writers, log_every=1, out=None, clock=time.perf_counter):
    progress = Progress(10, console=Console(file=out or io.StringIO(), width=100))
    return View(
        directory,
        progress,
        Throughput(None, "cpu", 1, clock=clock),
        step=0,
        tokens_seen=0.0,
        log_every=log_every,
        reference=Reference(),
        more_writers=writers,
    )


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        make_view(tmp_path, FullDisk()) as view,
        pytest.raises(InputError, match=rf"metrics to {tmp_path}: No space left on device"),
    ):
        view.evaluated(1, {"loss": 2.0})


class Shut:
    is_closed = False

    def write(self, step, values):
        pass

    def close(self):
        self.is_closed = True


def test_a_disk_that_fills_is_one_sentence_and_what_is_left_is_closed(tmp_path):
    """What is not flushed is tried again where the file is closed, and fails again."""
    full, other = JsonlWriter(tmp_path / "a.jsonl"), Shut()
    full.close()
    full._file = open("/dev/full", "w")  # noqa: SIM115
    message = r"cannot write metrics to .*: No space left on device"
    with pytest.raises(InputError, match=message), make_view(tmp_path, full, other) as view:
        view.evaluated(1, {"loss": 2.0})
    assert other.is_closed
    later = JsonlWriter(tmp_path / "b.jsonl")
    later.close()
    later._file = open("/dev/full", "w")  # noqa: SIM115
    later._file.write("what a buffer holds")
    with pytest.raises(InputError, match="No space left on device"), make_view(tmp_path, later):
        pass


def step_of(tokens, loss, *, skipped=0):
    counts = {"steps": 1, "tokens": tokens, "skipped": skipped, "examples": 1}
    return Sums({"loss": np.float64(loss)}, 1.0, {k: np.float64(n) for k, n in counts.items()})


def test_a_flush_shows_the_steps_since_the_last_line(tmp_path):
    out = io.StringIO()
    with make_view(tmp_path, log_every=4, out=out) as view:
        view.flush(0, 0.0)
        for step in range(1, 7):
            view.add(step, step / 8, step_of(8, 2.0, skipped=step == 6))
        view.flush(6, 0.75)
        view.flush(6, 0.75)
        for step in range(7, 11):
            view.add(step, 1.0, step_of(8, 2.0))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["tokens"]) for line in lines] == [(4, 32), (6, 48), (8, 64)]
    assert lines[1]["skipped"] == 1
    assert [("tokens_per_s" in line) for line in lines] == [True, False, False]
    assert "1 updates up to step 6 were skipped" in out.getvalue()


def test_speed_is_of_training_alone(tmp_path):
    now = [0.0]
    with make_view(tmp_path, log_every=1, clock=lambda: now[0]) as view:
        now[0] = 100.0  # restored, compiled
        view.started()
        now[0] = 110.0
        view.add(1, 0.5, step_of(50, 2.0))
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["tokens_per_s"] == 5.0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write metrics to .*: Not a directory"):
        make_view(tmp_path / "file" / "run")
