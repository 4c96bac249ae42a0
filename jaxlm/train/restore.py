"""Reading checkpoints, whole or in part, on any mesh and number of processes.

Orbax restores flipped bytes without a word, so every leaf is compared with its checksum; a damaged
step is refused in one sentence, and the step before it is used.
"""

import errno
import functools
import gc
import json
import logging
import math
import os
import re
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.runtime.storage import (
    StoragePath,
    absolute,
    in_bucket,
    without_patterns,
    write_whole,
)
from jaxlm.train.checksum import checksums

Report = Callable[[str], object]
Rank = tuple[float, float, float]
Cursor = dict[str, Any]  # JSON: how many examples were seen, of which data, under which seed
_MEASURED = ("data", "evaluation")  # what metrics were measured on, and how


@dataclass(frozen=True)
class Monitor:
    """The metric that says which checkpoint is best."""

    name: str = "loss"
    higher_is_better: bool = False
    first_step: int = 0
    """Steps before it, such as 0 where a head is untrained, are best only where no other is."""

    def rank(self, step: int, metrics: Mapping[str, float]) -> Rank | None:
        """Lower is better: by the metric, then by the loss, which decides ties.

        It decides alone where the metric is not finite. None where the metric was not measured.
        """
        cost, loss = self.cost(metrics), metrics.get("loss", math.nan)
        loss = loss if math.isfinite(loss) else math.inf
        if self.name not in metrics or min(cost, loss) == math.inf:
            return None
        return float(step < self.first_step), cost, loss

    def cost(self, metrics: Mapping[str, float]) -> float:
        """Lower is better; infinite where the metric is absent or not finite."""
        value = metrics.get(self.name, math.nan)
        return (-value if self.higher_is_better else value) if math.isfinite(value) else math.inf


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read and found whole."""

    step: int
    state: Any
    cursor: Cursor
    metrics: dict[str, float]
    refused: list[str]
    """A sentence for each newer step that is damaged."""


def warn(text: str) -> None:
    """On stderr, away from answers."""
    print(f"warning: {text}", file=sys.stderr)


def list_steps(directory: StoragePath) -> list[int]:
    """Steps with a finished checkpoint, in order."""
    if not directory.is_dir():
        return []
    steps = [path for path in directory.iterdir() if path.name.isdigit()]
    if in_bucket(directory):  # nothing can be renamed there, so a file says that a step is finished
        steps = [path for path in steps if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in steps)


def best_step(
    directory: StoragePath, monitor: Monitor | None = None, *, report: Report | None = None
) -> int | None:
    """The best step by ``monitor`` (the loss), or None where none was evaluated."""
    ranks = read_ranks(directory, monitor or Monitor(), report)
    return min(ranks, key=ranks.__getitem__, default=None)


def chosen_steps(
    directory: StoragePath, monitor: Monitor, average: int | None, *, report: Report | None = None
) -> list[int]:
    """The steps whose mean is a run's model: the newest ``average`` that were evaluated.

    The one before training is left out, where there is another. Without ``average`` the best step
    alone; empty where none was evaluated.
    """
    ranks = read_ranks(directory, monitor, report)
    if average is None or not ranks:
        return [min(ranks, key=ranks.__getitem__)] if ranks else []
    return sorted(step for step in ranks if step > 0 or len(ranks) == 1)[-average:]


def peek(directory: StoragePath) -> Cursor:
    """Cursor of the newest checkpoint whose metadata are whole: it holds for all steps of a run."""
    return _newest(directory, "cursor")


def trained(directory: StoragePath) -> frozenset[str]:
    """Paths of the variables that a run trains, as its checkpoints hold them; none before these."""
    saved = _newest(directory, "leaves") if list_steps(directory) else {}
    top = "trainable/"
    return frozenset(path.removeprefix(top) for path in saved if path.startswith(top))


def _newest(directory: StoragePath, part: str) -> dict[str, Any]:
    """A part of the metadata of the newest checkpoint that has them whole."""
    reason = "it holds none"
    for step in reversed(list_steps(directory)):
        try:
            return _read_meta(directory / str(step))[part]
        except (OSError, ValueError, KeyError) as error:
            _raise_if_unreadable(directory / str(step), error)
            reason = str(error)
    raise InputError(f"no checkpoint in {directory} can be used: {reason}")


def restore_part(
    directory: StoragePath, target: PyTree, step: int | None = None, *, report: Report = warn
) -> Restored:
    """Read a part of the state, such as ``{"trainable": {"params": …}}``, changing nothing on disk.

    As :meth:`Checkpointer.restore`, but leaves that ``target`` lacks are not read, and dtypes may
    differ: arrays are verified as they were saved and then cast.
    """
    return restore(absolute(directory), target, step, whole=False, report=report)


def restore_mean(
    directory: StoragePath, target: PyTree, steps: Sequence[int], *, report: Report = warn
) -> Restored:
    """As :func:`restore_part` of the last of ``steps``, with the mean of all steps' arrays.

    Of one step that is the step itself; of none it is the newest that is undamaged.
    """
    *others, last = steps or [None]
    restored = restore_part(directory, target, last, report=report)
    if not others:
        return restored
    wide = lambda x: x.astype(np.promote_types(x.dtype, np.float32))
    total = jax.tree.map(wide, restored.state)
    for step in others:
        total = jax.tree.map(
            lambda x, y: x + wide(y), total, restore_part(directory, target, step).state
        )
    mean = jax.tree.map(lambda x, old: (x / len(steps)).astype(old.dtype), total, restored.state)
    return replace(restored, state=mean)


def restore(
    directory: StoragePath, target: PyTree, step: int | None, *, whole: bool, report: Report
) -> Restored:
    """Read ``step``, else the newest that is undamaged; with ``whole``, trees must be equal."""
    found = list_steps(directory)
    if not found:
        raise InputError(f"{directory} holds no checkpoint")
    if step is not None and step not in found:
        known = ", ".join(map(str, found))
        raise InputError(f"{directory} holds no checkpoint of step {step}, only of {known}")
    refused: list[str] = []
    quiet_orbax()
    for candidate in reversed(found) if step is None else [step]:
        try:
            meta, state = _read(directory / str(candidate), target, whole)
        except (InputError, jax.errors.JaxRuntimeError, MemoryError):
            raise  # too little memory is no damage
        except Exception as error:
            _raise_if_unreadable(directory / str(candidate), error)
            reason = textwrap.shorten(str(error), 160, placeholder=" …")
            refused.append(f"the checkpoint of step {candidate} is damaged: {reason}")
            if step is None:
                report(refused[-1])
        else:
            return Restored(
                step=candidate,
                state=state,
                cursor=meta["cursor"],
                metrics=meta["metrics"],
                refused=refused,
            )
        with warnings.catch_warnings(action="ignore"):
            gc.collect()  # coroutines that Orbax left without awaiting them complain when they go
    if step is not None:
        others = ", ".join(str(s) for s in found if s != step) or "none"
        raise InputError(f"{refused[0]}; name another step of {directory}: {others}")
    raise InputError(f"no checkpoint in {directory} can be used: {refused[0]}")


def check_readable(step: StoragePath, state: PyTree, report: Report) -> None:
    """Read a checkpoint of ``state`` just as a run that resumes would; InputError if it cannot."""
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    try:
        _read(step, target, whole=True)
    except (jax.errors.JaxRuntimeError, MemoryError):
        report("the first checkpoint was not read back: memory does not hold the state twice")
    except Exception as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        raise InputError(
            f"the first checkpoint, {step}, was written and cannot be read back ({reason}): write "
            "the run elsewhere, with --runs"
        ) from error


def os_error(error: Exception) -> OSError | None:
    """What the operating system had to say, if that is what it is about."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's, in a ValueError
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def _raise_if_unreadable(step: StoragePath, error: Exception) -> None:
    """A disk that fails now is no damage: what is saved next would take the step's place."""
    found = os_error(error)
    if found is not None and found.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise InputError(
            f"{step} cannot be read now ({found.strerror}): try again, or move it away to resume "
            "from the checkpoint before"
        ) from error


