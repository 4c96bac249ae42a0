"""What reading a published model costs: a peak of memory beside that of an idle process."""

import json
import os
import subprocess
import sys
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
MEASURE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxlm.config import FinetuneConfig
from jaxlm.convert import huggingface
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import Full
from jaxlm.runs import base, finetuned, finetuning
from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.train.loop import TrainConfig

folder, how, address, number, processes = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(address, int(processes), int(number))
mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
jnp.zeros(3).block_until_ready()
before = peak()

def tune(tuning):
    labels, mesh = ("a", "b"), MeshConfig(fsdp=jax.device_count())
    data, train = LabelledConfig(train=Table(path="none.csv")), TrainConfig(steps=1)
    config = FinetuneConfig(name="m", base=folder, data=data, train=train, tuning=tuning, mesh=mesh)
    loaded = base.load(folder)
    config = finetuning.resolve(config, loaded, loaded.tokenizer, "cpu")
    placement = finetuned.make_placement(config, labels, finetuned.make_init(config, labels))
    return finetuned.make_state(config, labels, loaded, placement)

calls = {
    "full": lambda: tune(Full()),
    "lora": lambda: tune(LoraConfig()),
    "load": lambda: huggingface.load(folder),
    "base": lambda: base.load(folder),
    "place": lambda: huggingface.place(folder, mesh),
}
kept = jax.block_until_ready(calls[how]())
print("peak", peak() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "m"
    path.mkdir()
    rows, sizes = layout.architecture_of(CONFIG).encoder, layout.sizes_of(CONFIG)
    rng, tensors = np.random.default_rng(0), {}
    for row in rows:
        tensors |= row.write(rng.standard_normal(row.shape(sizes), np.float32), sizes)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(bert.write_config(CONFIG)))
    tokenizers.save(tokenizer(), path / "tokenizer.json")
    return path


def shares(folder: Path, how: str, processes: int, address: str = "") -> list[float]:
    """The peak of each process, in sizes of the model."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(folder), how, address, str(i), str(processes)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    said = [one.communicate()[0] for one in running]
    assert all(one.returncode == 0 for one in running)
    size = (folder / "model.safetensors").stat().st_size
    return [int(text.split("peak ")[1]) / size for text in said]


@pytest.mark.parametrize(("how", "more"), [("load", 0), ("base", 0), ("place", 0), ("tune", 2)])
def test_a_model_is_read_at_the_cost_of_itself(how, more, folder):
    (share,) = shares(folder, how, 1)
    assert 1 <= share - more < 1.3  # tuning adds two moments


def test_each_of_two_processes_reads_its_half(folder):
    with free_address() as address:
        both = shares(folder, "place", 2, address)
    assert min(both) >= 0.5
    assert max(both) < 1.3 / 2
