"""One compile: ``python -m jaxlm.compile_check.check OUT`` reads a :class:`Job` in JSON, writes its
:class:`Report` to OUT.

In a separate process, since the compiler may crash and take its process along.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm.compile_check import cost, hlo, topology
from jaxlm.compile_check.chip import Coordinates, Topology
from jaxlm.compile_check.step import Assumed, Step, make_step
from jaxlm.config import Config
from jaxlm.errors import InputError, report_input_errors


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind in a step."""

    kind: str
    over_slices: bool
    count: int
    overlapping: int
    """How many of them overlap with computation."""
    bytes: float
    """Bytes that one device sends in a step."""
    seconds: float
    """Time at the published speed of the links, without overlap."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of compiling. Bytes are those of one device."""

    config: str
    topology: str
    num_slices: int
    num_devices: int
    mesh: dict[str, int]
    placement: str
    batch_size: int
    row_length: int
    num_parameters: int
    hbm: float
    """Bytes that the compiler may use."""
    fits: bool
    """Whether the step fits into the memory of every device."""
    needed: float | None
    """All memory needed; None if it does not fit and the compiler does not say by how much."""
    memory: dict[str, float]
    """Bytes by kind; what only the compiler knows is missing if the step did not fit."""
    flops: float | None
    """FLOPs of a step over all devices: the model's products alone, without recomputation."""
    compute_s: float | None
    """Time of these FLOPs with all devices at their peak."""
    update_s: float
    """Reading parameters and moments and writing them again, at the published rate of the HBM."""
    traffic: tuple[Traffic, ...]
    unknown_loops: int
    """Loops of unknown length, whose collectives are counted once."""
    compile_s: float
    attention: str = ""
    """How it is computed, and why."""

    @property
    def communication_s(self) -> float:
        """Time of all collectives, without overlap."""
        return sum((each.seconds for each in self.traffic), start=0.0)

    @property
    def step_s(self) -> float:
        """Compute, communication and update without overlap, each at its full rate."""
        return (self.compute_s or 0.0) + self.communication_s + self.update_s


def to_json(report: Report) -> str:
    """One line."""
    derived = {name: getattr(report, name) for name in ("communication_s", "step_s")}
    return json.dumps(dataclasses.asdict(report) | derived)


def from_json(text: str) -> Report:
    """The inverse."""
    fields = json.loads(text)
    names = {field.name for field in dataclasses.fields(Report)}
    fields["traffic"] = tuple(Traffic(**each) for each in fields["traffic"])
    return Report(**{name: value for name, value in fields.items() if name in names})


