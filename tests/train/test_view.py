import errno
import io
import os

import pytest
from rich.console import Console

from jaxlm.errors import InputError
from jaxlm.train.metrics import Throughput
from jaxlm.train.plots import Reference
from jaxlm.train.progress import Progress
from jaxlm.train.view import View


class FullDisk:
    def write(self, step, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        pass


def make_view(directory, *writers):
    progress = Progress(10, visible=False, console=Console(file=io.StringIO()))
    return View(
        directory,
        progress,
        Throughput(None, "cpu", 1),
        step=0,
        tokens_seen=0.0,
        log_every=1,
        reference=Reference(),
        more_writers=writers,
    )


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        make_view(tmp_path, FullDisk()) as view,
        pytest.raises(InputError, match=rf"metrics to {tmp_path}: No space left on device"),
    ):
        view.evaluated(1, {"loss": 2.0})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write metrics to .*: Not a directory"):
        make_view(tmp_path / "file" / "run")
