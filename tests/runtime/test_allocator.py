import os

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
    allocator.tune_process()
    assert len(started) == 1
    assert environment[allocator.TUNABLES] == "huge"
    assert allocator.CACHE not in environment
    assert "using huge pages" in capsys.readouterr().err
    allocator.tune_process()  # in the new process
    assert len(started) == 1
