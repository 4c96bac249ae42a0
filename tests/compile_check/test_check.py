import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxlm.compile_check import check, topology
from jaxlm.compile_check.check import from_json, needed_bytes, to_json
from jaxlm.compile_check.step import Assumed
from jaxlm.errors import InputError

PLACE = topology.read("v5e:4x4")


def test_reports_survive_json(report):
    assert from_json(to_json(report)) == report
    assert json.loads(to_json(report))["step_s"] == pytest.approx(2e-3 + 4e-3 + 5e-4)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (596.05G) exceeds available HBM (15.75G).",
            596.05 * 2**30 + 1000,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.31G of 15.75G hbm. "
            "Exceeded hbm capacity by 2.56G.",
            18.31 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: some other words", None),
    ],
)
def test_what_would_be_needed(message, needed):
    assert needed_bytes(message, 1000.0) == needed


@pytest.fixture
def with_compiler(monkeypatch):
    monkeypatch.setattr(type(PLACE), "require_compiler", lambda self: None)


def ends(monkeypatch, code, stderr, report=None):
    """The process that compiles ends like this."""

    def run(command, **options):
        assert options["env"].items() >= PLACE.environment.items()
        assert json.loads(options["input"])["topology"] == "v5e:4x4"
        if report is not None:
            Path(command[-1]).write_text(to_json(report))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("code", "stderr", "message"),
    [
        (-11, "garbage", "the TPU compiler ended with SIGSEGV on v5e:4x4, which says nothing of"),
        (-9, "", "ended with SIGKILL"),
        (1, "Traceback\nXlaRuntimeError: INTERNAL: bad\n", "exit code 1 .*: XlaRuntimeError: INT"),
        (2, "error: the mesh is wrong\n", "^the mesh is wrong$"),
        (0, "", "exit code 0"),
    ],
)
def test_a_process_without_a_report(config, monkeypatch, with_compiler, code, stderr, message):
    ends(monkeypatch, code, stderr)
    with pytest.raises(InputError, match=message):
        check.check(config, Assumed(), PLACE)


def test_a_compiler_of_another_jax_is_named(config, monkeypatch, with_compiler):
    ends(monkeypatch, 1, "XlaRuntimeError: INTERNAL: bad\n")
    wanted = next(line for line in metadata.requires("jax") if line.startswith("libtpu"))
    own = wanted.split(";")[0].removeprefix("libtpu==")
    named = rf"bad; libtpu 0\.0\.1 is not .*'libtpu=={re.escape(own)}'"
    for version, said in (("0.0.1", named), (own.replace("*", "1"), "bad$")):
        found = SimpleNamespace(version=version)
        monkeypatch.setattr(metadata, "distributions", lambda name, found=found: [found])
        with pytest.raises(InputError, match=said):
            check.check(config, Assumed(), PLACE)


def test_a_process_with_a_report(config, report, monkeypatch, with_compiler):
    ends(monkeypatch, 0, "a warning", report)
    assert check.check(config, Assumed(), PLACE) == report


def test_without_the_compiler_nothing_is_started(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("started"))
    with pytest.raises(InputError, match=r'pip install "jaxlm\[tpu\]"'):
        check.check(config, Assumed(), PLACE)
