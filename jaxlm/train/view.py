"""What is seen of a run: the progress bar, ``metrics.jsonl``, TensorBoard, and ``loss.png``."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.sums import Sums, add_all
from jaxlm.train.metrics import JsonlWriter, TensorBoardWriter, Throughput, Writer
from jaxlm.train.plots import Reference, plot_loss
from jaxlm.train.progress import Progress

METRICS, PLOT, TENSORBOARD = "metrics.jsonl", "loss.png", "tensorboard"
RECORDS = (METRICS, TENSORBOARD)  # that a resumed run appends to


class View:
    """Takes sums and metrics as they come, and shows them; enter the progress bar first.

    Args:
        directory: of the run; None on all processes but one: nothing is written.
        step, tokens_seen: where the run stands; what was recorded of later steps is dropped.
        log_every: steps that are added up for a line of metrics.
        reference: what the plot compares the losses with.
    """

    def __init__(
        self,
        directory: Path | None,
        progress: Progress,
        throughput: Throughput,
        *,
        step: int,
        tokens_seen: float,
        log_every: int,
        reference: Reference,
        more_writers: tuple[Writer, ...] = (),
    ):
        self._directory = directory
        self._progress = progress
        self._throughput = throughput
        self._log_every = log_every
        self._reference = reference
        self._writers: list[Writer] = list(more_writers)
        if directory is not None:
            with self._disk_faults():
                self._writers.append(JsonlWriter(directory / METRICS, step=step))
                self._writers.append(TensorBoardWriter(directory / TENSORBOARD, step=step))
        self._window: list[Sums] = []
        self._speed: dict[str, float] = {}
        self.tokens_seen = tokens_seen

    def __enter__(self) -> "View":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended the run is not hidden by what it brings about here.
        faults = self._disk_faults() if kind is None else contextlib.suppress(OSError)
        with faults, contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)

    def started(self) -> None:
        """Training begins: what restored and compiled before is no part of its speed."""
        self._throughput.start()

    def add(self, step: int, share: float, sums: Sums) -> None:
        """The sums of a training step, on the host; at each ``log_every``-th they are shown."""
        self._window.append(sums)
        tokens = float(sums.counts["tokens"])
        self.tokens_seen += tokens
        self._throughput.add(int(tokens))
        if step % self._log_every == 0:  # at the same steps wherever a run is resumed
            self.flush(step, share)

    def flush(self, step: int, share: float) -> None:
        """Show what was added since the last line, if anything: where training ends."""
        if not self._window:
            return
        total, is_full = add_all(self._window), len(self._window) == self._log_every
        self._window = []
        counts = {name: float(count) for name, count in total.counts.items()}
        steps = counts["steps"]
        means = total.means()
        # Steps are dispatched ahead: the time between the last few tells nothing of theirs.
        self._speed = self._throughput.read() if is_full else self._speed
        self._write(
            step,
            {f"train/{name}": mean for name, mean in means.items()}
            | {name: counts[name] / steps for name in ("lr", "grad_norm") if name in counts}
            | {name: counts[name] for name in ("overflow", "skipped") if name in counts}
            | {"tokens": self.tokens_seen}
            | (self._speed if is_full else {}),
        )
        self._progress.update(step, share, means | self._speed)
        if counts["skipped"]:
            self._progress.warn(
                f"{counts['skipped']:.0f} updates up to step {step} were skipped: their gradients "
                "were not finite"
            )

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an evaluation: recorded, printed, and drawn."""
        self._write(step, {f"eval/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._progress.print(f"step {step:,}: validation {shown}")
        if self._directory is not None:
            with self._throughput.paused(), self._disk_faults():
                plot_loss(self._directory / METRICS, self._directory / PLOT, self._reference)
                self._progress.picture(self._directory / PLOT)

    def finish(self, step: int, how: str = "finished") -> None:
        """The run is at its end."""
        self._progress.finish(step, how)

    def print(self, text: str) -> None:
        """A line above the bar."""
        self._progress.print(text)

    @contextlib.contextmanager
    def pause(self, doing: str | None = None) -> Iterator[None]:
        """Time that is none of training's; ``doing`` says what takes it."""
        status = self._progress.status(doing) if doing else contextlib.nullcontext()
        with self._throughput.paused(), status:
            yield

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        with self._disk_faults():
            for writer in self._writers:
                writer.write(step, values)

    @contextlib.contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"cannot write metrics to {self._directory}: {reason}") from error
