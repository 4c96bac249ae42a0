"""Frozen layers as arrays of their own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import BERT

from jaxlm import sharding, tree
from jaxlm.models.heads import ClassificationHead, WithHead
from jaxlm.models.model import example_inputs
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.peft import tuning
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import BitFit, FrozenDtype

LORA = LoraConfig(rank=2)
ENCODER = replace(BERT, vocab_size=16, num_layers=4, hidden_dim=32, mlp_dim=128)
MODEL = WithHead(ENCODER.make(), ClassificationHead(2))
TOKENS = jnp.arange(8)[None]


def compiled(split_layers: bool, dtype: FrozenDtype):
    """The gradients of a LoRA step, and the frozen leaves they were compiled for."""
    params = MODEL.init(jax.random.key(0), TOKENS)["params"]
    call = lambda variables: MODEL.apply(variables, TOKENS)
    trainable, frozen = tuning.prepare(
        LORA, jax.random.key(1), params, call, dtype, split_layers=split_layers
    )
    apply = tuning.adapt(LORA, MODEL.apply)

    def loss(trainable, frozen):
        return jnp.sum(apply(tree.combine(trainable, frozen), TOKENS) ** 2)

    step = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
    return step, step(trainable, frozen), frozen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_split_layers_are_not_copied(dtype):
    stacked, expected, whole = compiled(False, dtype)
    apart, gradients, frozen = compiled(True, dtype)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradients, expected)
    assert tree.num_bytes(frozen) == tree.num_bytes(whole)
    if dtype == "float32":  # int8 is dequantized, and that is kept for the gradient
        layers = tree.num_bytes(frozen["params"]["encoder"]["layers"])
        temporary = [step.memory_analysis().temp_size_in_bytes for step in (apart, stacked)]
        assert temporary[0] < temporary[1] - 0.8 * layers


@pytest.mark.slow
def test_split_layers_have_the_shardings_of_their_stack():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    _, _, frozen = compiled(True, "int8")
    found = dict(tree.leaves_with_path(sharding.tree_shardings(frozen, mesh)))
    prefix = "params/encoder/layers/mlp/up/kernel/layers/3"
    assert found[f"{prefix}/values"].spec == P("fsdp", "tensor")
    assert found[f"{prefix}/scale"].spec == P("tensor")


def test_the_table_of_sizes():
    ones = lambda *shape: jnp.ones(shape, jnp.float32)
    lines = tuning.table({"lora": {"a": ones(10, 10)}}, {"params": {"w": ones(300, 3)}}, 2)
    assert [" ".join(line.split()) for line in lines.splitlines()] == [
        "parameters trainable weights gradients moments in all",
        "this tuning 1,000 100 (10.00%) 0.0 MB 0.0 MB 0.0 MB 0.0 MB",
        "full tuning 1,000 1,000 (100.00%) 0.0 MB 0.0 MB 0.0 MB 0.0 MB",
    ]
    assert len({len(line) for line in lines.splitlines()}) == 1


def test_what_rounding_would_lose_of_what_was_merged():
    base = {"kernel": jnp.full((4, 4), 1.0, jnp.bfloat16), "bias": jnp.full(4, 1 / 3)}
    assert tuning.lost_in_bfloat16(base, base) == 0
    # 2^-9 above 1 is rounded away; 2^-7 is a number of bfloat16.
    for more, lost in ((2**-9, 1.0), (2**-7, 0.0)):
        merged = base | {"kernel": base["kernel"].astype(jnp.float32) + more}
        assert tuning.lost_in_bfloat16(base, merged) == lost


@pytest.mark.parametrize(
    ("bias", "learned"),
    [
        ("none", []),
        ("lora_only", ["attention/query/bias", "attention/value/bias"]),
        (
            "all",
            ["attention/key/bias", "attention/query/bias", "attention/value/bias", "norm/bias"],
        ),
    ],
)
def test_biases_that_learn_beside_adapters(bias, learned):
    names = ("attention/query", "attention/key", "attention/value", "norm")
    paths = [f"{name}/{leaf}" for name in names for leaf in ("kernel", "bias", "scale")]
    config = LoraConfig(bias=bias)
    found = [p for p in paths if tuning.learns(config, f"params/encoder/layers/{p}")]
    assert sorted(found) == learned
    assert tuning.learns(config, "params/head/classifier/kernel")


SIZES = {"vocab_size": 32, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24}
OF_QUERIES = {f"{name}_bias" for name in ("content", "position", "segment")}


@pytest.mark.parametrize(
    ("config", "expected"),
    [(XlnetConfig(**SIZES), {"bias"} | OF_QUERIES), (T5Config(**SIZES, head_dim=8), set())],
    ids=["xlnet", "t5"],
)
def test_all_biases_learn_but_tables(config, expected):
    model, inputs = config.make(), example_inputs(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    paths = [f"params/encoder/{path}" for path, _ in tree.leaves_with_path(shapes)]
    for tuning_ in (BitFit(), LoraConfig(bias="all")):
        found = {path for path in paths if tuning.learns(tuning_, path)}
        assert {path.rpartition("/")[2] for path in found} == expected
        assert found == {path for path in paths if path.endswith("bias")}
    beside = LoraConfig(targets=(r"attention/\w+",), bias="lora_only")
    found = {path for path in paths if tuning.learns(beside, path)}
    assert not found  # they are beside no map
    tables = {path for path in paths if "_bias/" in path}
    assert len(tables) == (2 if isinstance(config, T5Config) else 0)  # the control
