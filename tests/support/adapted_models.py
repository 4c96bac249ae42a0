"""Models that adapters are tested on: our BERT, Flax's attention, and a plain MLP-Mixer."""

import re
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny_models

from jaxlm import tree
from jaxlm.models.heads import MlmHead, WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.nn.intercept import find_sites
from jaxlm.peft.lora import LoraConfig, adapt, init, init_at

BERT = replace(tiny_models.BERT, initializer_std=0.2)
LLAMA = LlamaConfig(
    vocab_size=32,
    num_layers=2,
    hidden_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
    max_length=8,
    unroll=1,
)


class AttentionBlocks(nn.Module):
    """Flax's own attention: DenseGeneral over one axis, and over two."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            x = x + y
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        return x


class Mixer(nn.Module):
    """An MLP-Mixer over tokens: submodules under setup, one applied twice, a tied table."""

    def setup(self):
        self.table = nn.Embed(32, 12)
        self.tokens = nn.DenseGeneral(8, axis=1)
        self.channels = nn.Dense(12, use_bias=False)
        self.fold = nn.DenseGeneral((3, 4), axis=(1, -1))

    def __call__(self, ids):
        x = self.table(ids)
        for _ in range(2):
            x = x + jnp.swapaxes(nn.tanh(self.tokens(x)), 1, 2)
            x = x + nn.tanh(self.channels(x))
        return self.table.attend(x) + self.fold(x).sum((1, 2))[:, None, None]


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 8)), jnp.int32)
FLOATS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 16)), jnp.float32)
LINEAR = r".*/kernel"
EVERYTHING = (LINEAR, r"(token_embed|table)/embedding")


class Case(NamedTuple):
    module: nn.Module
    inputs: jax.Array
    targets: tuple[str, ...]

    rounding: float = 2**-24  # half the distance of the numbers next to 1 in the dtype computed in

    @property
    def apply(self):
        return self.module.apply


CASES = {
    "bert": Case(
        WithLmHead(replace(BERT, unroll=1, remat="full").make(), MlmHead()), IDS, EVERYTHING
    ),
    "bert without a loop": Case(WithLmHead(BERT.make(), MlmHead()), IDS, EVERYTHING),
    "bert in bfloat16": Case(
        WithLmHead(
            replace(BERT, unroll=1, dtype="bfloat16").make(), MlmHead(dtype=jnp.dtype("bfloat16"))
        ),
        IDS,
        EVERYTHING,
        2**-8,
    ),
    "llama": Case(WithLmHead(LLAMA.make(), LLAMA.make_lm_head()), IDS, EVERYTHING),
    "attention": Case(AttentionBlocks(), FLOATS, (LINEAR,)),
    "mixer": Case(Mixer(), IDS, EVERYTHING),
}
# Values come from numpy: jax.random would compile a program for each shape, and take longer than
# the tests.


def filled(shapes, seed, zero=r"$^"):
    """Values like those of a trained model, 0 where the path ends in ``zero``."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        x = rng.normal(size=leaf.shape) * 0.2
        if path.endswith(("scale", "magnitude")):
            x += 1
        return jnp.asarray(0 * x if re.search(zero, path) else x, jnp.float32)

    return tree.map_with_path(one, shapes)


@cache
def params_of(name):
    case = CASES[name]
    return filled(jax.eval_shape(case.module.init, jax.random.key(0), case.inputs)["params"], 0)


@cache
def sites_of(name):
    case = CASES[name]
    return find_sites(lambda v: case.apply(v, case.inputs), {"params": params_of(name)})


def config_of(name, **changes):
    return LoraConfig(**({"targets": CASES[name].targets, "rank": 3, "alpha": 6.0} | changes))


def new_adapter(name, config):
    make = partial(init_at, params=params_of(name), sites=sites_of(name), config=config)
    return jax.jit(make)(jax.random.key(1))


def adapter_of(name, config, seed=7, zero=r"$^"):
    make = partial(init_at, params=params_of(name), sites=sites_of(name), config=config)
    return filled(jax.eval_shape(make, jax.random.key(0)), seed, zero)


@partial(jax.jit, static_argnames=("name", "config"))
def outputs(name, params, adapter=None, config=None, **kwargs):
    case = CASES[name]
    if adapter is None:
        return case.apply({"params": params}, case.inputs)
    return adapt(case.apply, config)({"params": params, "lora": adapter}, case.inputs, **kwargs)


def assert_close(a, b, atol):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


def made(module, x, **changes):
    """Parameters and an adapter, of all kernels if ``changes`` name no other targets."""
    variables = module.init(jax.random.key(0), x)
    config = LoraConfig(**({"targets": (r"(.*/)?kernel",), "rank": 2} | changes))
    call = lambda variables: module.apply(variables, x)
    return variables["params"], init(jax.random.key(0), variables, config, call), config
