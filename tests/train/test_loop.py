"""The clock of a run, and which evaluations are better; whole runs are in runs/."""

import contextlib
import itertools
import math
from unittest.mock import create_autospec

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.sums import Sums
from jaxlm.train import loop
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.loop import Clock, TrainConfig, fit
from jaxlm.train.placement import Placement
from jaxlm.train.restore import Monitor
from jaxlm.train.state import TrainState
from jaxlm.train.view import View

NEW = {"elapsed_s": 0.0, "share": 0.0}


class Time:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(loop, "time", time)
    return time


def test_steps_alone_do_not_look_at_the_clock(time: Time) -> None:
    clock = Clock(TrainConfig(steps=4), NEW)
    shares = []
    for step in range(5):
        shares.append(clock.share(step))
        time.now += 1e6
    assert shares == [0.125, 0.375, 0.625, 0.875, 1.0]


def test_compiling_counts_against_the_budget_and_not_as_progress(time: Time) -> None:
    clock = Clock(TrainConfig(minutes=10.0), NEW)
    time.now += 120  # compiling
    clock.start()
    assert clock.share(0) == 0
    time.now += 240
    assert clock.share(100) == pytest.approx(0.5)
    time.now += 240
    assert clock.share(200) == 1
    assert clock.elapsed_s() == 600


def test_a_resumed_run_keeps_its_budget_and_progress(time: Time) -> None:
    clock = Clock(TrainConfig(minutes=10.0), {"elapsed_s": 300.0, "share": 0.4})
    time.now += 60
    clock.start()
    assert clock.share(7) == pytest.approx(0.4)
    time.now += 120
    assert clock.share(8) == pytest.approx(0.7)  # half of what was left
    time.now += 120
    assert clock.share(9) == 1


def test_whatever_comes_first_ends_the_run(time: Time) -> None:
    clock = Clock(TrainConfig(minutes=10.0, steps=10), NEW)
    clock.start()
    assert clock.share(10) == 1
    time.now += 600
    assert clock.share(1) == 1


def test_a_budget_spent_on_compiling_is_over(time: Time) -> None:
    clock = Clock(TrainConfig(minutes=1.0), NEW)
    time.now += 61
    clock.start()
    assert clock.share(0) == 1


def test_processes_go_by_one_clock(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def broadcast(values: np.ndarray) -> np.ndarray:  # by another process, 10 s ahead
        told.append(values)
        return np.array([(time.now - 1000 + 10) / 100, 0.01])

    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all", broadcast)
    clock = Clock(TrainConfig(minutes=100 / 60), NEW)
    clock.start()
    shares = []
    for step in range(40):
        shares.append(clock.share(step))
        time.now += 1
    assert len(told) == 4
    assert [float(values[0]) for values in told] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert shares == pytest.approx([0.1 + 0.01 * step for step in range(40)])
    time.now += 60
    assert clock.share(40) == 1


@pytest.mark.parametrize(
    "change",
    [{"minutes": float("nan")}, {"epochs": float("inf")}, {"steps": 0}, {"steps": 1, "seed": -1}],
)
def test_lengths_and_seeds_that_are_none_raise(change):
    name, value = list(change.items())[-1]
    with pytest.raises(InputError, match=rf"train\.{name}={value} is not"):
        TrainConfig(**change)


ACCURACY = Monitor("accuracy", higher_is_better=True)


def last_step(evaluations, patience=1, **cursor):
    """Trains for four steps, unless patience ends it.

    Gives the last step, what was printed, and the cursor that was saved first.
    """
    state = TrainState(0, {}, {}, ())
    sums = Sums({}, np.float32(1), {"skipped": np.float32(0)})
    placement = Placement(*[None] * len(Placement._fields))._replace(
        put_batch=dict, train_step=lambda *_: (state, sums)
    )
    view = create_autospec(View, instance=True, tokens_seen=0.0)
    view.pause.return_value = contextlib.nullcontext()
    checkpointer = create_autospec(Checkpointer, instance=True, monitor=ACCURACY)
    evaluations = [{"accuracy": accuracy, "loss": loss} for accuracy, loss in evaluations]
    fit(
        TrainConfig(steps=4, num_evals=4, patience=patience),
        placement,
        state,
        itertools.repeat({"tokens": np.zeros((2, 3))}),
        lambda _: evaluations.pop(0),
        checkpointer,
        NEW | {"examples_seen": 0} | cursor,
        view,
        examples_after=lambda steps: 2 * steps,
    )
    saves = [call.args for call in checkpointer.save.call_args_list]
    return saves[-1][0], [call.args[0] for call in view.print.call_args_list], saves[0][2]


def test_patience_goes_by_the_loss_where_the_metric_is_equal():
    losses = [0.7, 0.5, 0.4, 0.3, 0.2]
    step, *_ = last_step([(0.95, loss) for loss in losses])
    assert step == 4
    step, printed, _ = last_step([(0.95, loss) for loss in losses[::-1]])
    assert step == 1
    assert "accuracy was no better in 1 evaluations" in printed[-1]
    step, *_ = last_step([(0.9 - 0.1 * i, loss) for i, loss in enumerate(losses)])
    assert step == 1  # the metric goes before the loss


def test_a_metric_that_is_undefined_says_so_and_gives_way_to_the_loss():
    step, printed, _ = last_step([(math.nan, loss) for loss in (0.7, 0.5, 0.4, 0.3, 0.2)])
    assert step == 4
    assert printed == ["accuracy is undefined on these predictions: the loss decides"] * 5


def test_an_evaluation_that_is_repeated_is_counted_once():
    """A run that was interrupted when it had saved step 0 evaluates it again."""
    evaluations = [(0.5 + 0.1 * i, 0.7) for i in range(5)]
    *_, first = last_step(evaluations)
    assert first["share"] == 0.125
    again = {name: first[name] for name in ("best", "since_best", "evals_done")}
    assert last_step(evaluations, **again)[0] == 4
