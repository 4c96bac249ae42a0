"""Adapters in PEFT's format: ``python scripts/adapter.py export runs/x FOLDER``.

``export RUN FOLDER`` writes what a run of LoRA or (IA)³ has learned, as PEFT loads it.
``import FOLDER CONFIG [--FIELD VALUE ...]`` makes a run of such a folder, with the task, the data
and the name of a config file; evaluate.py, predict.py and merge_lora.py take the run, and
``finetune.py runs/NAME/config.json`` trains it further.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import sys
from pathlib import Path
from typing import Annotated

import tyro

from jaxlm.config import FinetuneConfig
from jaxlm.errors import report_input_errors
from jaxlm.runs import adapter, command_line, finetuned


def write(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    step: int | None = None,
    base: str | None = None,
) -> None:
    """Write a run's adapter, and what else it trained, as PEFT loads it.

    Args:
        run: The folder of a run that was tuned with LoRA or (IA)³.
        out: The new folder.
        step: Which checkpoint; None = the best.
        base: The encoder of the adapter, if it has moved: a run folder, a folder or a hub name.
    """
    loaded = finetuned.open_finetuned(run, step=step, base=base)
    named = adapter.export(loaded, out, base=base)
    rounded = loaded.config.frozen_dtype
    note = "" if rounded == "float32" else f"; trained beside a base in {rounded}, which differs"
    print(f"{run} at step {int(loaded.state.step)} is in {out}, an adapter of {named}{note}")


def read(folder: str, words: list[str]) -> None:
    """Make a run of an adapter."""
    config = command_line.load(FinetuneConfig, words)
    given = any(word.partition("=")[0] == "--base" for word in words)
    directory = adapter.load(folder, config, base=config.base if given else None)
    saved = directory / "config.json"
    print(f"{folder} is the run {directory}; to train it: python scripts/finetune.py {saved}")


if __name__ == "__main__":
    with report_input_errors():
        match sys.argv[1:]:
            case ["import", folder, config, *words] if not folder.startswith("-"):
                read(folder, [config, *words])
            case ["export", *words]:
                tyro.cli(write, prog="adapter.py export", args=words)
            case words:
                print(__doc__, file=sys.stdout if words in (["-h"], ["--help"]) else sys.stderr)
                raise SystemExit(0 if words in (["-h"], ["--help"]) else 2)
