"""XLA's flags in tests, whose time is that of many small compilations."""


def xla_flags(devices: int) -> str:
    """So many devices of a CPU; compile fast rather than well."""
    return (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
