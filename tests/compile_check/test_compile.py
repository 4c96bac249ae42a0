"""Real compiles, for TPUs where libtpu is installed (``pip install "jaxlm[tpu]"``), for GPUs where
the CUDA plugin of JAX is (``pip install "jax[cuda12-local]"``)."""

import importlib.util
from dataclasses import replace

import pytest

from jaxlm.compile_check import check, topology
from jaxlm.compile_check.step import Assumed
from jaxlm.models.bert import BertConfig
from jaxlm.sharding import MeshConfig

on_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
on_gpu = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the CUDA plugin is not installed"
)
TINY = BertConfig(num_layers=3, hidden_dim=128, num_heads=2, mlp_dim=256, unroll=1)
ASSUMED = Assumed(length=32, vocab_size=500)
PLACES = [pytest.param("v5e:2x2", marks=on_tpu), pytest.param("h100:4", marks=on_gpu)]


@pytest.mark.parametrize("place", PLACES)
def test_a_small_model_fits(config, place):
    config = replace(config, model=TINY, mesh=MeshConfig(fsdp=4))
    found = check.check(config, ASSUMED, topology.read(place))
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


@on_tpu
@pytest.mark.slow
def test_long_rows_take_a_kernel(config):
    model = replace(TINY, max_length=2048, attention_dropout_rate=0.0)
    config = replace(config, model=model, mesh=MeshConfig(data=2, tensor=2))
    needed = {}
    for attention in ("splash", "plain"):
        given = replace(config, attention=attention, data=replace(config.data, batch_size=8))
        place, assumed = topology.read("v5e:2x2"), replace(ASSUMED, length=2048)
        found = check.check(given, assumed, place)
        assert attention in found.attention
        needed[attention] = found.memory["temporaries"]
    assert 2 * needed["splash"] < needed["plain"]


@pytest.mark.parametrize("place", PLACES)
def test_a_large_model_does_not_fit(config, place):
    # The control: 8 G parameters in the token table alone, and twice as much in moments.
    model = replace(TINY, num_layers=1, hidden_dim=8192, vocab_size=1_000_064)
    found = check.check(replace(config, model=model), ASSUMED, topology.read(place))
    assert not found.fits
    assert found.needed is None or found.needed > 3 * 4 * 8e9


@on_gpu
def test_hosts_of_gpus_and_adapters(config, tmp_path):
    config = replace(config, model=TINY, mesh=MeshConfig(fsdp=4, num_slices=2))
    found = check.check(config, ASSUMED, topology.read("a100:1x4", num_slices=2))
    assert found.mesh == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    rates = {each.kind: each.bytes / each.seconds for each in found.traffic}
    # Gradients cross the network; what is gathered and scattered stays in a host.
    assert rates["all-reduce"] < rates["all-gather"] == pytest.approx(3e11)
