"""GPUs one does not have: hosts of up to eight, with NVLink inside and InfiniBand between them.

Sources: NVIDIA's datasheets (FLOP/s, links: half of NVLink's two-way figure) and reference systems
(network: DGX A100, H100, H200 and B200, one adapter for each GPU); the rest is what the driver
tells of each, as the specifications that XLA compiles from repeat it.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxlm.compile_check.chip import Chip, Coordinates, Topology
from jaxlm.compile_check.hlo import Kind
from jaxlm.errors import InputError

# JAX takes that much at start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """What XLA must know to compile for it, beside what all chips have."""

    device_kind: str
    memory: int
    capability: int
    """The major number of the CUDA compute capability; the minor one is 0 for all of these."""
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    shared_memory_per_core: int

    def target(self) -> str:
        """As text of XLA's ``GpuTargetConfigProto``."""
        version = "13.0.0"  # of the driver; the newest that JAX knows
        extension = "ACCELERATED_FEATURES" if self.capability > 8 else "NONE"
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              name: "{self.device_kind}"
              device_vendor: "NVIDIA Corporation"
              cuda_compute_capability {{ major: {self.capability} feature_extension: {extension} }}
              driver_version: "{version}"
              runtime_version: "12.8.0"
              compile_time_toolkit_version: "12.8.0"
              device_address_bits: 64
              device_memory_size: {self.memory}
              memory_bandwidth: {self.hbm_rate:.0f}
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block_optin: {self.shared_memory_per_core - 1024}
              shared_memory_per_block: 49152
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_core_limit: 2048
              threads_per_block_limit: 1024
              threads_per_warp: 32
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
        """


def _gpu(*, memory: int, **known: Any) -> Gpu:
    return Gpu(memory=memory, hbm=SHARE * memory, **known)


def _hopper(name: str, device_kind: str, memory: int, hbm_rate: float) -> Gpu:
    return _gpu(
        name=name,
        device_kind=device_kind,
        flops=989e12,
        memory=memory,
        hbm_rate=hbm_rate,
        link=4.5e11,
        network=5e10,
        capability=9,
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        l2_cache=52_428_800,
        shared_memory_per_core=233_472,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _gpu(
            name="a100",
            device_kind="NVIDIA A100-SXM4-80GB",
            flops=312e12,
            memory=85_100_068_864,
            hbm_rate=2.039e12,
            link=3e11,
            network=2.5e10,
            capability=8,
            cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            l2_cache=41_943_040,
            shared_memory_per_core=167_936,
        ),
        _hopper("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3.352e12),
        _hopper("h200", "NVIDIA H200", 151_397_597_184, 4.8e12),
        _gpu(
            name="b200",
            device_kind="NVIDIA B200",
            flops=2250e12,
            memory=191_514_411_008,
            hbm_rate=7.672e12,
            link=9e11,
            network=5e10,
            capability=10,
            cores=148,
            fpus_per_core=128,
            clock_ghz=1.965,
            l2_cache=132_644_864,
            shared_memory_per_core=233_472,
        ),
    )
}
PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class GpuHosts(Topology):
    """``shape`` is the hosts of a slice, and the GPUs of each."""

    chip: Gpu
    compiler: ClassVar[str] = "GPU compiler"
    compiler_refuses: ClassVar[bool] = False

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that keep a local GPU from being used."""
        return {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

    def require_compiler(self) -> None:
        """Raise where JAX's plugin for CUDA is not installed."""
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise InputError(
                'the GPU compiler is not installed: pip install "jax[cuda12-local]" (no GPU and no '
                "CUDA is needed)"
            )

    def devices(self) -> Sequence[Any]:
        """To compile for. JAX knows no slices of GPUs: hosts are shared out when the mesh is
        made."""
        self.require_compiler()
        from jax.experimental import topologies

        shape = f"1x{self.num_slices * self.shape[0]}x{self.shape[1]}"
        found = topologies.get_topology_desc(
            platform="cuda", target_config=self.chip.target(), topology=shape
        )
        return found.devices

    def bandwidth(self, kind: Kind, members: Sequence[Coordinates]) -> float:
        """NVLink inside a host; beyond, at most what the adapters of the group's GPUs send."""
        num_hosts = len({host for _, host, _ in members})
        if num_hosts < 2:
            return self.chip.link
        return min(self.chip.link, self.chip.network * len(members) / num_hosts)


def read(kind: str, sizes: str, num_slices: int) -> GpuHosts:
    """``h100`` and ``4x8`` (or ``8``: one host), and the like."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)", sizes)
    shape = (int(found[1] or 1), int(found[2])) if found else (0, 0)
    if shape[0] < 1 or not 1 <= shape[1] <= PER_HOST:
        raise InputError(
            f"--topology {kind}:{sizes}: write the number of hosts, x, and the GPUs of each (up to "
            f"{PER_HOST}), such as {kind}:4x8"
        )
    return GpuHosts(chip=CHIPS[kind], shape=shape, num_slices=num_slices)
