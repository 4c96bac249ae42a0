"""Serve a model without jaxlm: ``python scripts/export.py runs/quickstart served``.

The folder that comes out has the model as StableHLO, its weights, its tokenizer and its labels, and
a README whose five lines load and run it with jax, numpy and tokenizers alone. Runs that classify,
tag, answer, embed or fill in blanks can be exported, adapters merged, and any encoder in Hugging
Face's layout, which embeds.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
from pathlib import Path
from typing import Annotated

import tyro

from jaxlm.errors import report_input_errors
from jaxlm.runs import serving


def main(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    step: int | None = None,
    base: str | None = None,
) -> None:
    """Write the folder.

    Args:
        run: The run folder; or a folder in Hugging Face's layout or a hub name, which embeds, or
            does what its task's head does.
        out: The new folder.
        step: Which checkpoint; None = the best.
        base: The encoder of an adapter, if it has moved: a run folder, a folder or a hub name.
    """
    print(serving.export(str(run), out, step=step, base=base))


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
