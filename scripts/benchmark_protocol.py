"""What the coordinator in ``benchmark.py`` and its workers say to each other.

A worker gets its :class:`Work` as one JSON argument, prints a :class:`Ready` line once it is warm,
and from then on sleeps on its standard input: each line is a number of steps, each answer one
:class:`Chunk` line. It ends with its input. Standard library only: workers may live in
environments that share no package.
"""

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

WARM_UP_STEPS = 3
PREFIX = "benchmark: "
"""Start of every line of the protocol: libraries print to standard output too."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training step, the same for every framework but for the recipe."""

    task: Literal["mlm", "modern", "clm", "full", "lora"]
    """Pretraining by masked tokens (of a BERT or a ModernBERT) or by the next one, or fine-tuning a
    classifier: all of it, or LoRA on queries and values."""
    recipe: Literal["shipped", "tuned", "compiled"]
    """For torch, how much is done for speed. jaxlm has one way, "tuned"."""
    dtype: Literal["float32", "bfloat16"]
    """Dtype of products and, unless as shipped, of frozen matrices; what learns is float32."""
    device: Literal["cpu", "cuda"]
    num_layers: int
    hidden_dim: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    batch_size: int
    row_length: int
    mask_rate: float = 0.15
    dropout_rate: float = 0.1
    peak_lr: float = 1e-4
    weight_decay: float = 0.01
    num_labels: int = 2
    rank: int = 8
    alpha: float = 16.0

    @property
    def num_masked(self) -> int:
        """Masked positions of a row: 20 of 128, 77 of 512."""
        return math.ceil(self.mask_rate * self.row_length)

    @property
    def pretrains(self) -> bool:
        """Whether the vocabulary is what it predicts."""
        return self.task in ("mlm", "modern", "clm")

    @property
    def num_projected(self) -> int:
        """Positions of a row that reach the vocabulary."""
        whole = self.task == "clm" or self.recipe == "shipped"
        return self.row_length if whole else self.num_masked


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a worker reports when it is warm."""

    versions: str
    device_name: str
    compile_seconds: float | None
    """First step less a later one, tracing included; None where nothing is compiled."""
    step_seconds: float
    loss: float
    """After ``WARM_UP_STEPS`` steps, in nats."""
    peak_mib: float | None
    """Host memory on a CPU, device memory on a GPU; None where it cannot be known."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some consecutive steps of one worker, while the others slept."""

    step_seconds: list[float]
    """One figure a step; on a GPU, where steps overlap, one figure: their mean."""
    others_share: float
    """CPU seconds of all other processes, per second of wall time; 0 where it cannot be known."""
    steal_share: float
    """CPU seconds that the hypervisor gave away, per second of wall time."""
    peak_mib: float | None
    """As in :class:`Ready`, since the warm-up."""


def serve(
    work: Work,
    *,
    versions: str,
    device_name: str,
    compiles: bool,
    step: Callable[[], Any],
    finish: Callable[[Any], float],
    device_peak_bytes: Callable[[], int],
) -> None:
    """Warm up, then run chunks until standard input ends.

    Args:
        work: what was asked for.
        versions: frameworks and versions, for the report.
        device_name: the accelerator's name; unused on a CPU.
        compiles: whether the first step contains compilation.
        step: dispatches one training step and returns a handle.
        finish: waits until the step of a handle is complete and returns its loss.
        device_peak_bytes: most memory ever held on the accelerator; not called on a CPU.
    """
    on_cpu = work.device == "cpu"

    def peak_mib() -> float | None:
        return _peak_host_mib() if on_cpu else device_peak_bytes() / 2**20

    def timed() -> tuple[float, float]:
        start = time.perf_counter()
        loss = finish(step())
        return time.perf_counter() - start, loss

    warm_up = [timed() for _ in range(WARM_UP_STEPS)]
    best = min(seconds for seconds, _ in warm_up[1:])
    ready = Ready(
        versions=versions,
        device_name=device_name,
        compile_seconds=warm_up[0][0] - best if compiles else None,
        step_seconds=best,
        loss=warm_up[-1][1],
        peak_mib=peak_mib(),
    )
    gc.collect()
    peak_was_reset = not on_cpu or _reset_host_peak()
    _send(ready)
    for line in sys.stdin:
        timed()  # not counted: while others ran, caches went cold and pages back to the system
        busy, steal = _machine_cpu_seconds()
        own, start = time.process_time(), time.perf_counter()
        if on_cpu:
            seconds = [timed()[0] for _ in range(int(line))]
            wall = time.perf_counter() - start
        else:
            for _ in range(int(line) - 1):
                step()
            finish(step())
            wall = time.perf_counter() - start
            seconds = [wall / int(line)]
        own = time.process_time() - own
        busy, steal = (b - a for a, b in zip((busy, steal), _machine_cpu_seconds(), strict=True))
        chunk = Chunk(
            step_seconds=seconds,
            others_share=max(0.0, busy - own) / wall if busy else 0.0,
            steal_share=steal / wall,
            peak_mib=peak_mib() if peak_was_reset else None,
        )
        _send(chunk)


def _send(message: Ready | Chunk) -> None:
    print(PREFIX + json.dumps(asdict(message)), flush=True)


def read_work() -> Work:
    """The work in the command line's only argument."""
    return Work(**json.loads(sys.argv[1]))


def wait_until_quiet(limit_seconds: float) -> None:
    """Return once this machine was idle for 0.2 s, or after the limit."""
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        before, _ = _machine_cpu_seconds()
        time.sleep(0.2)
        if _machine_cpu_seconds()[0] - before < 0.02:
            return


def _machine_cpu_seconds() -> tuple[float, float]:
    """Seconds (busy, stolen) of all CPUs since boot; zeros where Linux's /proc is missing."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0, 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[1:9])
    hertz = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / hertz, steal / hertz


def _peak_host_mib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _reset_host_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
