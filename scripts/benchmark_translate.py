"""Speed of beam search against transformers: a Transformer-base with random weights.

    pip install "jaxlm[bench]"
    python scripts/benchmark_translate.py

Sources of 24 random tokens get targets of 32, by beam search and greedily. transformers'
``generate`` is as it is shipped, with a Marian of the same shape; its weights are others, and no
text ends early. The roof is CTranslate2 with that Marian, where it is installed
(``pip install ctranslate2``).
"""
# pyright: reportMissingImports=false

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from benchmark_protocol import wait_until_quiet
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

from jaxlm.decode.beam import BeamConfig, BeamSearch
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.transformer import TransformerConfig
from jaxlm.tasks.seq2seq import encoder_decoder

Sources = list[list[int]]
Write = Callable[[Sources], int]  # gives the number of new tokens
SPECIAL = "[PAD]", "[CLS]", "[SEP]", "[UNK]"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    rows: int = 8
    beams: int = 4
    vocab_size: int = 32_000
    num_layers: int = 6
    """Blocks of the encoder, and of the decoder."""
    hidden_dim: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    source_length: int = 24
    new_tokens: int = 32
    rounds: int = 3
    """How often all are measured, one after the other."""
    transformers: bool = True
    ctranslate2: bool = True
    """Measure it where it is installed."""


def main(options: Options) -> None:
    console = Console()
    rng = np.random.default_rng(0)
    shape = options.rows, options.source_length
    sources = rng.integers(10, options.vocab_size, shape).tolist()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = dict(with_jaxlm(options))
        if options.transformers:
            marian = save_marian(options, Path(folder))
            ways |= dict(with_transformers(options, marian))
            if options.ctranslate2:
                ways |= dict(with_ctranslate2(options, Path(folder)))
        for name, write in ways.items():
            if (count := write(sources)) != options.rows * options.new_tokens:
                raise SystemExit(f"{name} writes {count} tokens")
            console.print(f"{name}: ready", highlight=False)
        for _ in range(options.rounds):
            wait_until_quiet(20)
            for name, write in ways.items():
                start = time.perf_counter()
                write(sources)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    table = Table("", "seconds", "tokens/s", "against jaxlm's beams")
    ours = seconds["jaxlm, beams"]
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, ours, strict=True)]
        speed = options.rows * options.new_tokens / statistics.median(found)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(
            name, f"{statistics.median(found):.2f}", f"{speed:.0f}", f"{spread} × as long"
        )
    console.print(table)
    print(
        f"{options.rows} sources of {options.source_length} tokens, {options.new_tokens} new ones, "
        f"{options.beams} beams, float32 unless named; medians of {options.rounds} rounds; "
        f"{len(os.sched_getaffinity(0))} cores"
    )


def with_jaxlm(options: Options) -> Iterator[tuple[str, Write]]:
    """Ours, by beams and greedily."""
    config = TransformerConfig(
        vocab_size=options.vocab_size,
        num_layers=options.num_layers,
        hidden_dim=options.hidden_dim,
        num_heads=options.num_heads,
        mlp_dim=options.mlp_dim,
    )
    model = EncoderDecoderLm(config.make(), config.make_lm_head())
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, tokens)
    causal = encoder_decoder(model, config, variables, make_tokenizer(options))
    size: Any = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}
    beams, greedy = BeamSearch(causal), Generate(causal)
    config = BeamConfig(size=options.beams, **size)
    told = GenerateConfig(**size)
    count = lambda written: sum(len(one.tokens) for one in written)
    yield "jaxlm, beams", lambda sources: count(beams(sources, config))
    yield "jaxlm, greedy", lambda sources: count(greedy(sources, told))


def token_names(options: Options) -> list[str]:
    """In the order of their ids."""
    return [*SPECIAL, *(f"t{i}" for i in range(len(SPECIAL), options.vocab_size))]


def make_tokenizer(options: Options) -> Tokenizer:
    """Of words that are numbers."""
    names = {name: i for i, name in enumerate(token_names(options))}
    return Tokenizer(models.WordLevel(names, "[UNK]"))


def save_marian(options: Options, folder: Path) -> Any:
    """A Marian of transformers with random weights, and its folder."""
    import torch  # here, so that --help needs nothing but jaxlm
    import transformers

    torch.manual_seed(0)
    model = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=options.vocab_size,
            encoder_layers=options.num_layers,
            decoder_layers=options.num_layers,
            d_model=options.hidden_dim,
            encoder_attention_heads=options.num_heads,
            decoder_attention_heads=options.num_heads,
            encoder_ffn_dim=options.mlp_dim,
            decoder_ffn_dim=options.mlp_dim,
            activation_function="swish",
            scale_embedding=True,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
        )
    ).eval()
    model.save_pretrained(folder)
    return model


def with_transformers(options: Options, model: Any) -> Iterator[tuple[str, Write]]:
    """``generate`` as it is shipped."""
    import torch

    def way(num_beams: int) -> Write:
        def write(sources: Sources) -> int:
            tokens = torch.tensor(sources)
            with torch.no_grad():
                found = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    num_beams=num_beams,
                    max_new_tokens=options.new_tokens,
                    min_new_tokens=options.new_tokens,
                    do_sample=False,
                )
            return found[:, 1:].numel()

        return write

    yield "transformers, beams", way(options.beams)
    yield "transformers, greedy", way(1)


def with_ctranslate2(options: Options, folder: Path) -> Iterator[tuple[str, Write]]:
    """CTranslate2 with the same Marian, if it is installed."""
    try:
        import ctranslate2
        from ctranslate2.converters import transformers as conversion
    except ModuleNotFoundError:
        return
    import transformers

    class Named(conversion.MarianMTLoader):
        """Names tokens itself: Marian's tokenizer would need files of sentencepiece."""

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            config.eos_token = config.decoder_start_token = "[SEP]"
            config.unk_token = "[UNK]"

        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            return token_names(options)[:-1]  # the last row is taken for padding, and cut

    model = transformers.MarianMTModel.from_pretrained(folder).eval()
    spec = Named()(model, None)
    spec.validate()
    spec.save(str(folder))
    size: Any = {
        "min_decoding_length": options.new_tokens,
        "max_decoding_length": options.new_tokens,
    }
    names = token_names(options)

    def way(kind: str) -> Write:
        threads = len(os.sched_getaffinity(0))
        there = ctranslate2.Translator(str(folder), compute_type=kind, intra_threads=threads)

        def write(sources: Sources) -> int:
            words = [[names[i] for i in source] for source in sources]
            found = there.translate_batch(words, beam_size=options.beams, **size)
            return sum(len(one.hypotheses[0]) for one in found)

        return write

    yield "CTranslate2, beams", way("float32")
    yield "CTranslate2 in int8, beams", way("int8")


if __name__ == "__main__":
    options = tyro.cli(Options)
    try:
        main(options)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: {error.name} is not installed: pip install -e '.[bench]'"
        ) from None
