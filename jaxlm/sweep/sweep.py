"""A sweep from the command line to its table: ``sweep.md``, ``sweep.json`` and ``sweep.png``."""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.evaluate import plots, report
from jaxlm.runs import command_line
from jaxlm.runtime.console import make_console
from jaxlm.runtime.storage import write_whole
from jaxlm.sweep import space
from jaxlm.sweep.process import RunTrial
from jaxlm.sweep.space import short_label, shown
from jaxlm.sweep.trials import Plan, Result, cost, failures, paragraph, run_all, watched

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Train one config over values of its fields, times seeds, and compare the scores.

    Behind -- come changes that hold for all trials, such as -- --train.epochs 3. Each trial is a
    run folder in runs/NAME. The same command resumes where it was stopped, retries what failed,
    and, with further values, adds trials.
    """

    config: tyro.conf.Positional[Path]
    """A config file of fine-tuning or pretraining."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FIELD=VALUES")
    ] = ()
    """A field and its values, once for each field: optimizer.peak_lr=1e-3,3e-3; with --random also
    1e-5..1e-3:log (evenly in the logarithm) or 0.0..0.3 (evenly). Spaces separate what is inside
    one value of many parts; tuning=LoraConfig,Full names classes: the config's own as it is, others
    with their defaults."""
    seeds: int = 1
    """Runs of each candidate, with train.seed, train.seed + 1 and so on."""
    random: int | None = None
    """Number of random combinations to draw; None: all of them, a grid."""
    draw_seed: int = 0
    """Seed of --random; a longer draw begins with the candidates of a shorter one."""
    halving: int | None = None
    """Successive halving: start all on a small share of the epochs or steps, and give the best 1/N
    of them N times as much, up to the whole; each starts afresh, as its learning rate decays over
    its own length. 3 is usual. None = all get the whole."""
    metric: str | None = None
    """Decides which checkpoint and which trial is best; None = the config's, or the task's own."""
    name: str | None = None
    """Name of the sweep's folder; None: the config's name with _sweep appended."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("random", 1), ("halving", 2)):
            value = vars(self)[name]
            if value is not None and value < least:
                raise InputError(f"--{name} {value} is less than {least}")
        if self.draw_seed < 0:
            raise InputError(f"--draw-seed {self.draw_seed} is less than 0")


def load(argv: Sequence[str] | None = None) -> Plan:
    """What the command line asks for; exits on ``--help`` and on an option that does not exist."""
    asked, changes = parse(SweepConfig, argv)
    config = command_line.read(asked.config)
    prog = f"{Path(sys.argv[0]).name} {asked.config} --"
    return make_plan(asked, command_line.changed(config, changes, prog=prog))


def parse(kind: type[T], argv: Sequence[str] | None) -> tuple[T, list[str]]:
    """Options of ``kind``, and behind -- the changes to the config of every run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    return tyro.cli(kind, prog=Path(sys.argv[0]).name, args=argv[:split]), argv[split + 1 :]


def make_plan(asked: SweepConfig, config: Config) -> Plan:
    """Check names and values against the config, and list the candidates."""
    varied = space.read_space(config, asked.set)
    metric, monitor = watched(config, asked.metric)
    name = f"{config.name}_sweep" if asked.name is None else asked.name
    configs.check_name(name)
    return Plan(
        config=config,
        name=name,
        candidates=space.candidates(config, varied, num_random=asked.random, seed=asked.draw_seed),
        num_seeds=asked.seeds,
        eta=asked.halving,
        metric=metric,
        monitor=monitor,
    )


def sweep(plan: Plan, run_trial: RunTrial, console: Console | None = None) -> Path:
    """Run all trials that are not finished, and leave the table and the plot; returns the folder.

    Whatever ends it early, Ctrl-C too, leaves the table of what there is, and can be resumed.
    """
    console = console or make_console()
    latest: list[Result] = []

    def record(results: Sequence[Result]) -> None:
        latest[:] = results
        write_whole(plan.directory / "sweep.json", _as_json(plan, results))

    with alone(plan.directory):
        try:
            run_all(plan, run_trial, console, record)
        except KeyboardInterrupt:
            console.print("stopped: the same command resumes from here")
            raise
        finally:
            if latest:
                summarize(plan, latest, console)
    return plan.directory


def summarize(plan: Plan, results: Sequence[Result], console: Console) -> None:
    """Print the table, and write it and the plot to the sweep's folder."""
    scores = _scores(plan, results)
    failed = failures(results)
    seeds = "1 seed" if plan.num_seeds == 1 else f"mean ± sd of {plan.num_seeds} seeds"
    title = f"{plan.name}: {plan.metric} of the best checkpoint, {seeds}"
    if len(plan.rungs()) > 1:
        title += ", by the share of the budget"
    text = f"# {title}\n\n{report.summary_markdown(scores)}{paragraph(failed)}"
    write_whole(plan.directory / "sweep.md", text)
    console.print(f"\n{title}", soft_wrap=True)  # above the table it would be as narrow as that
    console.print(report.summary_table(scores))
    for sentence in failed:
        console.print(sentence, markup=False, soft_wrap=True)
    first = plan.rungs()[0][0]  # where all candidates are
    drawn = [r for r in results if r.error is None and r.trial.share == first]
    if drawn:
        names = dict.fromkeys(name for r in drawn for name in r.trial.settings) or {"seed": None}
        plots.plot_sweep(
            [
                {name: shown(r.trial.settings.get(name, r.trial.seed if name == "seed" else None))
                 for name in names}
                for r in drawn
            ],
            [r.score for r in drawn],
            plan.directory / "sweep.png",
            metric=plan.metric,
        )  # fmt: skip


def _scores(plan: Plan, results: Sequence[Result]) -> dict[str, dict[str, list[float]]]:
    """Candidate → metric, in each rung → a score for each seed; best first."""
    groups: dict[str, dict[Fraction, list[Result]]] = {}
    for result in results:
        name = ", ".join(short_label(result.trial.settings)) or plan.config.name
        group = groups.setdefault(name, {})
        group.setdefault(result.trial.share, []).append(result)

    def rank(group: dict[Fraction, list[Result]]) -> tuple[float, bool, float]:
        last = max(group)
        failed = any(result.error is not None for result in group[last])
        return -float(last), failed, cost(plan, group[last])

    table = {}
    shares = [share for share, _ in reversed(plan.rungs())]
    for name, group in sorted(groups.items(), key=lambda item: rank(item[1])):
        table[name] = {
            plan.metric if share == 1 else f"{plan.metric} at {share}": [
                r.score for r in group.get(share, ()) if r.error is None
            ]
            for share in shares
        }
    return table


def _as_json(plan: Plan, results: Sequence[Result]) -> str:
    trials = [
        {
            "name": r.trial.name,
            "settings": {name: shown(value) for name, value in r.trial.settings.items()},
            "seed": r.trial.seed,
            "budget": float(r.trial.share),
            "score": None if r.error is not None else r.score,
            "step": r.step,
            "seconds": round(r.seconds, 1),
            "error": r.error,
        }
        for r in results
    ]
    table = [{"settings": name, **columns} for name, columns in _scores(plan, results).items()]
    head = {"name": plan.name, "metric": plan.metric, "num_seeds": plan.num_seeds, "eta": plan.eta}
    return json.dumps({**head, "table": table, "trials": trials}, indent=2) + "\n"


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """One sweep at a time in a folder; a trial's process holds the lock as well."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise InputError(f"the sweep's folder {directory} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another sweep is running in {directory}: wait for it, or give another --name"
            ) from None
        os.set_inheritable(file.fileno(), True)
        yield
