"""Use a run: ``python scripts/predict.py runs/quickstart fill-mask "A [MASK] of strings."``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm import run as runs
from jaxlm.errors import InputError, report_input_errors
from jaxlm.fill_mask import MASK, FillMask


def main(
    run: Annotated[Path, tyro.conf.Positional],
    task: Annotated[Literal["fill-mask"], tyro.conf.Positional],
    text: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    file: Path | None = None,
    out: Path | None = None,
    top_k: int = 5,
    step: int | None = None,
) -> None:
    """The likeliest words for each [MASK] of a text.

    Args:
        run: The run folder.
        task: What to do.
        text: What to do it with; or give --file.
        file: A text a line, - for standard input; the answer is a JSON object a line.
        out: Where the JSON lines go; None = standard output.
        top_k: Candidates for each blank.
        step: Which checkpoint; None = the best.
    """
    if (text is None) == (file is None):
        raise InputError('give either a text, such as "A [MASK] of strings.", or --file')
    if out is not None and (file is None or not out.parent.is_dir() or out.is_dir()):
        raise InputError(
            f"--out {out} must be a file in a folder that is there, and goes with --file"
        )
    lines = [] if file is None else read_lines(file)
    loaded = runs.open_run(run, step)
    fill = FillMask(
        runs.make_model(loaded.config.model).apply,
        loaded.variables,
        loaded.tokenizer,
        loaded.config.model.max_length,
    )
    if text is not None:
        for blank in next(fill([text], top_k=top_k)):
            for filling in blank:
                print(f"{filling.probability:6.1%}  {filling.token:<15} {filling.text}")
        return
    answers = (
        {"text": line, "blanks": [[asdict(filling) for filling in blank] for blank in blanks]}
        for line, blanks in zip(lines, fill(lines, top_k=top_k), strict=True)
    )
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is None:
        print(text, end="")
    else:
        try:
            out.write_text(text)
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error}") from error
        print(f"{len(lines)} answers in {out}")


def read_lines(file: Path) -> list[str]:
    """The file's lines that are not blank."""
    if str(file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and MASK not in line:
            raise InputError(f"{file}:{number} has no blank: write {MASK} where a word is missing")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{file} holds no text")
    return lines


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
