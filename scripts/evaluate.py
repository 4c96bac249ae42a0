"""Evaluate a run on prepared data: ``python scripts/evaluate.py runs/quickstart``."""

from jaxlm.startup import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm import run
from jaxlm.data import loader, prepared
from jaxlm.errors import InputError, report_input_errors
from jaxlm.train import loop


def main(
    directory: Annotated[Path, tyro.conf.Positional],
    /,
    data: Path | None = None,
    split: Literal["train", "validation"] = "validation",
    rows: int | None = None,
    step: int | None = None,
) -> None:
    """Loss, perplexity and masked accuracy, printed and written to the run folder's eval.json.

    Args:
        directory: The run folder.
        data: Prepared data; None = what the run was trained on.
        split: Which part of it.
        rows: How many rows; None = all.
        step: Which checkpoint; None = the best.
    """
    if rows is not None and rows < 1:
        raise InputError(f"--rows {rows} is not above 0")
    loaded = run.open_run(directory, step)
    dataset = prepared.open_prepared(data or Path(loaded.config.data.paths[0]))
    if dataset.info.tokenizer_sha256 != loaded.cursor["tokenizer_sha256"]:
        raise InputError(
            f"{dataset.directory} was prepared with another tokenizer than the run's: prepare it "
            f"again with --tokenizer.path {directory / run.TOKENIZER}"
        )
    batches = loader.eval_batches(
        dataset, loaded.config.data.batch_size, split=split, max_rows=rows
    )
    metrics = loop.evaluate(loaded.placement, loaded.state, batches)
    result = {"step": loaded.step, "data": str(dataset.directory), "split": split, **metrics}
    print(f"{directory} at step {loaded.step}, {split} split of {dataset.directory}:")
    for name, value in metrics.items():
        print(f"  {name:<10} {value:.4f}")
    print(f"  {'unigram':<10} {dataset.info.unigram_entropy:.4f}  (entropy of single tokens)")
    try:
        (directory / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"eval.json was not written: {error}") from error


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
