"""Real compiles for TPUs, where libtpu is installed: ``pip install "jaxlm[tpu]"``."""

import importlib.util
from dataclasses import replace

import pytest

from jaxlm.compile_check import check, topology
from jaxlm.compile_check.step import Assumed
from jaxlm.models.bert import BertConfig
from jaxlm.sharding import MeshConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
TINY = BertConfig(num_layers=3, hidden_dim=128, num_heads=2, mlp_dim=256, unroll=1)
ASSUMED = Assumed(length=32, vocab_size=500)
PLACE = topology.read("v5e:2x2")


def test_a_small_model_fits(config):
    config = replace(config, model=TINY, mesh=MeshConfig(fsdp=4))
    found = check.check(config, ASSUMED, PLACE)
    assert found.fits
    assert found.needed is not None
    assert found.needed < 2**30
    # A quarter of all parameters in float32, and twice that in moments.
    assert found.memory["parameters"] == pytest.approx(found.num_parameters, rel=0.05)
    assert found.memory["moments"] == pytest.approx(2 * found.num_parameters, rel=0.05)
    assert found.unknown_loops == 0
    sent = {each.kind: each.bytes for each in found.traffic}
    # Every kernel is gathered in bfloat16 forward and backward, whole or neighbour by neighbour,
    # and its gradient scattered; counted once, the loop over three layers would send a third.
    kernels = 3 * (4 * 128 * 128 + 2 * 128 * 256)
    assert sent["all-gather"] + sent["collective-permute"] > 2 * 2 * kernels * 3 / 4
    assert sum(sent.values()) > 3 * 2 * kernels * 3 / 4


def test_a_large_model_does_not_fit(config):
    # The control: 4 G parameters in the token table alone, and twice as much in moments.
    model = replace(TINY, num_layers=1, hidden_dim=8192, vocab_size=500_032)
    found = check.check(replace(config, model=model), ASSUMED, PLACE)
    assert not found.fits
    assert found.needed is None or found.needed > 3 * 4 * 4e9