def _read(directory: StoragePath, target: PyTree, whole: bool) -> tuple[dict[str, Any], PyTree]:
    meta = _in_all_processes(lambda: _read_meta(directory))
    leaves = meta["leaves"]
    _check_same_tree(directory, leaves, target, whole)
    as_saved = tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, leaves[path]["dtype"], sharding=x.sharding),
        target,
    )
    state = _in_all_processes(lambda: _read_arrays(directory / "state", as_saved))
    for path, checksum in checksums(state).items():
        if checksum != leaves[path]["checksum"]:
            raise ValueError(f"{path} has the checksum {checksum}, not {leaves[path]['checksum']}")
    return meta, jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), state, target)


def _read_meta(directory: StoragePath) -> dict[str, Any]:
    meta = json.loads((directory / "meta" / "metadata").read_text())
    if not isinstance(meta, dict) or meta != seal(
        {name: value for name, value in meta.items() if name != "crc32"}
    ):
        raise ValueError("its metadata are not those that were written")
    return meta


def _read_arrays(directory: StoragePath, target: PyTree) -> PyTree:
    # The handler alone: around it Orbax puts a barrier, at which a failed process never arrives.
    return ocp.PyTreeCheckpointHandler().restore(
        epath.Path(without_patterns(directory.parent) / directory.name),
        args=ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        ),
    )


