import importlib.util

import pytest

from jaxlm.compile_check import topology
from jaxlm.errors import InputError
from jaxlm.train.metrics import peak_flops

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


def test_chips_agree_with_those_of_training():
    assert {chip.name: chip.flops for chip in topology.CHIPS} == {
        name: peak_flops(kind) for name, kind in KINDS.items()
    }


def test_sizes_and_rings():
    place = topology.read("v5e:16x8", num_slices=2)
    assert (place.name, place.num_devices) == ("v5e:16x8", 256)
    assert [place.is_ring(axis) for axis in (0, 1)] == [True, False]
    cube = topology.read("v5p:8x4x2")
    assert [cube.is_ring(axis) for axis in (0, 1, 2)] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "'v9' is not one of v4, v5e, v5p, v6e"),
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
        topology.devices(topology.read("v5e:2x2"))
