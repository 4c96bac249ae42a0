"""What a check must know of the devices that it compiles for, whatever their kind."""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxlm.compile_check.hlo import Kind

GIB = 2.0**30
Coordinates = Sequence[int]  # of a device


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device, as JAX sees it. Rates are bytes/s, those of links and network one way."""

    name: str
    flops: float
    """Dense FLOP/s in bfloat16."""
    hbm: float
    """Bytes that a program may use."""
    hbm_rate: float
    link: float
    """Rate of one link to a neighbour."""
    network: float
    """Rate to other slices of TPUs; from a GPU to other hosts."""


@dataclass(frozen=True, kw_only=True)
class Topology(abc.ABC):
    """Devices of one kind: a number of slices, each of the same shape."""

    chip: Chip
    shape: tuple[int, ...]
    """Shape of one slice."""
    num_slices: int = 1
    compiler: ClassVar[str]
    """Name of the compiler, for messages."""
    compiler_refuses: ClassVar[bool]
    """Whether it fails if the memory does not suffice."""

    def mismatch(self) -> str:
        """What to do where it is not the compiler of this JAX, after a colon; "" where it is."""
        return ""

    @property
    def name(self) -> str:
        """Name of one slice as given on the command line, such as ``v5e:4x4``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """Over all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    @abc.abstractmethod
    def environment(self) -> Mapping[str, str]:
        """Environment variables to set before JAX is imported."""

    @abc.abstractmethod
    def require_compiler(self) -> None:
        """Raise if the compiler is not installed."""

    @abc.abstractmethod
    def devices(self) -> Sequence[Any]:
        """Devices to compile for, each with ``coords``."""

    @abc.abstractmethod
    def bandwidth(self, kind: Kind, members: Sequence[Coordinates]) -> float:
        """Bytes/s that one device of a group can send to the others, inside a slice."""
