"""SIGINT and SIGTERM as a request to save and stop, in one process or in all of a run."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def handle(number: int, _: object) -> None:
        stop.set()
        os.write(2, b"\nsaving and stopping at the next step; the same again ends it at once\n")
        signal.signal(number, before[signal.Signals(number)])

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_together() -> Iterator[Callable[[int], bool]]:
    """A function of the step, to be asked before every step: whether to stop there.

    All processes of a run stop before the same step, whichever of them gets the signal: JAX's
    preemption service handles SIGTERM and notifies the others, so SIGINT becomes that.
    """
    if jax.process_count() == 1:
        with stop_on_signal() as stop:
            yield lambda step: stop.is_set()
        return
    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield multihost_utils.reached_preemption_sync_point
    finally:
        signal.signal(signal.SIGINT, before)
