"""Speed of encoding short texts against transformers: from text to vector, on this machine.

    pip install "jaxlm[bench]"
    python scripts/benchmark_encode.py
    python scripts/benchmark_encode.py --folder FOLDER --texts texts.txt

Without a folder, a ModernBERT of BERT-mini's size with random weights, and without texts,
docstrings of Python. Both sort the texts by length and take the same batches of them; transformers
pads to the longest of a batch and takes the mean over its tokens, as its documentation shows. Each
does its own tokenizing, and the lowest cosine says that both give the same vectors.
"""
# pyright: reportMissingImports=false

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from benchmark_protocol import wait_until_quiet
from jaxtyping import Float32
from rich.console import Console
from rich.table import Table

from jaxlm.convert import huggingface
from jaxlm.data import files
from jaxlm.data.pydocs import PyDocs
from jaxlm.data.tokenizer_training import train
from jaxlm.models import modernbert
from jaxlm.runs.embedder import open_embedder

Encode = Callable[[], Float32[np.ndarray, "texts embed"]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    folder: Path | None = None
    """An encoder in Hugging Face's layout that takes the mean over tokens."""
    texts: Path | None = None
    """A file with a text on each line."""
    count: int = 4096
    """So many of the texts, the first ones."""
    most_words: int = 60
    """Longer texts are left out."""
    batch_size: int = 32
    rounds: int = 7
    """How often all are measured, one after the other."""


def main(options: Options) -> None:
    console = Console()
    texts = read_texts(options)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or random_model(Path(scratch) / "model", texts)
        ways = {"HF as shipped": with_transformers(folder, texts, options.batch_size)}
        embed = open_embedder(str(folder), batch_size=options.batch_size)
        ways["jaxlm"] = lambda: embed(texts)
        theirs, ours = (encode() for encode in ways.values())  # compiled, and warm
        for _ in range(options.rounds):
            for name, encode in ways.items():
                wait_until_quiet(10)
                start = time.perf_counter()
                encode()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    table = Table("float32", "texts/s", "× HF as shipped")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(seconds["HF as shipped"], found, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(name, f"{len(texts) / statistics.median(found):,.0f}", spread)
    console.print(table)
    words = statistics.mean(len(text.split()) for text in texts)
    print(
        f"{len(texts):,} texts of {words:.0f} words "
        f"in batches of {options.batch_size}; lowest cosine {cosines(ours, theirs).min():.7f}; "
        f"medians of {options.rounds} rounds; {len(os.sched_getaffinity(0))} cores"
    )


def cosines(
    one: Float32[np.ndarray, "texts embed"], other: Float32[np.ndarray, "texts embed"]
) -> Float32[np.ndarray, " texts"]:
    """Of each text's two vectors."""
    length = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(1) / length


def read_texts(options: Options) -> list[str]:
    """Short ones, in the order of their source."""
    if options.texts is None:
        found: Iterator[str] = PyDocs().documents()
    else:
        found = files.lines(options.texts)
    short = (text for text in found if 0 < len(text.split()) <= options.most_words)
    return list(itertools.islice(short, options.count))


def random_model(folder: Path, texts: Sequence[str]) -> Path:
    """A ModernBERT of BERT-mini's size with a tokenizer of the texts."""
    tokenizer = train("wordpiece", texts, 4096)
    config = replace(modernbert.MINI, vocab_size=tokenizer.get_vocab_size())
    model, tokens = config.make(), jnp.zeros((1, 8), jnp.int32)
    encoder = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    huggingface.save(folder, {"encoder": encoder}, config, tokenizer)
    return folder


def with_transformers(folder: Path, texts: Sequence[str], batch_size: int) -> Encode:
    """``AutoModel`` in batches of texts by length, the longest first."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def encode() -> Float32[np.ndarray, "texts embed"]:
        rows = tokenizer(list(texts), truncation=True)["input_ids"]
        order = np.argsort([-len(row) for row in rows], kind="stable")
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                which = order[start : start + batch_size]
                batch = tokenizer.pad({"input_ids": [rows[i] for i in which]}, return_tensors="pt")
                hidden = model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                vectors[which] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return vectors

    return encode


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
