from dataclasses import replace

import pytest

from jaxlm.errors import InputError
from jaxlm.nn.choose import Attends, Setting, choose, obstacle

CPU = Setting(
    platform="cpu",
    device="cpu",
    length=2048,
    dtype="float32",
    attends=Attends(64),
    packs_rows=False,
)
TPU = replace(CPU, platform="tpu", device="TPU v5 lite", dtype="bfloat16")
H100 = replace(TPU, platform="gpu", device="NVIDIA H100", capability=9.0)
DROPS = Attends(64, dropout_rate=0.1)


@pytest.fixture(autouse=True)
def without_tokamax(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (CPU, "blockwise"),
        (replace(CPU, length=128), "plain"),
        (TPU, "splash"),
        (replace(TPU, length=128), "plain"),
        (replace(TPU, attends=DROPS), "blockwise"),
        (replace(TPU, splits_rows=True), "blockwise"),
        (H100, "cudnn"),
        (replace(H100, packs_rows=True), "blockwise"),
        (replace(H100, attends=Attends(64, has_window=True)), "blockwise"),
        (replace(H100, attends=DROPS, length=512), "plain"),
        (replace(H100, present=False), "blockwise"),
    ],
)
def test_what_suits(setting, name):
    assert choose(setting).name == name


def test_tokamax_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    packed = replace(H100, packs_rows=True)
    assert choose(packed).name == "tokamax"
    assert choose(replace(packed, capability=8.0, device="NVIDIA A100")).name == "blockwise"


@pytest.mark.parametrize(
    ("setting", "wanted", "why"),
    [
        (CPU, "splash", "it is a kernel for TPUs, and this is a CPU"),
        (TPU, "cudnn", "it is a kernel for GPUs, and this is a TPU"),
        (replace(TPU, attends=DROPS), "splash", "the attention dropout rate is 0.1"),
        (replace(TPU, splits_rows=True), "splash", r"mesh\.sequence"),
        (replace(H100, dtype="float32"), "cudnn", "dtype is float32"),
        (replace(H100, attends=Attends(100)), "cudnn", "100 channels"),
        (replace(H100, packs_rows=True), "cudnn", "several documents"),
        (
            replace(H100, capability=7.5, device="Tesla T4"),
            "cudnn",
            "from A100 on, and .* Tesla T4",
        ),
        (replace(H100, capability=None, device="MI300X"), "cudnn", "from A100 on, and .* MI300X"),
        (replace(H100, present=False), "tokamax", "compiles on a GPU alone"),
        (replace(H100, capability=None), "tokamax", "NVIDIA H100"),
        (H100, "tokamax", "pip install"),
    ],
)
def test_a_kernel_that_cannot_run(setting, wanted, why):
    with pytest.raises(InputError, match=f"attention={wanted} cannot run here: .*{why}") as error:
        choose(setting, wanted)
    # The way out works on the very same setting.
    assert f"takes {choose(setting, 'auto').name} here" in str(error.value)


@pytest.mark.parametrize("setting", [CPU, TPU, H100])
@pytest.mark.parametrize("wanted", ["plain", "blockwise"])
def test_what_runs_everywhere(setting, wanted):
    assert choose(replace(setting, attends=DROPS, splits_rows=True), wanted).name == wanted


def test_what_is_chosen_can_run():
    for setting in (CPU, TPU, H100):
        assert obstacle(choose(setting).name, setting) is None
