"""Evaluate a run, pretrained or fine-tuned: ``python scripts/evaluate.py runs/quickstart``."""

from jaxlm.runtime.allocator import tune_process
from jaxlm.runtime.console import make_console

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.config import FinetuneConfig
from jaxlm.data import prepared
from jaxlm.data.labelled.dataset import like, read_records
from jaxlm.errors import InputError, report_input_errors
from jaxlm.evaluate import report
from jaxlm.runs import finetuned, pretrained
from jaxlm.runs.folder import TOKENIZER, read_any_config
from jaxlm.runtime.storage import StoragePath, locate, mirrored
from jaxlm.train import loop


def main(
    directory: Annotated[Path, tyro.conf.Positional],
    /,
    data: Path | None = None,
    split: Literal["train", "validation"] = "validation",
    rows: int | None = None,
    step: int | None = None,
    base: str | None = None,
    on_bad_row: Literal["raise", "skip"] | None = None,
) -> None:
    """Metrics, printed and written to the run folder's eval.json.

    Of a pretrained run: loss, perplexity, and accuracy at masks. Of a fine-tuned run: its task's
    metrics; confusion.png, reliability.png, and the most wrong examples in wrong.jsonl, where there
    are classes.

    Args:
        directory: The run folder.
        data: Prepared data, or a file of labelled data with the columns of training; None = the
            run's own.
        split: Which part of the run's own data, or of prepared data.
        rows: How many rows or examples; None = all.
        step: Which checkpoint; None = the best.
        base: The encoder of an adapter, if it has moved: a run folder, a folder or a hub name.
        on_bad_row: Whether records of labelled data that cannot be used end it, or are left out;
            None = as in training.
    """
    if rows is not None and rows < 1:
        raise InputError(f"--rows {rows} is not above 0")
    folder = locate(directory)
    try:
        with mirrored(folder) as out:
            if isinstance(read_any_config(folder), FinetuneConfig):
                result = evaluate_tuned(folder, out, data, split, rows, step, base, on_bad_row)
            else:
                result = evaluate_pretrained(folder, data, split, rows, step)
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in result.items()
            }
            (out / "eval.json").write_text(json.dumps(finite, indent=2) + "\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{folder}: the evaluation cannot be written: {error}") from error


def evaluate_pretrained(
    directory: StoragePath, data: Path | None, split: str, rows: int | None, step: int | None
) -> dict[str, Any]:
    """On rows of prepared data."""
    loaded = pretrained.open_pretrained(directory, step)
    paths = loaded.config.data.paths if data is None else (data,)
    datasets = [prepared.open_prepared(path) for path in paths]
    for dataset in datasets:
        if dataset.info.tokenizer_sha256 != loaded.cursor["tokenizer_sha256"]:
            raise InputError(
                f"{dataset.directory} was prepared with another tokenizer than the run's: prepare "
                f"it again with --tokenizer.path {directory / TOKENIZER}"
            )
    batch_size = loaded.config.data.batch_size
    batches = pretrained.eval_rows(datasets, batch_size, split=split, max_rows=rows)
    where = ", ".join(str(dataset.directory) for dataset in datasets)
    unigram = pretrained.unigram_entropy([dataset.info for dataset in datasets])
    metrics = loop.evaluate(loaded.placement, loaded.state, batches)
    print(f"{directory} at step {loaded.step}, {split} split of {where}:")
    show(metrics)
    print(f"  {'unigram':<18} {unigram:.4f}  (entropy of single tokens)")
    return {"step": loaded.step, "data": where, "split": split, **metrics}


def evaluate_tuned(
    directory: StoragePath,
    out: Path,
    data: Path | None,
    split: Literal["train", "validation"],
    rows: int | None,
    step: int | None,
    base: str | None,
    on_bad_row: Literal["raise", "skip"] | None,
) -> dict[str, Any]:
    """On labelled examples."""
    loaded = finetuned.open_finetuned(directory, step=step, base=base)
    task, labels = loaded.task, loaded.labels
    if data is None:
        examples, where = getattr(loaded.splits(), split), f"its {split} data"
    else:
        records = like(loaded.config.data.train, data).records()
        examples = read_records(
            records, task.read, on_bad_row or loaded.config.data.on_bad_row, "--on-bad-row"
        )
        where = str(data)
    examples = examples[:rows]
    sums, outputs = loaded.outputs(examples)
    assert sums is not None  # the examples are labelled
    metrics = {"loss": sums.means()["loss"], **task.metrics(examples, labels, outputs)}
    number = int(loaded.state.step)
    print(f"{directory} at step {number}, {len(examples):,} examples of {where}:")
    show(metrics)
    predictions = task.predictions(examples, labels, outputs)
    wrong = report.most_wrong(predictions)
    if wrong:
        make_console().print(report.predictions_table(wrong[:10]))
        report.write_jsonl(wrong, out / "wrong.jsonl")
        print(f"  the {len(wrong)} most wrong are in {directory / 'wrong.jsonl'}")
    for name, content in task.plots(examples, labels, outputs, out).items():
        print(f"  {content}: {directory / name}")
    return {"step": number, "data": where, "examples": len(examples), **metrics}


def show(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        print(f"  {name:<18} {value:.4f}")


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
