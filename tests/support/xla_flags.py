"""XLA's flags in tests, whose time is that of many small compilations."""

from importlib import metadata


def xla_flags(devices: int) -> str:
    """So many devices of a CPU; compile fast rather than well."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    if metadata.version("jaxlib").startswith("0.10."):  # of which later ones know nothing
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    return " ".join(flags)