def check(config: Config, assumed: Assumed, target: Topology) -> Report:
    """Compile in a separate process. Raises if that ends without a report."""
    target.require_compiler()
    job = {
        "config": configs.to_json(config),
        "assumed": configs.encode(assumed),
        "topology": target.name,
        "num_slices": target.num_slices,
    }
    with tempfile.TemporaryDirectory(prefix="jaxlm-compile-") as folder:
        out = Path(folder) / "report.json"
        done = subprocess.run(
            [sys.executable, "-m", "jaxlm.compile_check.check", str(out)],
            input=json.dumps(job),
            env=os.environ | dict(target.environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode == 0 and out.is_file():
            return from_json(out.read_text())
    raise InputError(_reason(done.returncode, done.stderr, target))


def _reason(code: int, stderr: str, target: Topology) -> str:
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    if code == 2 and lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    how = f"exit code {code}"
    if code < 0:
        how = signal.Signals(-code).name
    last = f": {lines[-1].strip()[:200]}" if lines and code > 0 else ""
    last += target.mismatch()
    return (
        f"the {target.compiler} ended with {how} on {target.name}, "
        f"which says nothing of memory{last}"
    )


def compile_here(name: str, config: Config, assumed: Assumed, target: Topology) -> Report:
    """Compile in this process."""
    devices = target.devices()
    step = make_step(config, assumed, devices)
    state = step.placement.abstract_state
    memory = _memory(step)
    chip = target.chip
    moving = 2 * (memory["parameters"] + memory["moments"])
    known: dict[str, Any] = {
        "config": name,
        "topology": target.name,
        "num_slices": target.num_slices,
        "num_devices": len(devices),
        "placement": config.placement,
        "batch_size": config.data.batch_size,
        "row_length": step.row_length,
        "attention": step.attention,
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.variables)),
        "hbm": chip.hbm,
        "flops": step.flops,
        "compute_s": None if step.flops is None else step.flops / (chip.flops * len(devices)),
        "update_s": moving / chip.hbm_rate,
    }
    mesh = jax.tree.leaves(state.step)[0].sharding.mesh
    known["mesh"] = {axis: int(size) for axis, size in mesh.shape.items()}
    began = time.monotonic()
    lowered = step.placement.train_step.lower(
        state, step.batch, jax.ShapeDtypeStruct((), np.float32)
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Report(
            fits=False,
            needed=needed_bytes(str(error), sum(memory.values())),
            memory=memory,
            traffic=(),
            unknown_loops=0,
            compile_s=time.monotonic() - began,
            **known,
        )
    seconds = time.monotonic() - began
    analysis = compiled.memory_analysis()
    rest = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory |= {
        "padding": float(analysis.argument_size_in_bytes) - sum(memory.values()),
        "temporaries": float(analysis.temp_size_in_bytes + max(rest, 0)),
        "program": float(analysis.generated_code_size_in_bytes),
    }
    program = hlo.parse(compiled.as_text())
    # Partitions are numbered as the mesh lists them; over slices, those of one slice.
    coordinates = [device.coords for device in mesh.devices.flat]
    needed = sum(memory.values())
    return Report(
        fits=target.compiler_refuses or needed <= chip.hbm,
        needed=needed,
        memory=memory,
        traffic=tuple(_traffic(program, target, coordinates)),
        unknown_loops=program.num_unknown_loops,
        compile_s=seconds,
        **known,
    )


def _memory(step: Step) -> dict[str, float]:
    """Bytes of the step's arguments on one device, without the padding of small arrays."""

    def size(tree: Any) -> float:
        return float(
            sum(
                math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(tree)
            )
        )

    state = step.placement.abstract_state
    batch = [leaf for leaf in jax.tree.leaves(step.batch)]
    split = 1 if all(leaf.sharding for leaf in batch) else batch[0].shape[0]  # pmap's first axis
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in batch)
    return {
        "parameters": size(state.trainable),
        "moments": size(state.opt_state),
        "frozen": size(state.frozen),
        "batch": size(batch) if split == 1 else whole / split,
    }


def _traffic(
    program: hlo.Program, target: Topology, coordinates: Sequence[Coordinates]
) -> list[Traffic]:
    rows = []
    for kind, every in hlo.totals(program.collectives):
        for over_slices in (False, True):
            own = [each for each in every if each.over_slices is over_slices]
            if own:
                sent = sum(cost.sent_bytes(each, target.num_slices) * each.count for each in own)
                rows.append(
                    Traffic(
                        kind=kind,
                        over_slices=over_slices,
                        count=sum(each.count for each in own),
                        overlapping=sum(each.count for each in own if each.overlaps),
                        bytes=sent,
                        seconds=sum(cost.seconds(each, target, coordinates) for each in own),
                    )
                )
    return rows


def needed_bytes(message: str, arguments: float) -> float | None:
    """What the compiler says that it would need, beside ``arguments`` if it does not count them."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = r"([\d.]+)([KMGT]?)"
    if used := re.search(rf"Used {size}[^.]* of {size} hbm", message):
        return float(used[1]) * units[used[2]]
    if temporaries := re.search(rf"temporaries \({size}\)", message):
        return float(temporaries[1]) * units[temporaries[2]] + arguments
    return None


def main() -> None:
    """The process that compiles."""
    with report_input_errors():
        job = json.loads(sys.stdin.read())
        config = configs.from_json(job["config"])
        assumed = configs.decode(Assumed, job["assumed"], "assumed")
        target = topology.read(job["topology"], job["num_slices"])
        report = compile_here(config.name, config, assumed, target)
        Path(sys.argv[1]).write_text(to_json(report))


if __name__ == "__main__":
    main()
