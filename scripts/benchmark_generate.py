"""Speed of generation against transformers, in turns, in one process: GPT-2 with random weights.

    pip install "jaxlm[bench]"
    python scripts/benchmark_generate.py

Prompts of 32 random tokens are continued greedily by 128. transformers' ``generate`` is as it is
shipped, and with its static cache, compiled. int8 is jaxlm's own: there transformers computes in
float32. The roof is what it takes to read all weights once for each token at the bandwidth with
which this machine sums an array. Both libraries get the same weights, and must write the same
tokens in float32.
"""
# pyright: reportMissingImports=false

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from benchmark_protocol import wait_until_quiet
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

from jaxlm import tree
from jaxlm.convert import huggingface
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.models.heads import WithLmHead
from jaxlm.nn.intercept import find_sites
from jaxlm.peft.quantize import quantize
from jaxlm.tasks.causal_lm import causal_model

END = "<|endoftext|>"
Write = Callable[[Sequence[Sequence[int]]], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    dtypes: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("float32", "bfloat16", "int8")
    batch_sizes: tuple[int, ...] = (1, 8)
    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    prompt_length: int = 32
    new_tokens: int = 128
    rounds: int = 3
    """How often all are measured, one after the other."""
    static: bool = True
    """Measure transformers with its static cache, too, which it compiles for a minute or more."""


def main(options: Options) -> None:
    console = Console()
    console.width = max(console.width, 110)  # a table that is cut says nothing
    table = Table("dtype", "rows", "transformers", "static cache", "jaxlm", "ratio", "to static")
    table.add_column("share of the roof")
    table.add_column("compile")
    reading = bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        model = save(options, Path(folder))
        for dtype in options.dtypes:
            for rows in options.batch_sizes:
                table.add_row(*compare(options, model, Path(folder), dtype, rows, reading))
                console.print(f"{dtype}, {rows} rows: measured", highlight=False)
    console.print(table)
    print(
        f"tokens a second, medians of {options.rounds} rounds; "
        f"reading: {reading / 1e9:.0f} GB/s; {len(os.sched_getaffinity(0))} cores"
    )


def save(options: Options, folder: Path) -> Any:
    """A model of transformers with random weights, and its folder with a tokenizer."""
    import torch  # here, so that --help needs nothing but jaxlm
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=options.num_layers, n_embd=options.hidden_dim, n_head=options.num_heads
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    names = [f"t{i}" for i in range(config.vocab_size - 1)] + [END]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, END))
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def compare(
    options: Options, model: Any, folder: Path, dtype: str, rows: int, reading: float
) -> list[str]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 50_000, (rows, options.prompt_length)).tolist()
    theirs = with_transformers(options, model, dtype, {})
    ours, size = with_jaxlm(options, folder, dtype)
    start = time.perf_counter()
    first = ours(prompts)
    compiling = time.perf_counter() - start
    if dtype == "float32" and first != theirs(prompts):
        raise SystemExit("the two libraries do not write the same tokens")
    theirs(prompts)
    speeds: dict[Write, list[float]] = {theirs: [], ours: []}
    if options.static and dtype != "int8":
        static = with_transformers(options, model, dtype, {"cache_implementation": "static"})
        static(prompts)
        speeds[static] = []
    for _ in range(options.rounds):
        for write, found in speeds.items():
            wait_until_quiet(20)
            start = time.perf_counter()
            write(prompts)
            found.append(rows * options.new_tokens / (time.perf_counter() - start))
    there, here, *others = (statistics.median(found) for found in speeds.values())
    ratios = [b / a for a, b, *_ in zip(*speeds.values(), strict=True)]
    roof = rows * reading / size
    return [
        dtype,
        str(rows),
        f"{there:.1f}",
        *([f"{other:.1f}" for other in others] or ["-"]),
        f"{here:.1f}",
        f"{here / there:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        *([f"{here / other:.2f}" for other in others] or ["-"]),
        f"{here / roof:.0%}",
        f"{compiling - rows * options.new_tokens / here:.1f} s",
    ]


def with_transformers(options: Options, model: Any, dtype: str, how: dict[str, str]) -> Write:
    """``generate`` as it is shipped, or with other arguments."""
    import torch

    # The given one is read again in the next dtype, whose weights are not to be rounded before.
    model = copy.deepcopy(model).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)

    def write(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        with torch.no_grad():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens,
                do_sample=False,
                pad_token_id=0,
                **how,
            )
        return found[:, options.prompt_length :].tolist()

    return write


def with_jaxlm(options: Options, folder: Path, dtype: str) -> tuple[Write, int]:
    """Our generation, and the bytes of the weights that a token needs."""
    published = huggingface.load(folder)
    kept = jnp.dtype("float32" if dtype == "int8" else dtype)
    config = published.config.__class__(**{**vars(published.config), "dtype": kept.name})
    model = WithLmHead(config.make(), config.make_lm_head())
    params = {"encoder": published.params["encoder"], "head": published.lm_head or {}}
    params = jax.tree.map(lambda x: jnp.asarray(x, kept), params)
    if dtype == "int8":
        call = lambda variables: model.apply(variables, jnp.zeros((1, 8), jnp.int32))
        params = quantize(params, find_sites(call, {"params": params}))
    size = tree.num_bytes(params)
    generate = Generate(causal_model(model, config, {"params": params}, published.tokenizer))
    greedy = GenerateConfig(max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens)

    def write(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [one.tokens for one in generate(prompts, greedy, batch_size=len(prompts))]

    return write, size


def bandwidth() -> float:
    """Bytes a second with which an array is read."""
    array = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds)


if __name__ == "__main__":
    options = tyro.cli(Options)
    try:
        main(options)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: {error.name} is not installed: pip install -e '.[bench]'"
        ) from None
