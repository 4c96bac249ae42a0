"""Every file in configs/ loads, shards on several meshes, and takes one tiny step."""

import ast
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import run
from jaxlm.config import RunConfig
from jaxlm.objectives.masking import Vocabulary
from jaxlm.sharding import MeshConfig

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
VOCAB_SIZE = 64


def vocabulary() -> Vocabulary:
    ordinary = np.arange(VOCAB_SIZE) >= 5
    return Vocabulary(
        mask_id=4,
        start_id=2,
        ordinary=jax.numpy.asarray(np.flatnonzero(ordinary)),
        is_ordinary=jax.numpy.asarray(ordinary),
        word_starts=jax.numpy.asarray(ordinary),
    )


def tiny(config: RunConfig) -> RunConfig:
    model = replace(
        config.model,
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        hidden_dim=16,
        num_heads=4,
        mlp_dim=32,
        max_length=16,
        dtype="float32",
    )
    micro = config.train.num_micro_batches
    return replace(config, model=model, data=replace(config.data, batch_size=8 * micro))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_gives_command_hardware_and_expectation(path: Path) -> None:
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert header is not None
    assert f"python scripts/pretrain.py configs/{path.name}" in header
    assert "Hardware and time:" in header
    assert "Expected:" in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4)], ids=str
)
def test_shards_at_full_size(path: Path, mesh: MeshConfig) -> None:
    config = configs.read_file(path)
    model = replace(config.model, vocab_size=30_528)
    if mesh.tensor > 1 and model.num_heads % mesh.tensor:
        model = replace(model, num_heads=4)
    placement = run.make_placement(replace(config, model=model, mesh=mesh), vocabulary())
    table = placement.abstract_state.trainable["params"]["encoder"]["token_embed"]["embedding"]
    shard = table.sharding.shard_shape(table.shape)
    assert shard == (30_528 // mesh.tensor, model.hidden_dim // mesh.fsdp)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_takes_a_step(path: Path) -> None:
    config = tiny(configs.read_file(path))
    placement = run.make_placement(config, vocabulary())
    state = placement.init(jax.random.key(0))
    rows = config.data.batch_size
    batch = {
        "tokens": np.random.default_rng(0).integers(5, VOCAB_SIZE, (rows, 16)).astype(np.uint16),
        "lengths": np.full(rows, 16, np.int32),
        "index": np.arange(rows, dtype=np.int32),
    }
    state, sums = placement.train_step(state, placement.put_batch(batch), np.float32(0.5))
    assert int(state.step) == 1
    assert sums.means()["loss"] == pytest.approx(np.log(VOCAB_SIZE), rel=0.1)
    assert not sums.counts["skipped"]
