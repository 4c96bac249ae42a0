"""TPUs one does not have.

Sources: Google's system architecture pages (FLOP/s, memory and its rate) and Austin et al. 2025,
How to Scale Your Model, chapter 2 (links, one on each side of a chip along each axis of its torus,
and the network between slices). Memory is what the compiler of libtpu 0.0.42 says it may use.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar

import jax

from jaxlm.compile_check.chip import GIB, Chip, Coordinates, Topology
from jaxlm.compile_check.hlo import Kind
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A chip in a torus."""

    num_axes: int
    """Axes of the torus."""
    wraps_from: int
    """An axis of a slice whose size is a multiple of this is a ring; others are lines. Slices in
    three dimensions are rings only where they are made of whole cubes."""


CHIPS = {
    chip.name: chip
    for chip in (
        Tpu(
            name="v4",
            flops=275e12,
            hbm=30.75 * GIB,
            hbm_rate=1228e9,
            link=4.5e10,
            network=6.25e9,
            wraps_from=4,
            num_axes=3,
        ),
        Tpu(
            name="v5e",
            flops=197e12,
            hbm=15.75 * GIB,
            hbm_rate=819e9,
            link=4.5e10,
            network=3.125e9,
            wraps_from=16,
            num_axes=2,
        ),
        Tpu(
            name="v5p",
            flops=459e12,
            hbm=95.74 * GIB,
            hbm_rate=2765e9,
            link=9e10,
            network=6.25e9,
            wraps_from=4,
            num_axes=3,
        ),
        Tpu(
            name="v6e",
            flops=918e12,
            hbm=31.25 * GIB,
            hbm_rate=1638e9,
            link=9e10,
            network=12.5e9,
            wraps_from=16,
            num_axes=2,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class TpuSlices(Topology):
    """``shape`` counts chips along each axis of the torus of a slice."""

    chip: Tpu
    compiler: ClassVar[str] = "TPU compiler"
    compiler_refuses: ClassVar[bool] = True

    @property
    def environment(self) -> Mapping[str, str]:
        """Without these libtpu asks the cloud which machine this is, and two processes exclude
        each other."""
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }

    def require_compiler(self) -> None:
        """Raise where libtpu is not installed."""
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                'the TPU compiler is not installed: pip install "jaxlm[tpu]" (no TPU is needed)'
            )

    def mismatch(self) -> str:
        """Another libtpu than JAX asks for may write programs that JAX cannot read."""
        installed = {one.version for one in importlib.metadata.distributions(name="libtpu")}
        required = " ".join(importlib.metadata.requires("jax") or ())
        wanted = re.search(r"libtpu==([\d.*]+)", required)
        if wanted is None or not installed or any(fnmatch(it, wanted[1]) for it in installed):
            return ""
        return (
            f"; libtpu {', '.join(installed)} is not the one of JAX {jax.__version__}: pip install "
            f"'libtpu=={wanted[1]}', or a newer JAX"
        )

    def devices(self) -> Sequence[Any]:
        """To compile for."""
        self.require_compiler()
        from jax.experimental import topologies

        options: dict[str, Any] = {}
        if self.num_slices > 1:
            options["num_slices"] = self.num_slices
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # else a chip is two devices
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        except Exception as error:  # whatever libtpu raises: its message says what it minds
            first = str(error).strip().splitlines()[0]
            raise InputError(f"--topology {self.name}: {first}") from error
        return found.devices

    def is_ring(self, axis: int) -> bool:
        """Whether the axis of the torus is closed: in three dimensions all are, or none."""
        sizes = self.shape if self.chip.num_axes == 3 else (self.shape[axis],)
        return all(size % self.chip.wraps_from == 0 for size in sizes)

    def bandwidth(self, kind: Kind, members: Sequence[Coordinates]) -> float:
        """Over all axes that the group spans at once.

        A ring sends both ways. Where the group's members are not neighbours, the groups between
        them share the links.
        """
        if kind == "collective-permute":
            return self.chip.link
        total = 0.0
        for axis, size in enumerate(self.shape):
            positions = sorted({member[axis] for member in members})
            if len(positions) > 1:
                stride = (positions[-1] - positions[0]) / (len(positions) - 1)
                whole = len(positions) * stride >= size and self.is_ring(axis)
                total += self.chip.link * (2 if whole else 1) / stride
        return total or self.chip.link


def read(kind: str, sizes: str, num_slices: int) -> TpuSlices:
    """``v5e`` and ``16x16``, and the like."""
    chip, name = CHIPS[kind], f"{kind}:{sizes}"
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or len(sizes.split("x")) != chip.num_axes:
        example = "x".join(["4"] * chip.num_axes)
        raise InputError(
            f"--topology {name}: a slice of {kind} has {chip.num_axes} axes, such as "
            f"{kind}:{example}"
        )
    shape = tuple(map(int, sizes.split("x")))
    if min(shape) < 1 or shape[0] % 2 or shape[1] % 2:
        raise InputError(
            f"--topology {name}: a host holds 2x2 chips, so the first two sizes must be even"
        )
    return TpuSlices(chip=chip, shape=shape, num_slices=num_slices)
