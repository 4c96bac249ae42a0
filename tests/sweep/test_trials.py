"""Trials: planned, run, resumed, halved and reported, without any training."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sweep_runs import leave_run
from tiny_models import BERT

from jaxlm import config as configs
from jaxlm.config import Config, FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.augment import AugmentConfig
from jaxlm.data.loader import DataConfig
from jaxlm.errors import InputError
from jaxlm.sweep.sweep import SweepConfig, make_plan, sweep
from jaxlm.sweep.trials import Plan, Trial
from jaxlm.train.loop import TrainConfig

LR = "optimizer.peak_lr"


def plan_of(config: Config, *texts: str, **asked: Any) -> Plan:
    return make_plan(SweepConfig(config=Path("c.py"), set=texts, **asked), config)


class Fake:
    """Trains nothing; the best accuracy is where the learning rate is near 1e-3."""

    def __init__(self, fails: Callable[[Config], BaseException | None] = lambda config: None):
        self.ran: list[Config] = []
        self.fails = fails

    def __call__(self, config: Config) -> None:
        self.ran.append(config)
        if error := self.fails(config):
            raise error
        distance = abs(np.log10(config.optimizer.peak_lr) + 3)
        accuracy = 0.9 - 0.1 * distance + 0.01 * config.train.seed
        middle = {"loss": 0.5, "accuracy": accuracy}
        leave_run(config, {2: middle, 4: {"loss": 0.4, "accuracy": accuracy - 0.3}}, 4)


def run_quietly(plan: Plan, run_trial: Callable[[Config], object]) -> str:
    out = StringIO()
    sweep(plan, run_trial, Console(file=out, width=200, highlight=False))
    return out.getvalue()


def test_trials_are_ordinary_configs(config: FinetuneConfig) -> None:
    plan = plan_of(config, f"{LR}=1e-3", name="s", metric="macro_f1")
    trial = Trial(settings={LR: 1e-3, "tuning.rank": 8}, seed=2, share=Fraction(1, 3))
    made = trial.make(plan)
    assert made.directory == config.runs / "s" / "peak_lr=0.001_rank=8_budget=1of3_seed=2"
    assert (made.optimizer.peak_lr, made.train.seed, made.train.epochs) == (1e-3, 2, 3.0)
    assert isinstance(made, FinetuneConfig)
    assert made.monitor == "macro_f1"
    assert configs.from_json(configs.to_json(made)) == made
    steps = replace(plan, config=replace(config, train=TrainConfig(steps=10, minutes=3.0)))
    assert replace(trial, share=Fraction(1, 27)).make(steps).train.steps == 1
    assert trial.make(steps).train.minutes == 1.0


def test_names_of_folders_are_safe_and_different() -> None:
    a, b = (Trial(settings={"base": base}, seed=0).name for base in ("runs/a b", "runs/a/b"))
    assert a != b
    assert not {"/", " "} & set(a + b)
    long = Trial(settings={"base": "x" * 300}, seed=0).name
    assert len(long) < 120
    assert long != Trial(settings={"base": "x" * 301}, seed=0).name
    both = Trial(settings={"tuning.dropout_rate": 0.1, "a.dropout_rate": 0.2}, seed=0).name
    assert both == "tuning.dropout_rate=0.1_a.dropout_rate=0.2_seed=0"


def test_best_first_over_seeds(config: FinetuneConfig) -> None:
    plan = plan_of(config, f"{LR}=1e-5,1e-3,1e-4", seeds=2)
    fake = Fake()
    said = run_quietly(plan, fake)
    assert len(fake.ran) == 6
    assert "1/6 peak_lr=1e-05_seed=0: accuracy 0.7000 at step 2" in said
    assert "left" in said
    table = (plan.directory / "sweep.md").read_text()
    assert "| peak_lr=0.001 | **0.9050 ± 0.0071** |" in table
    assert table.index("=0.001 ") < table.index("=0.0001 ") < table.index("=1e-05 ")
    record = json.loads((plan.directory / "sweep.json").read_text())
    assert record["table"][0] == {"settings": "peak_lr=0.001", "accuracy": [0.9, 0.91]}
    assert record["trials"][0]["step"] == 2
    assert (plan.directory / "sweep.png").stat().st_size > 1000
    saved = configs.read_file(plan.directory / "peak_lr=0.001_seed=1" / "trial.json")
    assert saved == fake.ran[3]


def test_lower_is_better_of_a_loss(config: FinetuneConfig) -> None:
    plan = plan_of(config, f"{LR}=1e-3,1e-2", metric="loss")

    def run_trial(config: Config) -> None:
        leave_run(config, {4: {"loss": config.optimizer.peak_lr}}, 4)

    run_quietly(plan, run_trial)
    table = json.loads((plan.directory / "sweep.json").read_text())["table"]
    assert [row["loss"] for row in table] == [[0.001], [0.01]]


def pretraining(runs: Path) -> PretrainConfig:
    data, train = DataConfig(paths=("x",)), TrainConfig(steps=4)
    return PretrainConfig(name="p", runs=runs, data=data, model=BERT, train=train)


def test_pretraining_keeps_the_best_loss(tmp_path: Path) -> None:
    plan = plan_of(pretraining(tmp_path), f"{LR}=1e-3", metric="accuracy")
    run_quietly(plan, Fake())
    (trial,) = json.loads((plan.directory / "sweep.json").read_text())["trials"]
    assert (trial["step"], trial["score"]) == (4, pytest.approx(0.6))  # where the loss is lowest


def test_finished_trials_are_not_run_again(config: FinetuneConfig) -> None:
    def interrupt(config: Config) -> BaseException | None:
        return KeyboardInterrupt() if config.optimizer.peak_lr == 1e-4 else None

    plan = plan_of(config, f"{LR}=1e-3,1e-4,1e-5")
    with pytest.raises(KeyboardInterrupt):
        run_quietly(plan, Fake(interrupt))
    assert len(json.loads((plan.directory / "sweep.json").read_text())["trials"]) == 1
    assert "0.9000" in (plan.directory / "sweep.md").read_text()
    again = Fake()
    assert "1/3 peak_lr=0.001_seed=0: accuracy 0.9000 at step 2, finished before" in run_quietly(
        plan, again
    )
    assert [c.optimizer.peak_lr for c in again.ran] == [1e-4, 1e-5]
    more = Fake()
    run_quietly(plan_of(config, f"{LR}=1e-3,1e-4,1e-5,1e-6", seeds=2), more)
    assert len(more.ran) == 5


def test_a_finished_trial_needs_no_checkpoints(config: FinetuneConfig) -> None:
    plan, again = plan_of(config, f"{LR}=1e-3,1e-4"), Fake()
    run_quietly(plan, Fake())
    for folder in plan.directory.glob("*/checkpoints"):
        shutil.rmtree(folder)
    said = run_quietly(plan, again)
    assert (again.ran, said.count("finished before")) == ([], 2)
    assert "failed" not in said
    changed = replace(plan, config=replace(config, train=TrainConfig(steps=400)))
    with pytest.raises(InputError, match=r"seed=0 was begun with train\.epochs=.*, which is now"):
        run_quietly(changed, again)


def test_other_prepared_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretraining(tmp_path)
    plan = plan_of(config, f"{LR}=1e-3")
    run_quietly(plan, Fake())  # nothing is known of data that are not there
    (result,) = plan.directory.glob("*/result.json")
    found = json.loads(result.read_text())
    assert found["data"] is None
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "info.json").write_text("{}")
    config = replace(config, data=DataConfig(paths=(str(tmp_path / "x"),)), name="q")
    for name, content in (("one", "a"), ("one", "a"), ("one", "b")):
        info = SimpleNamespace(fingerprint=content)
        monkeypatch.setattr("jaxlm.sweep.trials.read_info", lambda path, info=info: info)
        plan = plan_of(config, f"{LR}=1e-3", name=name)
        if content == "a":
            run_quietly(plan, Fake())
    with pytest.raises(InputError, match="was run with other data"):
        run_quietly(plan, Fake())


def test_a_stopped_trial_is_not_finished(config: FinetuneConfig) -> None:
    def stop(config: Config) -> None:
        leave_run(config, {2: {"loss": 1.0, "accuracy": 0.5}}, newest=3)

    plan = plan_of(config, f"{LR}=1e-3")
    with pytest.raises(InputError, match="stopped at step 3"):
        run_quietly(plan, stop)
    again = Fake()
    run_quietly(plan, again)
    assert len(again.ran) == 1


def test_another_config_in_the_folder_is_refused(config: FinetuneConfig) -> None:
    run_quietly(plan_of(config, f"{LR}=1e-3"), Fake())
    moved = replace(config, wandb="project", placement="pmap")
    run_quietly(plan_of(moved, f"{LR}=1e-3"), Fake())
    longer = replace(config, train=TrainConfig(epochs=10.0))
    fake = Fake()
    augmented = replace(config, data=replace(config.data, augment=AugmentConfig(deletion_rate=0.5)))
    with pytest.raises(InputError, match=r"begun with data\.augment=None, which is now 'AugmentC"):
        run_quietly(plan_of(augmented, f"{LR}=1e-3"), Fake())
    with pytest.raises(InputError, match=r"begun with train\.epochs=9\.0, which is now 10\.0"):
        run_quietly(plan_of(longer, f"{LR}=1e-3"), fake)
    assert not fake.ran


def test_other_data_in_the_file_are_refused(config: FinetuneConfig) -> None:
    run_quietly(plan_of(config, f"{LR}=1e-3"), Fake())
    Path(config.data.train.path).write_text("text,label\nother,1\n")
    fake = Fake()
    with pytest.raises(InputError, match=r"was run with other data than .*data\.csv"):
        run_quietly(plan_of(config, f"{LR}=1e-3"), fake)
    assert not fake.ran


def test_another_encoder_of_the_same_name_is_refused(config: FinetuneConfig) -> None:
    plan = plan_of(config, f"{LR}=1e-3,1e-4")

    def train(base: str) -> Callable[[Config], None]:
        return lambda config: leave_run(config, {4: {"loss": 0.5, "accuracy": 0.5}}, 4, base)

    run_quietly(plan_of(config, f"{LR}=1e-3"), train("a"))
    for _ in range(2):  # also where both are finished
        with pytest.raises(
            InputError, match=r"01_seed=0 began with another encoder \(sha256 b\) than"
        ):
            run_quietly(plan, train("b"))
    shutil.rmtree(plan.directory / "peak_lr=0.0001_seed=0")
    run_quietly(plan, train("a"))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"seconds": "long"}'])
def test_a_damaged_result_is_one_sentence(config: FinetuneConfig, text: str) -> None:
    plan = plan_of(config, f"{LR}=1e-3")
    run_quietly(plan, Fake())
    (result,) = plan.directory.glob("*/result.json")
    result.write_text(text)
    with pytest.raises(InputError, match=r"seed=0/result\.json is damaged \(\w+: .*: delete it"):
        run_quietly(plan, Fake())


def test_failing_trials_do_not_end_it(config: FinetuneConfig) -> None:
    def fails(config: Config) -> BaseException | None:
        if config.optimizer.peak_lr == 1e-4:
            return InputError("gradients were not finite")
        return MemoryError("128 GB") if config.train.seed else None

    plan = plan_of(config, f"{LR}=1e-4,-1,1e-3", seeds=2)
    said = run_quietly(plan, Fake(fails))
    assert "seed=0: failed: gradients were not finite" in said
    table = (plan.directory / "sweep.md").read_text()
    assert "seed=1 failed: MemoryError: 128 GB" in table
    assert "failed: optimizer.peak_lr=-1.0 is not a number above 0" in table
    assert "| peak_lr=0.0001 | – |" in table
    assert table.index("=0.001 ") < table.index("=0.0001 ")
    again = Fake()
    run_quietly(plan, again)  # what failed is tried again, what finished is not
    assert [(c.optimizer.peak_lr, c.train.seed) for c in again.ran] == [
        (1e-4, 0), (1e-4, 1), (1e-3, 1)
    ]  # fmt: skip


def test_all_failing_is_an_error(config: FinetuneConfig) -> None:
    plan = plan_of(config, f"{LR}=1e-4,1e-3")
    with pytest.raises(InputError, match="all 2 trials failed, the first with: no base"):
        run_quietly(plan, Fake(lambda config: InputError("no base")))


def test_a_metric_that_no_trial_has(config: FinetuneConfig) -> None:
    with pytest.raises(InputError, match="no metric is called 'acc'"):
        plan_of(config, f"{LR}=1e-4", metric="acc")
    fake = Fake()
    with pytest.raises(InputError, match="has no metric pearson: give --metric one of accuracy"):
        run_quietly(plan_of(config, f"{LR}=1e-4,1e-3", metric="pearson"), fake)
    assert len(fake.ran) == 1


def test_rungs(config: FinetuneConfig) -> None:
    def rungs(count: int, eta: int | None) -> list[tuple[str, int]]:
        rates = ",".join(f"{i}e-4" for i in range(1, count + 1))
        plan = plan_of(config, f"{LR}={rates}", halving=eta)
        return [(str(share), n) for share, n in plan.rungs()]

    assert rungs(20, 3) == [("1/9", 20), ("1/3", 6), ("1", 2)]
    assert rungs(4, 2) == [("1/4", 4), ("1/2", 2), ("1", 1)]
    assert rungs(2, 3) == rungs(2, None) == [("1", 2)]


def test_halving_keeps_the_best(config: FinetuneConfig) -> None:
    def fails(config: Config) -> BaseException | None:
        return InputError("diverged") if config.optimizer.peak_lr == 1e-3 else None

    rates = "1e-8,1e-7,1e-6,1e-5,1e-4,1e-3,1e-2,1e-1,1"
    plan = plan_of(config, f"{LR}={rates}", halving=3, seeds=2)
    fake = Fake(fails)
    said = run_quietly(plan, fake)
    epochs = [c.train.epochs for c in fake.ran]
    assert epochs == [1.0] * 18 + [3.0] * 6 + [9.0] * 2
    assert {c.optimizer.peak_lr for c in fake.ran[18:24]} == {1e-4, 1e-2, 1e-5}  # 1e-3 failed
    assert "rung 2 of 3: 3 of 9 candidates, 1/3 of the budget" in said
    assert "26/26 " in said
    winner = fake.ran[-1].optimizer.peak_lr
    table = json.loads((plan.directory / "sweep.json").read_text())["table"]
    assert table[0]["settings"] == f"peak_lr={winner}"
    assert [len(table[0][name]) for name in table[0] if name != "settings"] == [2, 2, 2]
    assert table[3]["accuracy"] == []
    again = Fake(fails)
    run_quietly(plan, again)
    assert {c.optimizer.peak_lr for c in again.ran} == {1e-3}  # only what failed is tried again


def test_two_sweeps_at_once_are_refused(config: FinetuneConfig) -> None:
    plan = plan_of(config, f"{LR}=1e-3")

    def inner(config: Config) -> None:
        with pytest.raises(InputError, match="another sweep is running"):
            run_quietly(plan, Fake())
        Fake()(config)

    run_quietly(plan, inner)


def test_no_settings_is_a_run_over_seeds(config: FinetuneConfig) -> None:
    plan = plan_of(config, seeds=3)
    run_quietly(plan, Fake())
    assert "| tiny |" in (plan.directory / "sweep.md").read_text()
    assert (plan.directory / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"halving": 1}, "--halving 1 is less than 2"),
        ({"random": 0}, "--random 0"),
        ({"random": 3}, "nothing to draw"),
        ({"name": ""}, "the run folder needs a name"),
        ({"name": "gs://bucket/sweep"}, "is a path or URL: put the folder in --runs"),
        ({"name": f"deep/{'ä' * 128}"}, "has 256 bytes"),
    ],
)
def test_impossible_sweeps(config: FinetuneConfig, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(config, **asked)


def test_a_place_is_no_name(config: FinetuneConfig) -> None:
    with pytest.raises(InputError, match="'gs://bucket/x_sweep' is a path or URL"):
        plan_of(replace(config, name="gs://bucket/x"))
