"""Compiling ahead of time."""

import ctypes
import sys
from typing import Any


def compile_ahead(function: Any, *args: Any) -> Any:
    """A jitted function compiled for arguments like these, and the compiler's memory given back.

    XLA uses 0.4 GiB for the step of a BERT-base, which the allocator would keep for small blocks.
    What cannot be lowered (``pmap`` in several processes) is compiled by its first call.
    """
    if not hasattr(function, "lower"):
        return function
    compiled = function.lower(*args).compile()
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        for name, *values in (("MallocExtension_ReleaseFreeMemory",), ("malloc_trim", 0)):
            if hasattr(library, name):
                getattr(library, name)(*values)
                break
    return compiled
