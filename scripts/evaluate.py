"""Evaluate a run, pretrained or fine-tuned: ``python scripts/evaluate.py runs/quickstart``.

Or what a run may start from, before it does: a published model's folder, with ``--data``.
"""

from jaxlm.runtime.allocator import tune_process
from jaxlm.runtime.console import make_console

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.config import PretrainConfig
from jaxlm.data import prepared
from jaxlm.data.labelled import parallel, spelling
from jaxlm.data.labelled.dataset import encode_usable, in_encoding, like, read_records, reading
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.labelled.records import Record
from jaxlm.decode.beam import BeamConfig, Writing
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError, report_input_errors
from jaxlm.evaluate import report
from jaxlm.nn.choose import Wanted
from jaxlm.runs import phase, pretrained, published_task
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.finite import require_finite_loss
from jaxlm.runs.folder import CONFIG, TOKENIZER, is_run, read_config
from jaxlm.runs.published import open_published
from jaxlm.runs.writing import GREEDY_BEAM, chosen_way
from jaxlm.runtime.storage import StoragePath, absolute, locate, upload
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.task import Generative, Scored

EVAL = "eval.json"
GREEDY = GenerateConfig()


def main(
    directory: Annotated[Path, tyro.conf.Positional],
    /,
    data: Path | None = None,
    target: Path | None = None,
    encoding: str | None = None,
    split: Literal["train", "validation"] = "validation",
    rows: int | None = None,
    stride: int | None = None,
    step: int | None = None,
    base: str | None = None,
    out: Path | None = None,
    int8: bool = False,
    attention: Wanted = "auto",
    on_bad_row: Literal["raise", "skip"] | None = None,
    generate: GenerateConfig = GREEDY,
    beam: BeamConfig = GREEDY_BEAM,
) -> None:
    """Metrics, printed and written to eval.json.

    Of a pretrained run: loss, perplexity, and accuracy at masks. Of a fine-tuned run: its task's
    metrics; the most wrong examples in wrong.jsonl; confusion.png and reliability.png, where there
    are classes. On all of the run's own validation data, measured as by default, these files are
    in the run folder; else in its eval/, in a folder for each data set and each other --split,
    --rows, --stride, --step, --int8, --generate and --beam, which eval.json says (`options`).

    Args:
        directory: The run folder, or a published model's (of one with a task's head also its name
            on the hub), to be evaluated as it is on --data.
        data: Prepared data, or a file of labelled data with the columns of training; None = the
            run's own.
        target: Of a run that writes targets for sources: the file of targets, where --data has a
            source a line; None = --data has both.
        encoding: That of a file of labelled data, such as windows-1252; None = as in training.
        split: Which part of the run's own data, or of prepared data.
        rows: How many rows or examples; None = all.
        stride: Of a causal run: read windows as long as the model allows, each so many tokens after
            the one before, of which only these count; so they are predicted from longer contexts
            than rows give. None = rows as they are.
        step: Which checkpoint; None = the best, or the mean of the last, as the run's config says.
        base: The encoder of an adapter, if it has moved: a run folder, a folder or a hub name.
        out: The folder for these files; None = in the run folder or its eval/, or of a published
            model in eval/.
        int8: Of a pretrained run: round weights, and what they multiply, to 8 bits.
        attention: How it is computed, whatever training used; auto = as suits devices and rows.
        on_bad_row: Whether records of labelled data that cannot be used end it, or are left out;
            None = as in training.
        generate: How targets are written for sources.
        beam: Or search the likeliest targets, so many at a time.
    """
    if rows is not None and rows < 1:
        raise InputError(f"--rows {rows} is not above 0")
    if target is not None and data is None:
        raise InputError(f"--target {target} is the other side of --data: give both")
    if encoding is not None and data is None:
        raise InputError(f"--encoding {encoding} is that of --data: leave it out")
    way = chosen_way(generate, beam)
    options = options_of(rows, stride, step, int8, generate, beam)
    folder = locate(directory)
    is_tuned = published_task.is_tuned(str(directory))
    if is_tuned and data is None and not is_run(folder):
        raise InputError(f"{directory} is no run, and has no data of its own: give some (--data)")
    if not is_run(folder) and (is_tuned or (folder / CONFIG).is_file()) and out is None:
        # A published model's folder is not ours to write in.
        out = Path("eval") / named(directory.name, options)
    with tempfile.TemporaryDirectory() as scratch:
        if is_tuned:
            if int8:
                raise InputError(f"--int8 is for pretrained runs, and {directory} is fine-tuned")
            result = evaluate_tuned(
                folder,
                Path(scratch),
                data,
                target,
                encoding,
                split,
                rows,
                step,
                base,
                on_bad_row,
                way,
                attention,
            )
        else:
            if encoding is not None:
                raise InputError(
                    f"--encoding {encoding} is for labelled data, and {directory} is pretrained"
                )
            result = evaluate_pretrained(folder, data, split, rows, stride, step, int8, attention)
        if data is not None:
            result["path"] = os.fspath(absolute(locate(data)))
        if options:
            result["options"] = options
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in result.items()
        }
        (Path(scratch) / EVAL).write_text(json.dumps(finite, indent=2) + "\n")
        into = locate(out) if out else folder_of(folder, data, split, options)
        try:
            into.mkdir(parents=True, exist_ok=True)
            upload(Path(scratch), into)
        except OSError as error:
            reason = f"{into} cannot be written ({error.strerror or error})"
            if out is not None:
                raise InputError(f"{reason}: name another folder for --out") from error
            print(f"nothing was written: {reason}; --out FOLDER writes elsewhere")
            return
        print(f"  in {into}: {', '.join(sorted(path.name for path in Path(scratch).iterdir()))}")


