"""TPUs that are not here: what each kind can do, and the devices of a topology to compile for.

FLOP/s are dense bfloat16. Links are one way, bytes/s, one on each side of a chip along each axis
of its torus. Sources: Google's system architecture pages (FLOP/s, memory and its rate) and Austin
et al. 2025, How to Scale Your Model, chapter 2 (links, and the network between slices). Memory is
what the compiler of libtpu 0.0.42 says it may use.
"""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.errors import InputError

GIB = 2.0**30
# Without these libtpu asks the cloud which machine this is, and two processes exclude each other.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device, as JAX sees it."""

    name: str
    flops: float
    hbm: float
    """Bytes that a program may use."""
    hbm_rate: float
    """Bytes/s."""
    link: float
    """Bytes/s of one link, one way."""
    network: float
    """Bytes/s to other slices, one way."""
    wraps_from: int
    """An axis of a slice whose size is a multiple of this is a ring; others are lines."""
    num_axes: int
    """Of the torus."""


CHIPS = (
    Chip(
        name="v4",
        flops=275e12,
        hbm=30.75 * GIB,
        hbm_rate=1228e9,
        link=4.5e10,
        network=6.25e9,
        wraps_from=4,
        num_axes=3,
    ),
    Chip(
        name="v5e",
        flops=197e12,
        hbm=15.75 * GIB,
        hbm_rate=819e9,
        link=4.5e10,
        network=3.125e9,
        wraps_from=16,
        num_axes=2,
    ),
    Chip(
        name="v5p",
        flops=459e12,
        hbm=95.74 * GIB,
        hbm_rate=2765e9,
        link=9e10,
        network=6.25e9,
        wraps_from=4,
        num_axes=3,
    ),
    Chip(
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


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Slices of one kind of chip."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis of one slice."""
    num_slices: int = 1

    @property
    def name(self) -> str:
        """Of one slice, such as ``v5e:4x4``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """Over all slices."""
        return self.num_slices * math.prod(self.shape)

    def is_ring(self, axis: int) -> bool:
        """Whether the axis of the torus is closed."""
        return self.shape[axis] % self.chip.wraps_from == 0


def read(name: str, num_slices: int = 1) -> Topology:
    """``v5e:16x16`` and the like."""
    known = {chip.name: chip for chip in CHIPS}
    kind, _, sizes = name.partition(":")
    if kind not in known:
        raise InputError(
            f"--topology {name}: {kind!r} is not one of {', '.join(known)}; write the kind of TPU, "
            "a colon, and the chips along each axis, such as v5e:4x4"
        )
    chip = known[kind]
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
    return Topology(chip=chip, shape=shape, num_slices=num_slices)


def devices(topology: Topology) -> Sequence[Any]:
    """To compile for. The environment must hold :data:`ENVIRONMENT` before JAX is imported."""
    require_compiler()
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # else a chip is two devices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:  # whatever libtpu raises: its message says what it minds
        raise InputError(f"--topology {topology.name}: {_first_line(error)}") from error
    return found.devices


def require_compiler() -> None:
    """Raises where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            'the TPU compiler is not installed: pip install "jaxlm[tpu]" (no TPU is needed)'
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
