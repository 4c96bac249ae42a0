"""Every file in configs/ loads, shards on several meshes, and takes one tiny step."""

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import PretrainConfig
from jaxlm.models.bert import TINY
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.objectives.masking import SpanTokens, Vocabulary
from jaxlm.runs import finetuned, pretrained
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.tasks.tagging import Tagging

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
PRETRAIN = [path for path in FILES if isinstance(configs.read_file(path), PretrainConfig)]
FINETUNE = [path for path in FILES if path not in PRETRAIN]
VOCAB_SIZE, LENGTH = 64, 20


def vocabulary() -> Vocabulary:
    ordinary = np.arange(VOCAB_SIZE) >= 5
    return Vocabulary(
        mask_id=4,
        start_id=2,
        end_id=3,
        ordinary=jax.numpy.asarray(np.flatnonzero(ordinary)),
        is_ordinary=jax.numpy.asarray(ordinary),
        word_starts=jax.numpy.asarray(ordinary),
        spans=SpanTokens(2, 3, (63, 62)),
    )


def resized(model: Any, **sizes: Any) -> Any:
    """With those of the sizes that the architecture has."""
    names = {field.name for field in fields(model)}
    return replace(model, **{name: size for name, size in sizes.items() if name in names})


def tiny(config: PretrainConfig) -> PretrainConfig:
    model = resized(
        config.model or TINY,  # of a base there is here nothing
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        hidden_dim=16,
        num_heads=4,
        mlp_dim=32,
        max_length=LENGTH,
        dtype="float32",
    )
    micro = config.train.num_micro_batches
    return replace(config, model=model, data=replace(config.data, batch_size=8 * micro))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_gives_command_hardware_and_expectation(path: Path) -> None:
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert header is not None
    script = "pretrain" if path in PRETRAIN else "finetune"
    assert f"python scripts/{script}.py configs/{path.name}" in header
    assert "Hardware and time:" in header
    assert "Expected:" in header


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4)], ids=str
)
def test_shards_at_full_size(path: Path, mesh: MeshConfig) -> None:
    config = configs.read_file(path)
    model = replace(config.model or TINY, vocab_size=30_528)
    if mesh.tensor > 1:
        model = resized(model, num_heads=4)
    placement = pretrained.make_placement(replace(config, model=model, mesh=mesh), vocabulary())
    table = placement.abstract_state.trainable["params"]["encoder"]["token_embed"]["embedding"]
    shard = table.sharding.shard_shape(table.shape)
    assert shard == (30_528 // mesh.tensor, model.hidden_dim // mesh.fsdp)


SCRATCH = [path for path in FINETUNE if configs.read_file(path).base is None]


@pytest.mark.parametrize("path", SCRATCH, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(fsdp=2, tensor=4), pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_model_of_its_own_shards_at_full_size(path: Path, mesh: MeshConfig) -> None:
    config = replace(configs.read_file(path), mesh=mesh)
    config = finetuned.with_encoder(config, replace(config.model, vocab_size=30_528), "cpu")
    config = replace(config, train=config.train.with_epochs(lambda epochs: 1000))
    init = finetuned.make_init(config, ("a", "b"))
    placement = finetuned.make_placement(config, ("a", "b"), init)
    table = placement.abstract_state.trainable["params"]["encoder"]["token_embed"]["embedding"]
    shard = table.sharding.shard_shape(table.shape)
    assert shard == (30_528 // mesh.tensor, table.shape[1] // mesh.fsdp)


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_takes_a_step(path: Path) -> None:
    config = tiny(configs.read_file(path))
    placement = pretrained.make_placement(config, vocabulary())
    state = placement.init(jax.random.key(0))
    rows = config.data.batch_size
    batch = {
        "tokens": np.random.default_rng(0)
        .integers(5, VOCAB_SIZE, (rows, LENGTH))
        .astype(np.uint16),
        "lengths": np.full(rows, LENGTH, np.int32),
        "index": np.arange(rows, dtype=np.int32),
    }
    state, sums = placement.train_step(state, placement.put_batch(batch), np.float32(0.5))
    assert int(state.step) == 1
    chance = np.log(VOCAB_SIZE)
    if isinstance(config.task, ReplacedToken):
        chance += config.task.detection_weight * np.log(2)
    if isinstance(config.task, SpanCorruption):
        chance += 0.5  # logits have a variance of 1 to begin with
    assert sums.means()["loss"] == pytest.approx(chance, rel=0.1)
    assert not sums.counts["skipped"]


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), pytest.param(MeshConfig(fsdp=2, tensor=4), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_fine_tuning_takes_a_step(path: Path, mesh: MeshConfig) -> None:
    config = replace(configs.read_file(path), mesh=mesh)
    sizes = {"vocab_size": VOCAB_SIZE, "dtype": "float32"}
    if config.base is None:
        few = {"embed_dim": 16, "hidden_dim": 32, "num_layers": 1, "mlp_dim": 32}
        model = resized(config.model, **few, **sizes)
    else:  # of a base there is here nothing but its kind
        small = {"num_layers": 2, "hidden_dim": 128, "num_heads": 4, "mlp_dim": 32}
        generates = isinstance(config.task, Instruction)
        model = resized(Gpt2Config() if generates else TINY, **small, **sizes)
    config = finetuned.with_encoder(config, model, "cpu")
    config = replace(config, train=config.train.with_epochs(lambda epochs: 100))
    labels = ("a", "b", "c", "d")
    placement = finetuned.make_placement(config, labels, finetuned.make_init(config, labels))
    rows, length = config.data.batch_size, 8
    rng = np.random.default_rng(0)
    shape = (rows, length) if isinstance(config.task, Tagging | Instruction) else (rows,)
    batch = {
        "tokens": rng.integers(5, VOCAB_SIZE, (rows, length)).astype(np.int32),
        "token_type_ids": np.zeros((rows, length), np.int32),
        "lengths": np.full(rows, length, np.int32),
        "labels": rng.integers(0, len(labels), shape).astype(np.int32),
        "weights": np.ones(shape, np.float32),
        "dialogues": np.ones((rows, length), np.int32),
        "index": np.arange(rows, dtype=np.int32),
    }
    if isinstance(config.task, Seq2Seq):  # two sides, and no labels
        sides = {name: batch["tokens"] for name in ("targets", "decoder_tokens")}
        batch |= sides | {"target_lengths": batch["lengths"]}
        batch = {name: batch[name] for name in config.task.abstract_batch(1, 1, 0)}
    state = placement.init(jax.random.key(config.train.seed))
    state, sums = placement.train_step(state, placement.put_batch(batch), np.float32(0.5))
    assert int(state.step) == 1
    choices = VOCAB_SIZE if isinstance(config.task, Instruction | Seq2Seq) else len(labels)
    assert sums.means()["loss"] == pytest.approx(np.log(choices), rel=0.3)
    assert not sums.counts["skipped"]
