"""One process of a run that fails on purpose, for test_distributed.py: FAULT is ``kind:step``."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.runs import command_line, finetuning, pretraining
from jaxlm.runtime import distributed
from jaxlm.train.view import View

kind, _, at = os.environ.get("FAULT", "").partition(":")
add = View.add


def add_and_fail(view: View, step: int, *rest: Any) -> None:
    add(view, step, *rest)
    if kind and step == int(at):
        if kind == "error":
            raise RuntimeError("made to fail")
        os.kill(os.getpid(), getattr(signal, kind))


if __name__ == "__main__":
    View.add = add_and_fail
    with distributed.joined():
        if isinstance(config.read_file(Path(sys.argv[1])), config.FinetuneConfig):
            finetuning.finetune(command_line.load(config.FinetuneConfig))
        else:
            pretraining.pretrain(command_line.load(config.PretrainConfig))