def options_of(
    rows: int | None,
    stride: int | None,
    step: int | None,
    int8: bool,
    generate: GenerateConfig,
    beam: BeamConfig,
) -> dict[str, Any]:
    """What metrics depend on and is not as by default, in JSON."""
    given = {"rows": rows, "stride": stride, "step": step, "int8": int8 or None}
    found = {name: value for name, value in given.items() if value is not None}
    for name, config, usual in (("generate", generate, GREEDY), ("beam", beam, GREEDY_BEAM)):
        others = {k: v for k, v in vars(config).items() if v != vars(usual)[k]}
        found |= {f"{name}.{k}": v for k, v in others.items()}
    return json.loads(json.dumps(found))


def named(name: str, options: Mapping[str, Any]) -> str:
    """The name of a folder with these options: the rows 10 of x are x-rows-10."""
    parts = (k if v is True else f"{k}-{v}" for k, v in options.items())
    joined = "-".join([name, *(re.sub(r"[^\w.]+", "-", part).strip("-")[:40] for part in parts)])
    return os.fsencode(joined)[:200].decode(errors="ignore")  # file systems allow 255 bytes


def folder_of(
    run: StoragePath, data: Path | None, split: str, options: Mapping[str, Any]
) -> StoragePath:
    """Where the files of an evaluation go: the run's own are of its validation data by default.

    What has the same name gets numbers; each finds its own again.
    """
    if data is None and split == "validation" and not options:
        return run
    path = None if data is None else os.fspath(absolute(locate(data)))
    name = split if data is None else (data.stem or data.name)
    if data is not None and split != "validation" and data.is_dir():
        name = f"{name}-{split}"
    name = named(name, options)
    for number in itertools.count(1):
        folder = run / "eval" / (name if number == 1 else f"{name}-{number}")
        try:
            known = json.loads((folder / EVAL).read_text(encoding="utf-8"))
            same = known.get("path") == path and known.get("options", {}) == options
        except (OSError, ValueError, AttributeError):
            return folder
        if same:
            return folder
    raise AssertionError


def evaluate_pretrained(
    directory: StoragePath,
    data: Path | None,
    split: str,
    rows: int | None,
    stride: int | None,
    step: int | None,
    int8: bool,
    attention: Wanted,
) -> dict[str, Any]:
    """On rows of prepared data, or on windows over them."""
    if is_run(directory) or not (directory / CONFIG).is_file():
        paths = read_config(directory, PretrainConfig).data.paths if data is None else (data,)
        datasets = [prepared.open_prepared(path) for path in paths]
        length = datasets[0].info.row_length if stride is None else None
        loaded = pretrained.open_pretrained(
            directory,
            step,
            attention=attention,
            row_length=length,
            data=datasets[0].info,
        )
        for dataset in datasets if stride is None else ():
            assert loaded.config.model is not None  # resolved
            pretrained.check_rows(directory, loaded.config.model, dataset)
        if data is not None and has_new_tokens(loaded, datasets[0]):
            task, averaged = loaded.config.task, loaded.averaged
            options: dict[str, Any] = {"attention": attention, "task": task, "step": step}
            begun = open_published(str(directory), datasets[0], **options)
            loaded = replace(begun, averaged=averaged)
            print("tokens that are new in the data are the means of the pieces that they were")
    elif data is None or step is not None:
        raise InputError(
            f"{directory} is no run, and has neither data nor steps of its own: give --data, and "
            "no --step"
        )
    else:
        datasets = [prepared.open_prepared(data)]
        loaded = open_published(str(directory), datasets[0], attention=attention)
    if stride is not None and not isinstance(loaded.task, Generative):
        raise InputError(
            f"--stride {stride} is for causal runs, and {directory} was trained for "
            f"{type(loaded.task).__name__}: leave it out"
        )
    for dataset in datasets:
        if dataset.info.tokenizer_sha256 != loaded.cursor["tokenizer_sha256"]:
            raise InputError(
                f"{dataset.directory} was prepared with another tokenizer than the run's: prepare "
                f"it again with scripts/prepare.py --tokenizer.path {directory / TOKENIZER}"
            )
    batch_size = loaded.config.data.batch_size
    model = loaded.config.model
    assert model is not None  # resolved
    longest = model.max_length or datasets[0].info.row_length
    windows = None if stride is None else {"length": longest, "stride": stride}
    before = pretrained.tokens_before(loaded.task)
    batches = pretrained.eval_rows(
        datasets, batch_size, split=split, max_rows=rows, windows=windows, before=before
    )
    where = ", ".join(str(dataset.directory) for dataset in datasets)
    infos = [dataset.info for dataset in datasets]
    loaded = loaded.quantized() if int8 else loaded
    if loaded.attends:
        print(loaded.attends)
    metrics = pretrained.measure(loaded.placement, loaded.state, batches, loaded.task, infos, split)
    require_finite_loss(metrics, loaded.variables)
    print(f"{directory} at {at(loaded.averaged)}, {split} split of {where}:")
    show(metrics)
    for name, unlearned in pretrained.unlearned(loaded.task, infos, split).items():
        print(f"  {name:<18} {unlearned:.4f}")
    about = {"step": loaded.step, "averaged": list(loaded.averaged), "data": where, "split": split}
    return {**about, **metrics}


