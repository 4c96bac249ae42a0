"""One process of a run that fails or is late on purpose: FAULT is ``kind:step`` or ``late:s``."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed

from jaxlm import config
from jaxlm.runs import command_line, finetuning, pretraining
from jaxlm.runtime import distributed
from jaxlm.train import loop
from jaxlm.train.view import View

kind, _, at = os.environ.get("FAULT", "").partition(":")
add, compile_ahead = View.add, loop.compile_ahead


def add_and_fail(view: View, step: int, *rest: Any) -> None:
    add(view, step, *rest)
    if kind and kind != "late" and step == int(at):
        if kind == "error":
            raise RuntimeError("made to fail")
        signal.raise_signal(getattr(signal, kind))
        if kind == "SIGTERM" and jax.process_count() > 1:
            wait_for_agreement()


def compile_late(*args: Any) -> Any:
    time.sleep(int(at))
    return compile_ahead(*args)


def wait_for_agreement() -> None:
    """Until JAX has begun to agree on a step to stop at.

    It looks for signals once a second, and these steps take milliseconds: without this the run
    would often be over before. The other processes cannot run ahead, for they need this one.
    """
    client = jax_distributed.global_state.client
    assert client is not None
    mine = f"PREEMPTION_CURRENT_COUNTER/{jax.process_index()}"  # a name inside XLA
    while mine not in dict(client.key_value_dir_get("PREEMPTION_CURRENT_COUNTER/")):
        time.sleep(0.05)


if __name__ == "__main__":
    View.add = add_and_fail
    if kind == "late":
        loop.compile_ahead = compile_late
    with distributed.joined():
        if isinstance(config.read_file(Path(sys.argv[1])), config.FinetuneConfig):
            finetuning.finetune(command_line.load(config.FinetuneConfig))
        else:
            pretraining.pretrain(command_line.load(config.PretrainConfig))