def _in_all_processes(read: Callable[[], Any]) -> Any:
    """What ``read`` returns; where it fails in one process, it fails in all."""
    result, error = None, None
    try:
        result = read()
    except Exception as raised:
        error = raised
    if not multihost_utils.process_allgather(np.array(error is None)).all():
        raise error or ValueError("another process cannot read it")
    return result


def _check_same_tree(
    directory: StoragePath, leaves: dict[str, Any], target: PyTree, whole: bool
) -> None:
    def show(shape: Sequence[int], dtype: str) -> str:
        return f"{dtype if whole else ''}[{', '.join(map(str, shape))}]"

    saved = {path: show(leaf["shape"], leaf["dtype"]) for path, leaf in leaves.items()}
    wanted = {
        path: show(leaf.shape, leaf.dtype.name) for path, leaf in tree.leaves_with_path(target)
    }
    for path in [*wanted, *saved] if whole else wanted:
        here, there = wanted.get(path, "absent"), saved.get(path, "absent")
        if here != there:
            raise InputError(
                f"{directory} is the checkpoint of another configuration: {path} is {there} "
                f"there and {here} here; use the configuration of that run, or another run folder"
            )


def seal(meta: dict[str, Any]) -> dict[str, Any]:
    """The same with its own checksum, under ``crc32``."""
    meta = json.loads(json.dumps(meta))  # as it will be read: string keys, lists
    return meta | {"crc32": zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


def amend(step: StoragePath, cursor: Cursor, metrics: Mapping[str, float]) -> None:
    """Give a finished checkpoint another cursor, and metrics that were measured later."""
    meta = {name: value for name, value in _read_meta(step).items() if name != "crc32"}
    meta |= {"cursor": cursor, "metrics": dict(metrics)}
    write_whole(step / "meta" / "metadata", json.dumps(seal(meta)))


def measured(directory: StoragePath, step: int) -> dict[str, float]:
    """The metrics that a checkpoint was saved with; none where they cannot be read."""
    try:
        return _read_meta(directory / str(step))["metrics"]
    except (OSError, ValueError, KeyError):
        return {}


def compares(one: Cursor, other: Cursor) -> bool:
    """Whether metrics compare: of the same data, evaluated alike, as far as cursors say it."""
    return all(one[name] == other[name] for name in _MEASURED if name in one and name in other)


def read_ranks(
    directory: StoragePath, monitor: Monitor, report: Report | None = None
) -> dict[int, Rank]:
    """The rank of each step that was evaluated, from the newest back to one that does not compare.

    Damaged steps are passed to ``report``.
    """
    found: dict[int, tuple[Cursor, Rank | None]] = {}
    for step in list_steps(directory):
        try:
            meta = _read_meta(directory / str(step))
            found[step] = meta["cursor"], monitor.rank(step, meta["metrics"])
        except (OSError, ValueError, KeyError) as error:
            _raise_if_unreadable(directory / str(step), error)
            if report is not None:
                report(f"the checkpoint of step {step} is damaged and left out: {error}")
    known: Cursor = {}  # what the steps from here on say; some of older versions do not
    ranks: dict[int, Rank] = {}
    for step, (own, rank) in reversed(found.items()):
        if not compares(own, known):
            break
        known |= own
        if rank is not None:
            ranks[step] = rank
    return dict(reversed(ranks.items()))


@functools.cache
def quiet_orbax() -> None:
    """Keep Orbax from printing hundreds of lines, from now on, on errors that it raises as well."""
    unraisable_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Reads that outlive a failed restore report to an event loop that is gone by then.
        if "Event loop is closed" not in str(unraisable.exc_value):
            unraisable_hook(unraisable)

    def is_news(record: logging.LogRecord) -> bool:
        message = f"{record.pathname} {record.getMessage()}"
        told = record.levelno >= logging.ERROR or "preemption sync point" in message
        return not (told and "orbax" in message)

    sys.unraisablehook = hook
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
