"""The training loop: straight lines that take functions. Copy it if you need another."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.errors import InputError
from jaxlm.runtime import distributed
from jaxlm.runtime.preemption import stop_together
from jaxlm.sums import Sums, add_all
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.compile import compile_ahead
from jaxlm.train.placement import Placement
from jaxlm.train.restore import Cursor, Rank
from jaxlm.train.state import TrainState
from jaxlm.train.view import View
from jaxlm.typing import Batch, HostBatch

_AGREE_EVERY = 10  # steps between two times that processes compare their clocks


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Run length, evaluation and logging intervals."""

    steps: int | None = None
    """Length of the run in steps; None: `epochs` or `minutes` decide."""
    epochs: float | None = None
    """Length of the run in passes over the training data; None: `steps` or `minutes` decide."""
    minutes: float | None = None
    """Wall-clock budget, evaluations and compilation included; the learning rate decays over it.
    None: no limit. With `steps` or `epochs`, whichever comes first ends the run."""
    num_micro_batches: int = 1
    """Micro-batches that a batch is split into, their gradients accumulated, to save memory."""
    num_evals: int = 10
    """Evaluations, each followed by a checkpoint, spread evenly over the run."""
    eval_rows: int | None = 2048
    """Rows of the validation split that pretraining evaluates on; None = all. Fine-tuning takes all
    of its examples."""
    save_every: int | None = None
    """Steps between checkpoints, besides those after evaluations; None: only after evaluations."""
    patience: int | None = None
    """Evaluations in a row that do not improve the monitored metric before the run stops early;
    None: no early stopping."""
    keep: int = 2
    """Number of newest checkpoints to keep; the best is kept as well."""
    average: int | None = None
    """The mean of the parameters of the last so many evaluated checkpoints, which are kept, is the
    model that is evaluated and used afterwards; None: the best checkpoint is."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    max_skipped: int = 20
    """Updates in a row that may be skipped, because gradients are not finite."""
    seed: int = 0
    """Seed of initialisation, order of rows, masks and dropout."""

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None and self.minutes is None:
            raise InputError("train.steps, train.epochs and train.minutes are None: set one")
        for name, value in vars(self).items():
            if name != "seed" and value is not None and not 0 < value < math.inf:
                raise InputError(f"train.{name}={value} is not a number above 0")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"train.seed={self.seed} is not from 0 to 4294967295")

    def with_epochs(self, steps_of: Callable[[float], int]) -> "TrainConfig":
        """The same with the ``steps`` that ``epochs`` have."""
        if self.epochs is None:
            return self
        steps = steps_of(self.epochs)
        return replace(self, steps=min(steps, self.steps or steps), epochs=None)


def fit(
    config: TrainConfig,
    placement: Placement,
    state: TrainState,
    batches: Iterator[HostBatch],
    evaluate: Callable[[TrainState], dict[str, float]],
    checkpointer: Checkpointer,
    cursor: Cursor,
    view: View,
    *,
    examples_after: Callable[[int], int],
) -> TrainState:
    """Train to the end of ``config``'s steps, minutes or patience, or until SIGINT or SIGTERM.

    Step n is dispatched before the sums of step n-1 are read, so the devices never wait for the
    host. ``cursor`` says where the run stands; it is saved with every checkpoint, with the number
    of examples that are seen ``examples_after`` so many steps from here. Batches may have a few
    different shapes; the step is compiled for each when it first comes.
    """
    first = step = int(state.step)
    clock, monitor = Clock(config, cursor), checkpointer.monitor
    share = clock.share(step)
    evals_done = cursor.get("evals_done", int(share * config.num_evals))
    skipped = 0
    pending: Sums | None = None
    best, since_best = _best(cursor), cursor.get("since_best", 0)
    compiled: dict[tuple[tuple[int, ...], ...], Callable[..., tuple[TrainState, Sums]]] = {}

    @contextlib.contextmanager
    def pause(doing: str | None = None) -> Iterator[None]:
        with view.pause(doing):
            yield
        clock.paused = True

    def compiled_for(batch: Batch) -> Callable[..., tuple[TrainState, Sums]]:
        shapes = tuple(x.shape for x in batch.values())
        if shapes not in compiled:
            given = [batch[x].shape for x in ("tokens", "targets") if x in batch]
            sides = " and ".join(str(shape[-1]) for shape in given)
            count = math.prod(given[0][:-1]) if given else 0
            rows = f" for {count:,} rows of {sides}, at step {step:,}" if compiled else ""
            with pause(f"compiling the train step{rows}"):
                example = state, batch, np.float32(share)
                compiled[shapes] = compile_ahead(placement.train_step, *example)
        return compiled[shapes]

    def read() -> None:
        nonlocal pending, skipped
        if pending is None:
            return
        sums, pending = jax.device_get(pending), None
        view.add(step, share, sums)
        skipped = skipped + 1 if sums.counts["skipped"] else 0
        if skipped >= config.max_skipped:
            raise InputError(
                f"gradients were not finite in {skipped} steps in a row, up to step {step}: lower "
                "optimizer.peak_lr, with --accept-changes, to resume from the newest checkpoint"
            )

    def save(metrics: dict[str, float]) -> None:
        read()
        now = {
            "examples_seen": examples_after(step - first),
            "tokens_seen": view.tokens_seen,
            "elapsed_s": clock.elapsed_s(),
            "share": share,
            "evals_done": evals_done,
            "best": best,
            "since_best": since_best,
        }
        with pause():
            checkpointer.save(step, state.learned, cursor | now, metrics)

    def evaluate_and_save() -> None:
        nonlocal best, since_best
        read()
        with pause("evaluating, and compiling that" if step == first else None):
            metrics = evaluate(state)
        view.evaluated(step, metrics)
        rank = monitor.rank(step, metrics)
        if not math.isfinite(metrics.get(monitor.name, 0.0)):
            view.print(f"{monitor.name} is undefined on these predictions: the loss decides")
        better = rank is not None and (best is None or rank < best)
        best, since_best = (rank, 0) if better else (best, since_best + 1)
        save(metrics)

    def is_stale() -> bool:
        return config.patience is not None and since_best >= config.patience

    def raise_if_untrained() -> None:
        if step == 0 and config.minutes is not None:
            raise InputError(
                f"nothing was trained: compiling and evaluating took {clock.elapsed_s():.0f} s, "
                f"and train.minutes={config.minutes:g} were over: give it more, to the same command"
            )

    if share >= 1:
        raise_if_untrained()
        view.print(f"the run is complete: it has its {step} steps")
        return state
    distributed.connect()
    with stop_together() as must_stop:
        stream = map(placement.put_batch, batches)
        batch = next(stream)
        compiled_for(batch)
        if first == 0:
            best, since_best = None, 0  # it may have been interrupted there, and counted already
            evaluate_and_save()
        clock.start()
        view.started()
        stop = False
        while (share := clock.share(step)) < 1 and not (stop := must_stop(step)) and not is_stale():
            if int(share * config.num_evals) > evals_done:
                evals_done = int(share * config.num_evals)
                evaluate_and_save()
                if is_stale():
                    break
            elif config.save_every is not None and step > first and step % config.save_every == 0:
                save({})
            state, sums = compiled_for(batch)(state, batch, np.float32(share))
            read()
            pending = sums
            step += 1
            batch = next(stream)
        read()
        view.flush(step, share)
        if stop:
            save({})
            view.print(f"stopped at step {step} and saved: the same command resumes from there")
        elif is_stale():
            view.print(
                f"stopped at step {step}: {monitor.name} was no better in "
                f"{since_best} evaluations; the best checkpoint is kept"
            )
            view.finish(step, "stopped early")
        else:
            evaluate_and_save()
            raise_if_untrained()
            view.finish(step)
    return state


def _best(cursor: Cursor) -> Rank | None:
    best = cursor.get("best")
    if isinstance(best, float):  # as older versions saved it
        return (0.0, best, math.inf) if math.isfinite(best) else None
    return best and tuple(best)


class Clock:
    """The share of a run that is done: of its steps, or of its minutes, whichever is larger.

    A function of the step alone where no minutes are given, so that a run can be repeated exactly;
    then it is seen from the middle of a step, so that neither the first nor the last learning rate
    is 0. With minutes, the time before :meth:`start` counts against the budget and not as progress,
    so that compiling does not eat the warm-up. Of several processes, process 0's clock rules: the
    others read it at every tenth step, because all wait for that, and extrapolate in between.
    """

    def __init__(self, config: TrainConfig, cursor: Cursor):
        self._config = config
        self._zero = time.monotonic() - cursor["elapsed_s"]
        self._share = cursor["share"]
        self._started = time.monotonic()
        self._heard: tuple[int, float, float] | None = None  # step, share, and share of a step
        self.paused = False  # since others were heard: that time tells nothing of the pace

    def start(self) -> None:
        """Progress begins now."""
        self._started = time.monotonic()
        self._heard = None

    def elapsed_s(self) -> float:
        """Training time of this run in seconds, over all times it was resumed."""
        return time.monotonic() - self._zero

    def share(self, step: int) -> float:
        """Between 0 and 1; 1 when the run is over."""
        steps, minutes = self._config.steps, self._config.minutes
        shares = []
        if steps is not None:
            shares.append(1.0 if step >= steps else (step + 0.5) / steps)
        if minutes is not None:
            left = self._zero + 60 * minutes - self._started
            done = (time.monotonic() - self._started) / left if left > 0 else 1.0
            share = self._share + (1 - self._share) * min(done, 1.0)
            shares.append(self._agree(step, share) if jax.process_count() > 1 else share)
        return max(shares)

    def _agree(self, step: int, share: float) -> float:
        """The share by process 0's clock, the same in all processes."""
        if self._heard is None or step - self._heard[0] >= _AGREE_EVERY:
            known, before, pace = self._heard or (step, share, 0.0)
            if step > known and not self.paused:
                pace = (share - before) / (step - known)
            self.paused = False
            heard = multihost_utils.broadcast_one_to_all(np.array([share, pace]))
            self._heard = step, float(heard[0]), float(heard[1])
        known, share, pace = self._heard
        return min(1.0, share + (step - known) * pace)


def evaluate(
    placement: Placement, state: TrainState, batches: Iterable[HostBatch]
) -> dict[str, float]:
    """Means over all batches."""
    sums = add_all(
        [jax.device_get(placement.eval_step(state, placement.put_batch(b))) for b in batches]
    )
    return sums.means()
