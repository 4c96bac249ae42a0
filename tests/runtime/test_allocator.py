import os
import subprocess
import sys

import jax
import pytest

from jaxlm.runtime import allocator


@pytest.fixture
def environment(monkeypatch):
    """What tune_process may read and write."""
    names = ("JAX_PLATFORMS", allocator.CACHE, allocator.TUNABLES, allocator.PRELOAD)
    own = {name: value for name, value in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", own)
    return own


@pytest.mark.parametrize("given", [None, "", "/elsewhere"])
def test_what_is_compiled_for_an_accelerator_is_kept(environment, given):
    environment["JAX_PLATFORMS"] = "tpu"
    if given is not None:
        environment[allocator.CACHE] = given
    allocator.tune_process()
    default = os.path.expanduser("~/.cache/jaxlm")
    assert environment[allocator.CACHE] == (default if given is None else given)


def test_a_cpu_starts_again_with_an_allocator(environment, monkeypatch, capsys):
    environment["JAX_PLATFORMS"] = "cpu"
    monkeypatch.setattr(
        allocator, "allocator", lambda: ({allocator.TUNABLES: "huge"}, "huge pages")
    )
    started = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    held = []
    monkeypatch.setattr(allocator, "one_step_at_a_time", lambda: held.append(True))
    allocator.tune_process()
    assert len(started) == 1
    assert not held
    assert environment[allocator.TUNABLES] == "huge"
    assert allocator.CACHE not in environment
    assert "using huge pages" in capsys.readouterr().err
    allocator.tune_process()  # in the new process
    assert len(started) == 1
    assert held


STEP = """
from jaxlm.runtime.allocator import tune_process
tune_process()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, x: jnp.tanh(x @ x), x))
x = jax.block_until_ready(jnp.ones((400, 400)))
step = step.lower(x).compile()
print(step(x).is_ready())
"""


def test_a_step_on_a_cpu_has_ended_when_its_call_returns():
    """Else the next one takes a temporary buffer while this one still has its own."""
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment = {**own, "JAX_PLATFORMS": "cpu", allocator.TUNABLES: ""}
    command = [sys.executable, "-c", STEP]
    ended = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert ended.stdout == "True\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [False]),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, []),
        ({allocator.NUM_DEVICES: "2"}, []),
    ],
)
def test_devices_that_are_simulated_keep_their_queues(environment, monkeypatch, given, expected):
    environment["XLA_FLAGS"] = ""
    environment |= given
    set_to = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.append(value))
    allocator.one_step_at_a_time()
    assert set_to == expected
