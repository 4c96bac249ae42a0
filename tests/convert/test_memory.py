"""What reading a published model costs: a peak of memory beside that of an idle process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from addresses import free_address
from safetensors.numpy import save_file
from tiny_heads import tokenizer

from jaxlm.convert import bert, layout
from jaxlm.data import tokenizers
from jaxlm.models.bert import BertConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]
CONFIG = BertConfig(
    vocab_size=30_592, num_layers=12, hidden_dim=768, num_heads=12, mlp_dim=3072, max_length=512
)
SMALL = replace(CONFIG, vocab_size=64, hidden_dim=48, mlp_dim=96, max_length=32)
MEASURE = """
import re, sys
from pathlib import Path
import jax
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.loader import DataConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import Full
from jaxlm.runs import base, finetuned, finetuning, pretrained, steps
from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.train.loop import TrainConfig

small, folder, how, address, number, processes = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(address, int(processes), int(number))
mesh, train = MeshConfig(fsdp=jax.device_count()), TrainConfig(steps=1)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def tune(folder, tuning, frozen_dtype="float32"):
    data = LabelledConfig(train=Table(path="none.csv"))
    more = {"tuning": tuning, "frozen_dtype": frozen_dtype, "mesh": mesh, "train": train}
    config = FinetuneConfig(name="m", base=folder, data=data, **more)
    loaded, labels = base.load(folder), ("a", "b")
    config = finetuning.resolve(config, loaded, loaded.tokenizer, "cpu")
    placement = finetuned.make_placement(config, labels, finetuned.make_init(config, labels))
    return finetuned.make_state(config, labels, loaded, placement)

def pretrain(folder):
    loaded, data = base.load(folder), DataConfig(paths=("none",))
    config = PretrainConfig(name="m", data=data, model=loaded.config, mesh=mesh, train=train)
    placement = pretrained.make_placement(config, None)
    encoder = steps.with_rows(loaded.encoder, loaded.config)
    return placement.init(jax.random.key(0), placement.put_params({"encoder": encoder}))

calls = {
    "load": huggingface.load,
    "base": base.load,
    "place": lambda folder: huggingface.place(folder, make_mesh(mesh)),
    "pretrain": pretrain,
    "full": lambda folder: tune(folder, Full()),
    "lora": lambda folder: tune(folder, LoraConfig()),
    "int8": lambda folder: tune(folder, LoraConfig(), "int8"),
}
arrays = lambda x: [leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array)]
jax.block_until_ready(arrays(calls[how](small)))  # what does not depend on the size
# Not the peak: that of the small model would count as memory that the large one need not take.
before = int(re.search(r"VmRSS:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
kept = calls[how](folder)
jax.block_until_ready(arrays(kept))
print("peak", peak() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the models ``small`` and ``large``."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("small", SMALL), ("large", CONFIG)):
        path = folder / name
        path.mkdir()
        rows, sizes = layout.architecture_of(config).encoder, layout.sizes_of(config)
        rng, tensors = np.random.default_rng(0), {}
        for row in rows:
            tensors |= row.write(rng.standard_normal(row.shape(sizes), np.float32), sizes)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(bert.write_config(config)))
        tokenizers.save(tokenizer(), path / "tokenizer.json")
    return folder


def shares(folder: Path, how: str, processes: int, address: str = "") -> list[float]:
    """The peak of each process, in sizes of the model: on CPUs devices' arrays are in it."""
    models = [str(folder / name) for name in ("small", "large")]
    # glibc gives back what is freed, whatever was freed before.
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}
    environment = os.environ | tunables | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, *models, how, address, str(i), str(processes)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    said = [one.communicate()[0] for one in running]
    assert all(one.returncode == 0 for one in running)
    size = (folder / "large" / "model.safetensors").stat().st_size
    return [int(text.split("peak ")[1]) / size for text in said]


@pytest.mark.parametrize(
    ("how", "least", "most"),
    [
        ("load", 1.0, 1.3),
        ("base", 0.0, 0.6),  # one tensor, of which the largest is 0.22
        ("place", 1.0, 1.3),
        ("pretrain", 3.0, 3.3),  # two moments
        ("full", 3.0, 3.3),
        ("lora", 1.0, 1.3),
        ("int8", 0.4, 1.0),
    ],
)
def test_a_model_is_read_at_the_cost_of_itself(how, least, most, folder):
    (share,) = shares(folder, how, 1)
    assert least <= share < most


@pytest.mark.parametrize(
    ("how", "kept"), [("place", 0.5), ("pretrain", 1.5), ("full", 1.5), ("lora", 0.5)]
)
def test_each_of_two_processes_reads_its_half(how, kept, folder):
    with free_address() as address:
        both = shares(folder, how, 2, address)
    assert min(both) >= kept
    assert max(both) < kept + 0.15  # the token table is 0.22: read as a whole, it is cut
