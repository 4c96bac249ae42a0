import importlib.util

import pytest

from jaxlm.compile_check import gpu, topology, tpu
from jaxlm.errors import InputError
from jaxlm.train.metrics import peak_flops

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def test_chips_agree_with_those_of_training():
    for name, chip in tpu.CHIPS.items():
        assert chip.flops == peak_flops(KINDS[name])
    for chip in gpu.CHIPS.values():
        assert chip.flops == peak_flops(chip.device_kind)


def test_sizes_and_rings():
    place = tpu.read("v5e", "16x8", num_slices=2)
    assert (place.name, place.num_devices) == ("v5e:16x8", 256)
    assert [place.is_ring(axis) for axis in (0, 1)] == [True, False]
    for sizes, closed in (("8x4x4", True), ("8x4x2", False), ("2x2x4", False)):
        assert tpu.read("v5p", sizes, num_slices=1).is_ring(2) is closed, sizes


def test_hosts_of_gpus():
    place = topology.read("h100:4x8", num_slices=2)
    assert (place.name, place.num_devices) == ("h100:4x8", 64)
    assert topology.read("h100:8") == topology.read("h100:1x8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "'v9' is not one of v4, v5e, v5p, v6e, a100, h100, h200, b200"),
        ("h100", "number of hosts, x, and the GPUs of each"),
        ("h100:0x8", "number of hosts, x, and the GPUs of each"),
        ("h100:16", r"up to 8\), such as h100:4x8"),
        ("a100:2x2x8", "such as a100:4x8"),
        ("v5e", "v5e has 2 axes, such as v5e:4x4"),
        ("v5e:4x4x4", "v5e has 2 axes"),
        ("v5p:4x4", "v5p has 3 axes, such as v5p:4x4x4"),
        ("v5e:4x", "v5e has 2 axes"),
        ("v5e:3x4", "a host holds 2x2 chips"),
        ("v5e:0x4", "a host holds 2x2 chips"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(InputError, match=message):
        topology.read(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "jaxlm\[tpu\]"'):
        topology.read("v5e:2x2").devices()
    with pytest.raises(InputError, match=r'pip install "jax\[cuda12-local\]"'):
        topology.read("h100:8").devices()
