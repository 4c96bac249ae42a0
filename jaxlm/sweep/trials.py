"""The trials of a sweep: ordinary run folders, run once each, with successive halving or without.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all candidates get a
small share of the budget, the best 1/eta of them a share eta times as large, up to the whole. A
trial of the next rung starts afresh: the learning rate decays over the length of a run, so one that
resumed from a shorter run, decayed already, would not be the full run that it stands for. All rungs
have about the same cost, and the last one's trials are those of a sweep without halving.
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxlm import config as configs
from jaxlm.config import Config, FinetuneConfig
from jaxlm.data.labelled.dataset import fingerprint
from jaxlm.data.prepared import INFO, read_info
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import higher_is_better
from jaxlm.runs import best, folder
from jaxlm.runtime.storage import locate, on_disk, write_whole
from jaxlm.sweep.process import TRIAL, RunTrial
from jaxlm.sweep.space import Settings, label, replaced, short_label
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import Monitor, list_steps, peek
from jaxlm.train.view import METRICS

RESULT = "result.json"  # in the folder of a trial that is finished
# What may change when a sweep is resumed: where it runs, and who is told.
FREE = ("name", "runs", "resume", "wandb", "mesh", "placement")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep does; ``metric`` is taken at the checkpoint that ``monitor`` finds best."""

    config: Config
    name: str
    candidates: Sequence[Settings]
    num_seeds: int
    eta: int | None
    metric: str
    monitor: Monitor

    @property
    def directory(self) -> Path:
        """The folder of all trials."""
        return on_disk(self.config.runs / self.name)

    def rungs(self) -> list[tuple[Fraction, int]]:
        """Share of the budget and number of candidates, of each rung."""
        counts = [len(self.candidates)]
        while self.eta and counts[-1] >= self.eta:
            counts.append(counts[-1] // self.eta)
        last = len(counts) - 1
        return [(Fraction(1, (self.eta or 1) ** (last - i)), n) for i, n in enumerate(counts)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: a candidate under a seed, with a share of the budget."""

    settings: Settings
    seed: int
    share: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """Name of the trial's folder: ``peak_lr=0.001_rank=4_seed=0``."""
        parts = short_label(self.settings)
        if self.share < 1:
            parts.append(f"budget={self.share.numerator}of{self.share.denominator}")
        exact = "_".join([*parts, f"seed={self.seed}"])
        safe = re.sub(r"[^\w.,=+-]+", "-", exact)
        if safe == exact and len(exact) <= 120:
            return exact
        return f"{safe[:100]}_{hashlib.sha256(exact.encode()).hexdigest()[:6]}"

    def make(self, plan: Plan) -> Config:
        """Its config; raises :class:`InputError` where the settings are impossible together."""
        config = replaced(plan.config, self.settings)
        train, share = config.train, self.share
        train = dataclasses.replace(
            train,
            seed=self.seed,
            steps=train.steps and max(1, round(train.steps * share)),
            epochs=train.epochs and float(train.epochs * share),
            minutes=train.minutes and float(train.minutes * share),
        )
        config = dataclasses.replace(
            config, name=f"{plan.name}/{self.name}", resume=True, train=train
        )
        if isinstance(config, FinetuneConfig):
            config = dataclasses.replace(config, monitor=plan.metric)
        return config


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a trial ended: with a score at a step, or with an error."""

    trial: Trial
    score: float = math.nan
    step: int | None = None
    seconds: float = 0.0
    error: str | None = None
    found: bool = False
    """It was finished before, and not run again."""
    base: tuple[str, str] | None = None
    """The encoder that it began with, and the fingerprint of that."""


class AllFailed(InputError):
    """No trial of a sweep has a score."""


def failures(results: Sequence[Result], of: str = "") -> list[str]:
    """A sentence for each trial that failed; ``of`` is put before its name."""
    return [f"{of}{r.trial.name} failed: {r.error}" for r in results if r.error is not None]


def paragraph(failed: Sequence[str]) -> str:
    """What a report says of these sentences, if there are any."""
    lines = "".join(f"- {sentence}\n" for sentence in failed)
    return f"\nFailed trials, which are in no mean:\n\n{lines}" if failed else ""


def watched(config: Config, metric: str | None) -> tuple[str, Monitor]:
    """The metric of a sweep, and what says which checkpoint of a trial is best."""
    if not isinstance(config, FinetuneConfig):
        metric = metric or "loss"
        higher_is_better(metric)  # raises where there is none of that name
        return metric, Monitor()
    metric = metric or config.monitor or config.task.monitor
    return metric, best.monitor(dataclasses.replace(config, monitor=metric))


def run_all(
    plan: Plan,
    run_trial: RunTrial,
    console: Console,
    record: Callable[[Sequence[Result]], object],
    bases: MutableMapping[str, tuple[str, Path]] | None = None,
) -> None:
    """Run what is not finished, a line for each; ``record`` gets all results after each trial.

    A trial that fails is a result too, and goes to no further rung. Raises :class:`InputError`
    where a folder holds a trial of another config, no trial knows the metric, or an encoder is not
    that of the trials before, which ``bases`` keeps from one call to the next.
    """
    bases = {} if bases is None else bases
    results: list[Result] = []
    alive = list(plan.candidates)
    first_seed = plan.config.train.seed
    work = [(share, count * plan.num_seeds) for share, count in plan.rungs()]
    total, number = sum(count for _, count in work), 0
    all_work = float(sum(share * count for share, count in work))
    for rung, (share, count) in enumerate(plan.rungs(), start=1):
        alive = alive[:count]
        if len(work) > 1:
            console.print(
                f"rung {rung} of {len(work)}: {len(alive)} of {len(plan.candidates)} candidates, "
                + ("the whole budget" if share == 1 else f"{share} of the budget")
            )
        for settings in alive:
            for seed in range(first_seed, first_seed + plan.num_seeds):
                number += 1
                trial = Trial(settings=settings, seed=seed, share=share)
                with console.status(f"{number}/{total} {trial.name} …"):
                    result = _run(trial, plan, run_trial)
                _check_base(result, plan.directory / trial.name, bases)
                results.append(result)
                record(results)
                left = _time_left(results, all_work)
                console.print(f"{number}/{total} {_line(result, plan)}{left}", soft_wrap=True)
        alive = ranked(plan, [r for r in results if r.trial.share == share])
    if not any(result.error is None for result in results):
        raise AllFailed(f"all {len(results)} trials failed, the first with: {results[0].error}")


def ranked(plan: Plan, results: Sequence[Result]) -> list[Settings]:
    """The candidates of one rung that failed under no seed, by their mean, best first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(label(result.trial.settings), []).append(result)
    whole = [group for group in groups.values() if all(r.error is None for r in group)]
    whole.sort(key=lambda group: cost(plan, group))
    return [group[0].trial.settings for group in whole]


def cost(plan: Plan, results: Sequence[Result]) -> float:
    """The mean of scores, lower is better; infinite without any."""
    scores = [result.score for result in results if result.error is None]
    if not scores:
        return math.inf
    return float(np.mean(scores)) * (-1 if higher_is_better(plan.metric) else 1)


def _run(trial: Trial, plan: Plan, run_trial: RunTrial) -> Result:
    directory, began = plan.directory / trial.name, time.monotonic()
    try:
        config = trial.make(plan)
        data = _data(config)
    except InputError as error:
        return Result(trial=trial, error=str(error))
    _check_same(directory, config)
    found = (directory / RESULT).is_file()
    before = _read_result(directory / RESULT) if found else {}
    if None not in (data, before.get("data")) and before["data"] != data:
        raise InputError(
            f"{directory} was run with other data than {config.data} names now: restore them, or "
            "give the sweep another --name"
        )
    try:
        if not found:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / TRIAL, configs.to_json(config))
            run_trial(config)
        # Its checkpoints may be deleted since.
        evaluations = {before["step"]: before["metrics"]} if found else _evaluations(directory)
        name = config.base
        kept = (
            before
            if name is None or "base_sha256" in before
            else peek(directory / folder.CHECKPOINTS)
        )
    except Exception as error:  # whatever a trial may die of, the sweep continues
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        return Result(trial=trial, seconds=time.monotonic() - began, error=reason)
    known = {name for metrics in evaluations.values() for name in metrics}
    if plan.metric not in known:
        raise InputError(
            f"{directory} has no metric {plan.metric}: give --metric one of "
            f"{', '.join(sorted(known))}, and --name another name"
        )
    ranks = {step: plan.monitor.rank(step, metrics) for step, metrics in evaluations.items()}
    step = min(ranks, key=lambda step: ranks[step] or (math.inf,))
    score = evaluations[step][plan.metric]
    if ranks[step] is None or not math.isfinite(score):
        return Result(trial=trial, error=f"its {plan.metric} is not finite")
    sha256 = kept.get("base_sha256")
    if found:
        seconds = before["seconds"]
    else:
        seconds = time.monotonic() - began
        record = {"step": step, "seconds": round(seconds, 1), "metrics": evaluations[step]}
        record |= {"data": _data(config), "base_sha256": sha256}
        write_whole(directory / RESULT, json.dumps(record, indent=2) + "\n")
    base = (name, sha256) if name and sha256 else None
    return Result(trial=trial, score=score, step=step, seconds=seconds, found=found, base=base)


def _data(config: Config) -> Any:
    """What tells a trial's data from others; None: they are yet to be prepared."""
    if isinstance(config, FinetuneConfig):
        return fingerprint(config.data)
    paths = [locate(path) for path in config.data.paths]
    if not all((path / INFO).is_file() for path in paths):
        return None
    return [read_info(path).fingerprint for path in paths]


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        numbers = {"seconds": float(result["seconds"]), "step": int(result["step"])}
        return result | numbers | {"metrics": dict(result["metrics"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it, and the same command "
            "writes it again"
        ) from error


def _check_base(
    result: Result, directory: Path, bases: MutableMapping[str, tuple[str, Path]]
) -> None:
    if result.base is None:
        return
    name, sha256 = result.base
    first, where = bases.setdefault(name, (sha256, directory))
    if sha256 != first:
        raise InputError(
            f"{directory} began with another encoder (sha256 {sha256[:12]}) than {where} "
            f"({first[:12]}), both in {name}: restore it and delete the folder that began with the "
            "wrong one, or give the sweep another --name"
        )


def _evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """The validation metrics of a finished run, by step."""
    evaluations = {}
    for line in read_jsonl(directory / METRICS):
        metrics = {n.removeprefix("eval/"): x for n, x in line.items() if n.startswith("eval/")}
        if metrics:
            evaluations[int(line["step"])] = metrics
    # A run ends with an evaluation; one that a signal stops saves without any.
    newest = max(list_steps(directory / folder.CHECKPOINTS), default=0)
    if newest == 0 or newest not in evaluations:
        raise InputError(f"it was stopped at step {newest}: the same command resumes from there")
    return evaluations


def _check_same(directory: Path, config: Config) -> None:
    """A folder that holds checkpoints is resumed as what it was begun as, or not at all."""
    path = directory / TRIAL
    begun = (directory / RESULT).is_file() or list_steps(directory / folder.CHECKPOINTS)
    if not path.is_file() or not begun:
        return
    saved, now = configs.flatten(configs.read_file(path)), configs.flatten(config)
    # Types first: where they differ, so do the fields.
    for name in sorted({*saved, *now}, key=lambda name: (not name.endswith(".type"), name)):
        was, is_now = saved.get(name), now.get(name)
        if name.partition(".")[0] not in FREE and was != is_now:
            raise InputError(
                f"{directory} was begun with {name.removesuffix('.type')}={was!r}, which is now "
                f"{is_now!r}: restore it, or give the sweep another --name"
            )


def _line(result: Result, plan: Plan) -> str:
    if result.error is not None:
        return f"{result.trial.name}: failed: {result.error}"
    score = f"{result.trial.name}: {plan.metric} {result.score:.4f} at step {result.step}"
    return f"{score}, finished before" if result.found else f"{score}, {_duration(result.seconds)}"


def _time_left(results: Sequence[Result], all_work: float) -> str:
    """By the time for a share of the budget; failed trials take none of it."""
    done = float(sum(result.trial.share for result in results))
    timed = [result for result in results if result.error is None]
    share = float(sum(result.trial.share for result in timed))
    left = all_work - done
    if not timed or left <= 1e-9:
        return ""
    return f", {_duration(sum(r.seconds for r in timed) / share * left)} left"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