def has_new_tokens(loaded: pretrained.Pretrained, data: prepared.Prepared) -> bool:
    """Whether data were cut by the run's tokenizer and more tokens, which a base can begin with."""
    if data.info.tokenizer_sha256 == loaded.cursor["tokenizer_sha256"]:
        return False
    return loaded.variables["params"].keys() <= {"encoder", "head"} and phase.continues(
        loaded.tokenizer, data
    )


def evaluate_tuned(
    directory: StoragePath,
    out: Path,
    data: Path | None,
    target: Path | None,
    encoding: str | None,
    split: Literal["train", "validation"],
    rows: int | None,
    step: int | None,
    base: str | None,
    on_bad_row: Literal["raise", "skip"] | None,
    generate: Writing,
    attention: Wanted,
) -> dict[str, Any]:
    """On labelled examples."""
    loaded = published_task.open_tuned(str(directory), step=step, base=base, attention=attention)
    task, labels = loaded.task, loaded.labels
    options: Any = (on_bad_row or loaded.config.data.on_bad_row, "--on-bad-row")
    if data is None:
        found, where = getattr(loaded.splits(), split), f"its {split} data"
    else:
        given = list(records_of(loaded, data, target, encoding))
        found, where = read_records(given, reading(task), *options), str(data)
    found = spelling.alike(found[:rows], labels)
    encode = partial(task.for_evaluation().encode, loaded.framer, labels=labels)
    examples, encoded = encode_usable(encode, found, *options)
    for note in (*spelling.notes(examples), *encoded.notes):
        print(f"note: {note}")
    if loaded.attends:
        print(loaded.attends)
    sums, outputs = loaded.outputs(examples)
    assert sums is not None  # the examples are labelled
    signatures = {}
    if isinstance(task, Scored):
        written = list(loaded.responder.respond(examples, generate))
        outputs, signatures = {**outputs, "written": written}, task.signatures()
    metrics = {"loss": sums.means()["loss"], **task.metrics(examples, labels, outputs)}
    which = at(loaded.averaged)
    print(f"{directory} at {which}, {len(examples):,} examples of {where}:")
    show(metrics)
    for name, signature in signatures.items():
        print(f"  {name}: {signature}")
    predictions = task.predictions(examples, labels, outputs)
    wrong = report.most_wrong(predictions)
    if wrong:
        console = make_console()
        console.print(report.predictions_table(wrong[:10], width=console.width))
    if predictions:
        report.write_jsonl(wrong, out / "wrong.jsonl")
        print(f"  wrong.jsonl: the {len(wrong)} most wrong")
    for name, content in task.plots(examples, labels, outputs, out).items():
        print(f"  {name}: {content}")
    known = {f"{name}_signature": signature for name, signature in signatures.items()}
    number = int(loaded.state.step)
    about = {"step": number, "averaged": list(loaded.averaged), "data": where}
    return about | {"examples": len(examples), **metrics, **known}


def records_of(
    loaded: FinetunedRun, data: Path, target: Path | None, encoding: str | None = None
) -> Iterator[Record]:
    """Those of a file as in training, or of the pairs of lines of two."""
    train = in_encoding(loaded.config.data.train, encoding)
    if target is None:
        return in_encoding(like(train, data), encoding).records()
    if not isinstance(loaded.task, Seq2Seq):
        raise InputError(f"--target {target} is for runs of Seq2Seq: leave it out")
    fields = loaded.task.fields
    encoding = train.encoding if isinstance(train, ParallelText) else encoding
    return parallel.read(str(data), str(target), (fields.source, str(fields.target)), encoding)


def at(steps: Sequence[int]) -> str:
    """Which checkpoints a model is the mean of."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"the mean of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"


def show(metrics: dict[str, float]) -> None:
    width = max(18, *map(len, metrics))
    for name, value in metrics.items():
        shown = f"{value:.4f}" if abs(value) < 1e4 else f"{value:,.6g}"
        undefined = "" if math.isfinite(value) else "  (undefined on these predictions)"
        print(f"  {name:<{width}} {shown}{undefined}")


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
