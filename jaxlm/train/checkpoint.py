"""Checkpoints: state and data position together, written in the background, verified when read.

``<directory>/<step>/state`` holds the arrays; ``<step>/meta`` is a JSON of the cursor, the metrics,
and the shape, dtype and checksum of every leaf.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, absolute, remove, without_patterns
from jaxlm.train import restore
from jaxlm.train.checksum import checksums
from jaxlm.train.restore import Cursor, Monitor, Report, Restored

_LOSS = Monitor()


class Checkpointer:
    """Writes the checkpoints of one run; a context manager, entered by all processes together.

    Kept are the newest ``keep`` and, of those that were evaluated as the run is today, the newest
    ``average`` and the best by ``monitor``. What an earlier run, killed, left half-written is
    removed. A full or read-only disk raises InputError: at once, or,
    when it shows in the background, from the next ``save`` or at the end; finished steps stay.
    """

    def __init__(
        self,
        directory: StoragePath,
        *,
        keep: int = 2,
        average: int | None = None,
        monitor: Monitor = _LOSS,
        report: Report = print,
    ):
        if keep < 1:
            raise InputError(
                f"keep={keep} checkpoints leave nothing to resume from: use at least 1"
            )
        self._directory = absolute(directory)
        self.monitor = monitor
        self._report = report
        self._head = math.inf  # the step this run continues from, or saved last
        self._ranks = restore.read_ranks(self._directory, monitor)
        self._cursor: Cursor = {}  # which says what the ranks were measured on
        restore.quiet_orbax()
        with _disk_faults(self._directory):
            if jax.process_index() == 0:
                for stale in self._directory.glob("*.orbax-checkpoint-tmp*"):
                    remove(stale)
            self._manager = _Manager(
                without_patterns(self._directory),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_NewestAndBest(keep, average or 0, self._ranks),
                    lightweight_initialize=True,  # else one damaged step fails the opening
                ),
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        if error_type is None:
            self.close()
        elif jax.process_count() == 1:  # others would wait minutes for a process that has failed
            with contextlib.suppress(Exception):  # the first error is the one to show
                self.close()

    def close(self) -> None:
        """Wait until the last checkpoint is complete, and let go of the directory."""
        with _disk_faults(self._directory):
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, in order."""
        return restore.list_steps(self._directory)

    def save(
        self, step: int, state: PyTree, cursor: Cursor, metrics: dict[str, float] | None = None
    ) -> None:
        """Copy the state and write it in the background; the caller may donate it at once.

        A step of this run that is saved already is left as it is, but for the metrics of an
        evaluation that followed. Later steps than the one restored, and an equal step of another
        history, give way. The first of a run is waited for, and read again.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        rank = self.monitor.rank(step, metrics)
        if not restore.compares(self._cursor, cursor):
            self._ranks.clear()
        self._cursor = cursor
        with _disk_faults(self._directory):
            self._manager.wait_until_finished()
            saved = self._manager.all_steps()
            if step == self._head and step in saved:
                if rank is not None and step not in self._ranks:
                    self._ranks[step] = rank
                    if jax.process_index() == 0:
                        restore.amend(self._directory / str(step), cursor, metrics)
                return
            for left in [s for s in saved if s >= step or s > self._head]:
                self._manager.delete(left)
                self._ranks.pop(left, None)
            self._head = step
            if rank is not None:
                self._ranks[step] = rank
            meta = {"cursor": cursor, "metrics": metrics, "leaves": _describe(state)}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(restore.seal(meta))
                ),
                force=True,  # when to save is the caller's affair
            )
            if not saved:  # what cannot be read is worth knowing before days of training
                self._manager.wait_until_finished()
                restore.check_readable(self._directory / str(step), state, self._report)

    def restore(self, target: PyTree, step: int | None = None) -> Restored:
        """Read the whole state of a step, else of the newest that is undamaged.

        Args:
            target: the state as ``ShapeDtypeStruct`` with shardings, on any mesh.
            step: this one and no other.

        Raises:
            InputError: nothing can be read, or the checkpoint is that of another configuration.
        """
        with _disk_faults(self._directory):
            self._manager.wait_until_finished()
        restored = restore.restore(self._directory, target, step, whole=True, report=self._report)
        self._head, self._cursor = restored.step, restored.cursor
        return restored


def _describe(state: PyTree) -> dict[str, Any]:
    sums = checksums(state)
    return {
        path: {"shape": leaf.shape, "dtype": leaf.dtype.name, "checksum": sums[path]}
        for path, leaf in tree.leaves_with_path(state)
    }


class _Manager(ocp.CheckpointManager):
    """When to stop and save is asked of :mod:`jaxlm.runtime.preemption` alone.

    Orbax 0.12.8 asks, too, and where it finds that a run is being preempted it fails if the
    checkpoint before was opened by ``lightweight_initialize``, whose time has no zone.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never, as far as this class is to know."""
        return False


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's own ``best_fn`` with ``max_to_keep`` deletes the newest when it is not the best."""

    def __init__(self, keep: int, average: int, ranks: dict[int, restore.Rank]):
        self.keep = keep
        self.average = average
        self.ranks = ranks  # shared with the Checkpointer, which fills it

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        present = sorted(info.step for info in checkpoints)
        scored = [step for step in present if step in self.ranks]
        kept = {*present[-self.keep :], min(scored, key=self.ranks.__getitem__, default=None)}
        kept.update(scored[max(len(scored) - self.average, 0) :])
        return [info.step in kept for info in checkpoints]


@contextlib.contextmanager
def _disk_faults(directory: StoragePath) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (found := restore.os_error(error)) is None:
            raise
        reason = found.strerror or str(found)
        complete = "".join(
            f"; the checkpoint of step {s} is intact" for s in restore.list_steps(directory)[-1:]
        )
        raise InputError(f"cannot write checkpoints to {directory}: {reason}{complete}") from error
