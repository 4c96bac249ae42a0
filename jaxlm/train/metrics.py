"""Where numbers go: a JSON line, TensorBoard, Weights & Biases; and how fast the run is."""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlm.errors import InputError
from jaxlm.runtime.storage import whole

Values = Mapping[str, float | int]  # on the host

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first that matches.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("L4", 121e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


@runtime_checkable
class Writer(Protocol):
    """Where metrics go; on process 0 alone."""

    def write(self, step: int, values: Values) -> None:
        """Record the values of a step; a step may come more than once, with other names."""
        ...

    def close(self) -> None:
        """Flush what is left."""
        ...


class JsonlWriter:
    """One object a line, ``{"step": 100, "train/loss": 5.4, …}``; what is not finite is null.

    A run that continues from ``step`` first drops the later lines: the file has one history.
    """

    def __init__(self, path: Path, *, step: int = 0):
        lines = [line for line in read_jsonl(path) if line["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as rewritten:
            rewritten.write_text("".join(map(_json_line, lines)))
        self._file = path.open("a")

    def write(self, step: int, values: Values) -> None:
        """Append a line and flush it."""
        self._file.write(_json_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, float | int]]:
    """The lines of a ``metrics.jsonl``, null as NaN, without a last one cut short by a kill."""
    lines = path.read_text().split("\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{number} is not a line of metrics: remove it to resume"
            ) from None
        records.append({name: math.nan if x is None else x for name, x in record.items()})
    return records


def _json_line(record: Values) -> str:
    finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
    return json.dumps(finite) + "\n"


class TensorBoardWriter:
    """Event files, without TensorFlow; TensorBoard forgets what came after ``step``."""

    def __init__(self, directory: Path, *, step: int = 0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(directory), purge_step=step + 1, filename_suffix=f".{step}"
        )

    def write(self, step: int, values: Values) -> None:
        """Add one scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases; the run of a folder goes on where that is resumed, moved or not."""

    def __init__(self, directory: Path, *, project: str, config: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                "Weights & Biases was asked for and is not installed: pip install 'jaxlm[wandb]'"
            ) from None
        directory = directory.absolute()
        self._run = wandb.init(
            project=project,
            name=str(config.get("name", directory.name)),
            id=_wandb_id(directory),
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )

    def write(self, step: int, values: Values) -> None:
        """Log the values under the step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def _wandb_id(directory: Path) -> str:
    """That of the folder's newest run, or a new one; folders of one name have not the same."""
    begun = [path for path in (directory / "wandb").glob("*run-*-*") if path.is_dir()]
    if begun:
        newest = max(begun, key=lambda path: path.stat().st_mtime).name
        return newest.partition("run-")[2].partition("-")[2]
    sha256 = hashlib.sha256(os.fsencode(directory)).hexdigest()
    name = re.sub(r"[^\w-]", "-", directory.name)
    return f"{name[:100]}-{sha256[:8]}"


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a ``jax.Device.device_kind``; None for CPUs and the unknown."""
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind)), None)


class Throughput:
    """Tokens a second and model FLOPs utilization, over training time alone.

    MFU is flops_per_token * tokens/s / (num_devices * peak), after PaLM (Chowdhery et al., 2022,
    appendix B): FLOPs of the model, not those recomputed by remat.
    """

    def __init__(
        self,
        flops_per_token: float | None,
        device_kind: str,
        num_devices: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ):
        peak = peak_flops(device_kind)
        self._mfu_per_rate = (
            flops_per_token / (num_devices * peak) if flops_per_token and peak else None
        )
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Training begins now; what was before does not count."""
        self._tokens = 0
        self._since = self._clock()

    def add(self, num_tokens: int) -> None:
        """Count tokens that were trained on, over all devices."""
        self._tokens += num_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is none of training's: compiling, evaluating, saving."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began

    def read(self) -> dict[str, float]:
        """``tokens_per_s``, and ``mfu`` if the peak is known, since the last reading."""
        rate = self._tokens / max(self._clock() - self._since, 1e-9)
        self.start()
        mfu = {} if self._mfu_per_rate is None else {"mfu": rate * self._mfu_per_rate}
        return {"tokens_per_s": rate} | mfu
