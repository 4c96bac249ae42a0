"""The README of a model's folder: what it was made of, how, and what was measured."""

import json
import math
from pathlib import Path
from typing import Any

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import Source
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.task_head import settings
from jaxlm.train.metrics import read_jsonl

# What the hub calls a use.
_USES = {
    "classify": "text-classification",
    "tag": "token-classification",
    "answer": "question-answering",
    "choose": "multiple-choice",
    "embed": "sentence-similarity",
    "translate": "translation",
    "generate": "text-generation",
}


def write(run: FinetunedRun, directory: Path, left_out: str = "") -> str:
    """The card of a run; its metrics are those of its last evaluation, or of its training.

    An evaluation of some of the examples, or with other options, is none of the run's.
    """
    config, step = run.config, int(run.state.step)
    header = {"library_name": "transformers", "tags": ["jaxlm"]}
    if config.task.verb in _USES:
        header["pipeline_tag"] = _USES[config.task.verb]
    if config.base is not None and not Path(config.base).is_absolute():
        header["base_model"] = config.base
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    labels = [f"- labels: {', '.join(run.labels)}"] if run.labels else []
    answering = [f"{name}={value}" for name, value in settings(config.task).items()]
    answers = [f"- answers: {', '.join(answering)}"] if answering else []
    measured = [f"| {name} | {value:.4f} |" for name, value in _metrics(run, directory).items()]
    table = ["", "| metric | on the validation data |", "|---|---:|", *measured] if measured else []
    return "\n".join(
        [
            *("---", *lines, "---", f"# {config.name}", ""),
            f"Trained with jaxlm: {type(config.task).__name__}, step {step} of "
            f"{config.train.steps or step}, in float32{left_out}.",
            "",
            *_settings(config),
            *labels,
            *answers,
            *table,
            "",
        ]
    )


def _settings(config: FinetuneConfig) -> list[str]:
    """What a reader needs to train the same; of files the names alone."""
    data, base = config.data, config.base
    if base is not None and Path(base).is_absolute():
        base = Path(base).name
    held_out = f"{data.validation_fraction:.0%} of the training data, held out"
    validation = held_out if data.validation is None else _name(data.validation)
    return [
        f"- base: {base or 'none'}",
        f"- data: {_name(data.train)}; validation: {validation}",
        f"- tuning: {type(config.tuning).__name__.removesuffix('Config')}; learning rate "
        f"{config.optimizer.peak_lr:g}; {data.batch_size} examples a step, of at most "
        f"{data.max_length} tokens; seed {config.train.seed}",
    ]


def _name(source: Source) -> str:
    given: Any = vars(source)
    path = given.get("path") or given.get("source") or given.get("name")
    paths = path if isinstance(path, tuple | list) else [path or type(source).__name__]
    return ", ".join(Path(str(one)).name for one in paths)


def _metrics(run: FinetunedRun, directory: Path) -> dict[str, float]:
    """On all of its own validation data, of these parameters: finite numbers by name."""
    step, averaged = int(run.state.step), list(run.averaged)
    found: dict[str, Any] = {}
    if len(averaged) == 1 and (directory / "metrics.jsonl").is_file():
        for line in read_jsonl(directory / "metrics.jsonl"):
            if line.get("step") == step:
                own = {k: v for k, v in line.items() if k.startswith("eval/")}
                found |= {name.removeprefix("eval/"): value for name, value in own.items()}
    if (directory / "eval.json").is_file():
        evaluated = json.loads((directory / "eval.json").read_text(encoding="utf-8"))
        same = evaluated.get("step") == step and evaluated.get("averaged", averaged) == averaged
        if same and "path" not in evaluated and "options" not in evaluated:
            found |= {k: v for k, v in evaluated.items() if k not in ("step", "examples")}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
