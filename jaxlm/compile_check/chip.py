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
    """Dense, in bfloat16, each second."""
    hbm: float
    """Bytes that a program may use."""
    hbm_rate: float
    link: float
    """Of one link to its neighbours."""
    network: float
    """To other slices of TPUs; from a GPU to other hosts."""


@dataclass(frozen=True, kw_only=True)
class Topology(abc.ABC):
    """Devices of one kind: a number of slices, each of the same shape."""

    chip: Chip
    shape: tuple[int, ...]
    """Of one slice."""
    num_slices: int = 1
    compiler: ClassVar[str]
    """Its name, as a person knows it."""
    compiler_refuses: ClassVar[bool]
    """Whether it fails where the memory does not suffice."""

    @property
    def name(self) -> str:
        """Of one slice, as it is asked for, such as ``v5e:4x4``."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """Over all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    @abc.abstractmethod
    def environment(self) -> Mapping[str, str]:
        """That must be set before JAX is imported."""

    @abc.abstractmethod
    def require_compiler(self) -> None:
        """Raise where it is not installed."""

    @abc.abstractmethod
    def devices(self) -> Sequence[Any]:
        """To compile for, each with ``coords``."""

    @abc.abstractmethod
    def bandwidth(self, kind: Kind, members: Sequence[Coordinates]) -> float:
        """Bytes/s that one device of a group can send to the others, inside a slice."""
