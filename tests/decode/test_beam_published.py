"""Beam search against transformers, with its weights: the same texts, and the same scores."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_decoders import CHARACTERS, characters

from jaxlm.convert import huggingface
from jaxlm.decode.beam import BeamConfig, BeamSearch
from jaxlm.models.heads import EncoderDecoderLm, WithLmHead
from jaxlm.tasks.causal_lm import causal_model
from jaxlm.tasks.seq2seq import encoder_decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["abc", "hello no", "feed me a fig", "deep"]
END, START = len(CHARACTERS), len(CHARACTERS) + 1
IDS = {"eos_token_id": END, "pad_token_id": START, "bos_token_id": START}


def gpt2():
    sizes = {"vocab_size": START + 1, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, **IDS, initializer_range=0.6)
    return transformers.GPT2LMHeadModel(config), WithLmHead, causal_model


def t5():
    sizes = {"vocab_size": START + 1, "num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 24}
    config = transformers.T5Config(
        **sizes, **IDS, num_heads=2, decoder_start_token_id=START, initializer_factor=2.0
    )
    return transformers.T5ForConditionalGeneration(config), EncoderDecoderLm, encoder_decoder


@pytest.fixture(scope="module", params=[gpt2, t5], ids=["gpt2", "t5"])
def both(request, tmp_path_factory):
    """A model of theirs, and a search with the same weights."""
    torch.manual_seed(1)
    theirs, join, make = request.param()
    theirs.eval()
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    tokenizer = characters(("</s>", "<s>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    published = huggingface.load(folder)
    params = published.params | ({"head": published.lm_head} if published.lm_head else {})
    params = jax.tree.map(jnp.asarray, params)
    module = join(published.config.make(), published.config.make_lm_head())
    model = make(module, published.config, {"params": params}, tokenizer)
    start = () if model.read is None else (START,)
    return theirs, BeamSearch(dataclasses.replace(model, start=start, end=(END,), batch_size=64))


CASES = {
    "plain": ({}, {}),
    "heuristic": ({"early_stopping": "heuristic"}, {"early_stopping": False}),
    "first": ({"early_stopping": "first"}, {"early_stopping": True}),
    "long": ({"alpha": 2.0}, {"length_penalty": 2.0}),
    "short": ({"alpha": -1.0}, {"length_penalty": -1.0}),
    "rules": (
        {"no_repeat_ngram": 2, "min_new_tokens": 5, "stop_tokens": ("e",)},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": [END, 4]},
    ),
    "prefix": ({"prefix": "ab", "max_new_tokens": 16}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(both, case):
    theirs, search = both
    own, told = CASES[case]
    prefix = own.get("prefix", "")
    config = BeamConfig(**{"size": 4, "n_best": 4, "max_new_tokens": 14} | own)
    compared = 0
    for text, best in zip(TEXTS, search(TEXTS, config), strict=True):
        model = search._model
        begun = model.encode(prefix) if prefix else []
        given = {"input_ids": model.encode(text)}
        if model.read is None:
            given["input_ids"] += begun
        else:
            given["decoder_input_ids"] = [START, *begun]
        options = {"early_stopping": "never", "num_beams": 4, "max_new_tokens": 14} | told
        found = theirs.generate(
            **{name: torch.tensor([ids]) for name, ids in given.items()},
            **options,
            num_return_sequences=4,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        skipped = len(given.get("decoder_input_ids", given["input_ids"]))
        stops = {END, 4} if case == "rules" else {END}
        for one, ids, score in zip(
            (best, *best.others), found.sequences, found.sequences_scores, strict=True
        ):
            wanted = ids[skipped:].tolist()
            ends = [i for i, token in enumerate(wanted) if token in stops]
            assert one.tokens == begun + wanted[: ends[0] + 1 if ends else None]
            assert one.score == pytest.approx(float(score), rel=1e-4, abs=1e-4)
            compared += len(one.tokens)
    assert compared > 16
