from pathlib import Path

import pytest

from jaxlm import config as configs
from jaxlm.compile_check.check import Report, Traffic
from jaxlm.compile_check.chip import GIB
from jaxlm.config import PretrainConfig

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture
def config() -> PretrainConfig:
    read = configs.read_file(CONFIGS / "bert_base.py")
    assert isinstance(read, PretrainConfig)
    return read


@pytest.fixture
def report() -> Report:
    gathered = Traffic(
        kind="all-gather", over_slices=False, count=24, overlapping=20, bytes=2e6, seconds=3e-3
    )
    reduced = Traffic(
        kind="all-reduce", over_slices=True, count=2, overlapping=2, bytes=1e6, seconds=1e-3
    )
    return Report(
        config="bert_base",
        topology="v5e:4x4",
        num_slices=2,
        num_devices=32,
        mesh={"data": 4, "fsdp": 4, "tensor": 2, "sequence": 1},
        placement="jit",
        batch_size=256,
        row_length=512,
        num_parameters=110_000_000,
        hbm=16 * GIB,
        fits=True,
        needed=4 * GIB,
        memory={"parameters": GIB, "moments": 2 * GIB, "frozen": 0.0, "batch": GIB},
        flops=1e12,
        compute_s=2e-3,
        update_s=5e-4,
        traffic=(gathered, reduced),
        unknown_loops=0,
        compile_s=30.0,
    )
