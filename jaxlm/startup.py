"""What must be settled before JAX is imported."""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def tune_process() -> None:
    """Start this script again with huge pages for the allocator, on Linux CPUs.

    XLA:CPU allocates its temporary buffers anew at every step, and glibc gives the pages back each
    time: a quarter of the time goes into page faults (a step 1.38 times as long for a BERT-mini).
    Does nothing where an accelerator is asked for or found, or where the variable is set already;
    ``GLIBC_TUNABLES= python scripts/...`` turns it off.
    """
    if sys.platform != "linux" or TUNABLES in os.environ or _has_accelerator():
        return
    os.environ[TUNABLES] = HUGE_PAGES
    print(
        f"using huge pages, for speed ({TUNABLES}={HUGE_PAGES}; {TUNABLES}= turns it off)",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_accelerator() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(
        os.path.exists(path) for path in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")
    )
