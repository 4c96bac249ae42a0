"""Settings that must be made before JAX is imported."""

import os
import sys
from ctypes.util import find_library

TUNABLES, PRELOAD = "GLIBC_TUNABLES", "LD_PRELOAD"
CACHE = "JAX_COMPILATION_CACHE_DIR"
# A step that is queued behind another takes its temporary buffer before that one's is free.
SYNCHRONOUS = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}


def tune_process() -> None:
    """Keep what is compiled for an accelerator; on Linux CPUs, start again with an allocator.

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
    if {TUNABLES, PRELOAD} & set(os.environ):
        return
    environment, name = allocator()
    if not environment:
        return
    os.environ.update(SYNCHRONOUS | environment)
    setting = " ".join(f"{variable}={value}" for variable, value in environment.items())
    print(
        f"using {name}, for speed ({setting}; {TUNABLES}= turns it off)",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def allocator() -> tuple[dict[str, str], str]:
    """The best allocator at hand: (environment, name).

    tcmalloc, where it is installed, keeps large blocks; glibc with huge pages faults 500 times
    less often. They are equally fast, except where a hypervisor takes freed pages away (there
    every other step of a BERT-base takes 1.6 times as long without tcmalloc), and tcmalloc may
    hold the temporary buffer twice.
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
