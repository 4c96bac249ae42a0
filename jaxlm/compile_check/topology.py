"""Topologies by name."""

from jaxlm.compile_check import gpu, tpu
from jaxlm.compile_check.chip import Topology
from jaxlm.errors import InputError


def read(name: str, num_slices: int = 1) -> Topology:
    """``v5e:16x16``, ``h100:4x8`` and the like."""
    kind, _, sizes = name.partition(":")
    for known in (tpu, gpu):
        if kind in known.CHIPS:
            return known.read(kind, sizes, num_slices)
    raise InputError(
        f"--topology {name}: {kind!r} is not one of {', '.join((*tpu.CHIPS, *gpu.CHIPS))}; write "
        "the kind of chip, a colon, and how many there are, such as v5e:4x4 or h100:4x8"
    )
