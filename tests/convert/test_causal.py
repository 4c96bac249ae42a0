"""GPT-2 and Llama against transformers: numbers, files, there and back."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from jaxlm.convert import huggingface
from jaxlm.models.heads import WithLmHead
from jaxlm.tree import leaves_with_path

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("gpt2", "gpt2_flags", "llama", "llama_flags")
VOCAB = {"<|endoftext|>": 0} | {character: i for i, character in enumerate("abcdefghijkl", 1)}


@cache
def golden(kind):
    """The ``config.json`` of a model of ``transformers``, its tensors, inputs and outputs."""
    path = GOLDEN / f"causal_{kind}.safetensors"
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()["config"])
    arrays = load_file(path)
    weights = {n.removeprefix("weights/"): x for n, x in arrays.items() if n.startswith("weights/")}
    return config, weights, arrays


def write(path, config, weights):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, path / "model.safetensors")
    Tokenizer(models.BPE(VOCAB, [])).save(str(path / "tokenizer.json"))
    return path


def load(path, kind, config=None, weights=None):
    """The golden model, with some other keys and tensors."""
    raw, tensors, _ = golden(kind)
    tensors = {n: x for n, x in (tensors | (weights or {})).items() if x is not None}
    return huggingface.load(write(path / "model", raw | (config or {}), tensors))


def params_of(published):
    head = {"head": published.lm_head} if published.lm_head else {}
    return jax.tree.map(jnp.asarray, published.params | head)


@partial(jax.jit, static_argnums=0)
def run(config, params, tokens, positions, segment_ids):
    """Logits, and the gradient of the sum of their sines over the real positions."""
    model = WithLmHead(config.make(), config.make_lm_head())

    def total(params):
        logits = model.apply(
            {"params": params}, tokens, positions=positions, segment_ids=segment_ids
        )
        return jnp.where(segment_ids[..., None] >= 0, jnp.sin(logits), 0).sum(), logits

    gradients, logits = jax.grad(total, has_aux=True)(params)
    return logits, gradients


def outputs(published, kind, side):
    _, _, arrays = golden(kind)
    names = ("tokens", f"positions/{side}", f"real/{side}")
    tokens, positions, real = (np.int32(arrays[name]) for name in names)
    return run(published.config, params_of(published), tokens, positions, real - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, tmp_path):
    published = load(tmp_path, kind)
    _, weights, arrays = golden(kind)
    for side in ("left", "right"):
        real = arrays[f"real/{side}"]
        logits, gradients = outputs(published, kind, side)
        theirs = arrays[f"logits/{side}"][real]
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(np.asarray(logits)[real], theirs, rtol=0, atol=1e-5)
    if kind == "gpt2_flags":  # their scores are scaled, and our query: d_head^½ over the layer
        scale = np.array([2.0, 1.0], np.float32)
        query = gradients["encoder"]["layers"]["attention"]["query"]
        query["kernel"] *= scale[:, None, None, None]
        query["bias"] *= scale[:, None, None]
    gradients = huggingface.to_huggingface(gradients, published.config)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        theirs = arrays[f"gradients/{name}"]
        assert np.abs(theirs).max() > 1e-2 or "k_proj.bias" in name  # softmax takes that away
        scale = max(1, np.abs(theirs).max())
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_the_models_and_goes_back(kind, tmp_path):
    published = load(tmp_path, kind)
    model = WithLmHead(published.config.make(), published.config.make_lm_head())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    ours = params_of(published)
    assert [(path, leaf.shape) for path, leaf in leaves_with_path(ours)] == [
        (path, leaf.shape) for path, leaf in leaves_with_path(shapes)
    ]
    saved = tmp_path / "saved"
    huggingface.save(saved, ours, published.config, published.tokenizer)
    again = huggingface.load(saved)
    assert again.config == published.config
    jax.tree.map(np.testing.assert_array_equal, params_of(again), ours)
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == golden(kind)[1].keys()
    if kind != "gpt2_flags":  # whose query has been scaled
        jax.tree.map(np.testing.assert_array_equal, tensors, golden(kind)[1])
    assert json.loads((saved / "config.json").read_text())["eos_token_id"] == 0
