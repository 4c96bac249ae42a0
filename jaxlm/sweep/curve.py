"""Learning curves: what configs reach with more and more examples of each class."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.evaluate import plots, report
from jaxlm.runs import command_line
from jaxlm.runtime.console import make_console
from jaxlm.runtime.storage import on_disk, write_whole
from jaxlm.sweep.process import RunTrial
from jaxlm.sweep.sweep import alone, parse
from jaxlm.sweep.trials import AllFailed, Plan, Result, failures, paragraph, run_all, watched

Scores = dict[str, dict[int, list[float]]]  # config → examples per class → a score for each seed


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """Train fine-tuning configs on a few examples of each class, then on more, and draw the scores.

    Behind -- come changes that hold for all runs, such as -- --data.batch-size 16. Each run is a
    run folder in runs/NAME/CONFIG. The same command resumes where it was stopped.
    """

    configs: tyro.conf.Positional[tuple[Path, ...]]
    """Config files of one task."""
    sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1000)
    """Examples of each class."""
    seeds: int = 3
    """Runs of each config and size; every seed draws other examples, too."""
    steps: int = 300
    """Steps of every run: in epochs, a few examples would hardly be trained on."""
    base: str | None = None
    """The encoder of the configs that have one; None = as they say."""
    name: str = "learning_curve"
    """Name of the folder of all runs."""

    def __post_init__(self) -> None:
        if not self.configs or not self.sizes:
            raise InputError("a learning curve needs config files, and --sizes of training data")
        configs.check_name(self.name)
        for name, least in (
            ("sizes", min(self.sizes)),
            ("seeds", self.seeds),
            ("steps", self.steps),
        ):
            if least < 1:
                raise InputError(f"--{name} {least} is less than 1")


def load(argv: Sequence[str] | None = None) -> tuple[CurveConfig, list[Plan]]:
    """What the command line asks for, and for each config and seed the runs of all sizes."""
    asked, changes = parse(CurveConfig, argv)
    plans = [_plans(asked, path, changes) for path in asked.configs]
    names = [of_config[0].name for of_config in plans if of_config]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two of the configs are named {name}: give each a name of its own")
    return asked, [plan for of_config in plans for plan in of_config]


def _plans(asked: CurveConfig, path: Path, changes: list[str]) -> list[Plan]:
    config = command_line.load(FinetuneConfig, [str(path), *changes])
    configs.check_name(config.name)
    if asked.base is not None and config.base is not None:
        config = dataclasses.replace(config, base=asked.base)
    steps = dataclasses.replace(config.train, steps=asked.steps, epochs=None, minutes=None)
    metric, monitor = watched(config, None)
    first = config.train.seed
    return [
        Plan(
            config=dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, split_seed=seed),
                train=dataclasses.replace(steps, seed=seed),
            ),
            name=f"{asked.name}/{config.name}",
            candidates=[{"data.few_shot": size} for size in sorted(set(asked.sizes))],
            num_seeds=1,
            eta=None,
            metric=metric,
            monitor=monitor,
        )
        for seed in range(first, first + asked.seeds)
    ]


def curve(
    asked: CurveConfig,
    plans: Sequence[Plan],
    run_trial: RunTrial,
    console: Console | None = None,
) -> Path:
    """Run what is not finished; leaves ``curve.json``, ``curve.md`` and ``curve.png``.

    Whatever ends it early leaves the curve of what there is. Returns the folder.
    """
    console = console or make_console()
    metrics = sorted({plan.metric for plan in plans})
    if len(metrics) > 1:
        raise InputError(f"the configs are judged by different metrics, {' and '.join(metrics)}")
    directory = on_disk(plans[0].config.runs / asked.name)
    scores: Scores = {}
    failed: list[str] = []
    bases: dict[str, tuple[str, Path]] = {}

    with alone(directory):
        try:
            for plan in plans:
                name = plan.config.name
                own = scores.setdefault(name, {})

                def record(
                    results: Sequence[Result],
                    own: dict[int, list[float]] = own,
                    name: str = name,
                ) -> None:
                    newest = results[-1]
                    failed.extend(failures([newest], of=f"{name}/"))
                    if newest.error is None:
                        size = newest.trial.settings["data.few_shot"]
                        own.setdefault(size, []).append(newest.score)

                console.print(f"{name}, seed {plan.config.train.seed}")
                with contextlib.suppress(AllFailed):  # the others may not
                    run_all(plan, run_trial, console, record, bases)
        except KeyboardInterrupt:
            console.print("stopped: the same command resumes from here")
            raise
        finally:
            if any(scores.values()):
                summarize(directory, scores, metrics[0], console, failed)
    if not any(scores.values()):
        raise AllFailed(f"all {len(failed)} trials failed, the first: {failed[0]}")
    return directory


def summarize(
    directory: Path, scores: Scores, metric: str, console: Console, failed: Sequence[str] = ()
) -> None:
    """Print the table, and write it and the plot."""
    write_whole(directory / "curve.json", json.dumps({metric: scores}, indent=2) + "\n")
    drawn = {name: own for name, own in scores.items() if own}
    columns = {name: {str(n): own[n] for n in sorted(own)} for name, own in drawn.items()}
    title = f"{metric} by examples per class, mean ± sd over seeds"
    text = f"# {title}\n\n{report.summary_markdown(columns)}{paragraph(failed)}"
    write_whole(directory / "curve.md", text)
    console.print(f"\n{title}", soft_wrap=True)
    console.print(report.summary_table(columns))
    for sentence in failed:
        console.print(sentence, markup=False, soft_wrap=True)
    plots.plot_learning_curves(drawn, directory / "curve.png", y_label=metric)
