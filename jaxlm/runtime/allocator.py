"""Settings that must be made before JAX is imported."""

import os
import sys
from ctypes.util import find_library

TUNABLES, PRELOAD = "GLIBC_TUNABLES", "LD_PRELOAD"
CACHE, NUM_DEVICES = "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"


def tune_process() -> None:
    """Keep what is compiled for an accelerator; on Linux CPUs, start again with an allocator.

    On CPUs :func:`one_step_at_a_time` holds, too.

    A GPU's or TPU's steps take minutes to compile, so a resumed run finds them in
    ``~/.cache/jaxlm``, unless ``JAX_COMPILATION_CACHE_DIR`` names another folder, or is empty.

    XLA:CPU allocates its temporary buffers again at every step, and glibc frees the pages each
    time: a quarter of the time goes into page faults (a step 1.38 times as long for a BERT-mini).
    The :func:`allocator` keeps them. Nothing is started again where an accelerator is asked for or
    found, or either variable is set already; ``GLIBC_TUNABLES= python scripts/...`` turns it off.
    """
    if _has_accelerator():
        os.environ.setdefault(CACHE, os.path.expanduser("~/.cache/jaxlm"))
        return
    environment, name = allocator()
    if not environment or {TUNABLES, PRELOAD} & set(os.environ):
        one_step_at_a_time()
        return
    os.environ.update(environment)
    setting = " ".join(f"{variable}={value}" for variable, value in environment.items())
    print(
        f"using {name}, for speed ({setting}; {TUNABLES}= turns it off)",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def one_step_at_a_time() -> None:
    """Let a CPU's step end within its call, so that one temporary buffer is in use at a time.

    A step that is queued runs on another thread, which announces the outputs before it frees the
    buffer; the next step has by then taken one of its own, even if the outputs are waited for.
    To be called before JAX starts its devices; no environment variable sets it. Does nothing where
    the process simulates several devices, which could hang in sums over them.
    """
    import jax  # only here: the allocator is settled before JAX is imported

    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" not in flags and NUM_DEVICES not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def allocator() -> tuple[dict[str, str], str]:
    """The best allocator at hand: (environment, name).

    tcmalloc, where it is installed, keeps large blocks; glibc with huge pages faults 500 times
    less often. They are equally fast, except where a hypervisor takes freed pages away (there
    every other step of a BERT-base takes 1.6 times as long without tcmalloc).
    """
    if sys.platform != "linux":
        return {}, "default"
    library = find_library("tcmalloc_minimal")
    if library:
        return {PRELOAD: library}, "tcmalloc"
    return {TUNABLES: "glibc.malloc.hugetlb=1"}, "glibc's huge pages"


def _has_accelerator() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(
        os.path.exists(path) for path in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")
    )
