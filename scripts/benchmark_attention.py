"""Speed of attention, plainly and block by block: ``python scripts/benchmark_attention.py``."""

import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from jaxlm.nn.choose import named
from jaxlm.nn.masks import Visible, visible

MASKS = {"all": visible(), "causal": visible(after=0), "window": visible(before=64, after=64)}


def main(
    lengths: tuple[int, ...] = (128, 512, 1024, 2048),
    tokens: int = 4096,
    num_heads: int = 12,
    head_dim: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 4,
) -> None:
    """Milliseconds, the least of some rounds; a window is 64 positions to either side.

    Args:
        lengths: Positions of a row.
        tokens: Positions of all rows.
        num_heads: Heads of queries, and of keys.
        head_dim: Channels of a head.
        dtype: That of queries, keys and values.
        rounds: How often each is timed.
    """
    table = Table("rows", *(f"{mask}, {way}" for mask in MASKS for way in ("plain", "blockwise")))
    for length in lengths:
        shape = max(tokens // length, 1), length, num_heads, head_dim
        each = [
            milliseconds(named(way), shape, mask, dtype, rounds)
            for mask in MASKS.values()
            for way in ("plain", "blockwise")
        ]
        table.add_row(str(length), *(f"{value:.0f}" for value in each))
    Console().print(table)


def milliseconds(
    attend: Callable[..., jax.Array],
    shape: tuple[int, ...],
    mask: Visible,
    dtype: str,
    rounds: int,
) -> float:
    """Of a value and its gradient by queries, keys and values."""
    operands = [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(4)]

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, weights: jax.Array) -> object:
        def total(*x: jax.Array) -> jax.Array:
            return jnp.sum((attend(*x, mask=mask) * weights).astype(jnp.float32))

        return jax.value_and_grad(total, (0, 1, 2))(query, key, value)

    jax.block_until_ready(run(*operands))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run(*operands))
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


if __name__ == "__main__":
    tyro.cli(main)
