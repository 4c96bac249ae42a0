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

from jaxlm import sharding
from jaxlm.convert import folder, huggingface, table
from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.models.heads import WithLmHead
from jaxlm.nn.positions import LinearScaling
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


def test_rows_that_are_no_tokens_are_neither_predicted_nor_written(tmp_path):
    published = load(tmp_path, "llama_flags")
    params = params_of(published)
    table, kernel = params["encoder"]["token_embed"], params["head"]["unembed"]
    table["embedding"] = jnp.pad(table["embedding"], ((0, 8), (0, 0)))
    kernel["kernel"] = jnp.pad(kernel["kernel"], ((0, 0), (0, 8)))
    config = published.config.with_vocab_size(32)
    inputs = jnp.asarray(golden("llama_flags")[2]["tokens"], jnp.int32), jnp.arange(9)[None]
    logits, _ = run(config, params, *inputs, jnp.zeros((3, 9), jnp.int32))
    expected, _ = run(published.config, params_of(published), *inputs, jnp.zeros((3, 9), jnp.int32))
    np.testing.assert_allclose(logits[..., :24], expected, atol=1e-6)
    assert float(logits[..., 24:].max()) < -1e29
    huggingface.save(tmp_path / "saved", params, config, published.tokenizer)
    again = huggingface.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, params_of(again), params_of(published))


# The many ways to write a file.


def bare(weights):
    return {name.partition(".")[2]: value for name, value in weights.items()}


def test_layouts_of_the_same_gpt2(tmp_path):
    published = load(tmp_path, "gpt2")
    raw, weights, _ = golden("gpt2")
    buffers = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 14, 14), bool) for i in range(2)}
    buffers |= {f"transformer.h.{i}.attn.masked_bias": np.float32([-1e4]) for i in range(2)}
    table = {"lm_head.weight": weights["transformer.wte.weight"].copy()}
    layouts = (weights | buffers, bare(weights | buffers), weights | table, bare(weights) | table)
    for i, tensors in enumerate(layouts):
        same = huggingface.load(write(tmp_path / str(i), raw, tensors))
        assert same.fingerprint == published.fingerprint
    # The control: a file without its prefix is not taken for one without its tensors.
    with pytest.raises(InputError, match=r"lacks the tensor transformer\.h\.1\.ln_1\.weight"):
        load(tmp_path, "gpt2", weights={"transformer.h.1.ln_1.weight": None})


def test_a_model_without_its_head(tmp_path):
    without = load(tmp_path, "llama_flags", weights={"lm_head.weight": None})
    assert without.lm_head is None
    assert not without.config.tied
    _, weights, _ = golden("llama_flags")
    table = weights["model.embed_tokens.weight"].copy()
    equal = load(tmp_path, "llama_flags", weights={"lm_head.weight": table})
    np.testing.assert_array_equal(equal.lm_head["unembed"]["kernel"], table.T)


def rope(new=None, theta=None, scaling=None):
    raw = {k: v for k, v in golden("llama")[0].items() if k != "rope_parameters"}
    given = {"rope_parameters": new, "rope_theta": theta, "rope_scaling": scaling}
    return raw | {key: value for key, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("raw", "base", "scaling"),
    [
        (rope(), 10_000.0, None),
        (rope(theta=500), 500.0, None),
        (rope({"rope_type": "default", "rope_theta": 500.0}), 500.0, None),
        (rope(None, 500.0, {"type": "linear", "factor": 2}), 500.0, LinearScaling(factor=2.0)),
        (
            rope({"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, 9.0),
            500.0,
            LinearScaling(factor=2.0),
        ),
    ],
)
def test_old_and_new_ways_to_describe_rotations(raw, base, scaling, tmp_path):
    config = huggingface.read_config(write(tmp_path / "m", raw, {}))
    assert (config.rope_base, config.rope_scaling) == (base, scaling)


def test_a_model_of_several_files_is_read_onto_a_mesh_tensor_by_tensor(tmp_path, monkeypatch):
    raw, weights, _ = golden("llama_flags")
    published = load(tmp_path, "llama_flags")
    path = write(tmp_path / "m", raw, weights)
    (path / folder.WEIGHTS).unlink()
    names = {name: f"model-{i % 3 + 1}-of-3.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({n: weights[n] for n in weights if names[n] == file}, path / file)
    (path / folder.INDEX).write_text(json.dumps({"weight_map": names}))
    assert huggingface.load(path).fingerprint == published.fingerprint

    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    largest = []  # elements of ours that are made at once, for one device
    read = table.Row.read

    def counted(row, *args):
        part = read(row, *args)
        largest.append(part.size / np.prod(row.shape(args[1])))
        return part

    monkeypatch.setattr(table.Row, "read", counted)
    config, params = huggingface.place(path, mesh)
    assert config == published.config
    jax.tree.map(np.testing.assert_array_equal, params, params_of(published))
    query = params["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 2, 2, 6)}  # of 2 8 4 6
    places = sharding.tree_shardings(params_of(published), mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, p: x.sharding == p, params, places)))
    assert sorted(set(largest))[0] == 1 / 8


def test_the_vocabulary_of_gpt2(tmp_path):
    vocab = {"h": 0, "i": 1, "hi": 2, "\u0120": 3, "\u0120hi": 4, "<|endoftext|>": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match=r"vocab.json needs merges.txt beside it"):
        tokenizers.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n\u0120 hi\n")
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.encode("hi hi<|endoftext|>").ids == [2, 4, 5]
    assert tokenizer.decode([2, 4]) == "hi hi"


ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def bytes_and_merges(path, names, said=None, merges=("h i", "\u0120 hi")):
    """A folder with a byte-level vocabulary, whose ids begin with ``names``."""
    vocab = {t: i for i, t in enumerate([*names, "h", "i", "hi", "\u0120", "\u0120hi"])}
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    if said is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (None, ROBERTA),
        ({"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}, ROBERTA),
        (
            {"cls_token": "[C]", "sep_token": {"content": "[S]"}, "mask_token": "[M]"},
            ("[C]", "<pad>", "[S]", "<unk>", "[M]"),
        ),
    ],
)
def test_the_vocabulary_of_roberta(said, names, tmp_path):
    """As transformers makes its tokenizer: ``<s> A </s></s> B </s>``, of token type 0."""
    tokenizer = tokenizers.load(bytes_and_merges(tmp_path / "x", names, said))
    cls, _, sep, _, mask = names
    pair = tokenizer.encode("hi", f"hi {mask}")
    expected = [cls, "hi", sep, sep, "hi", mask, sep]  # the space is the mask's
    assert [tokenizer.id_to_token(i) for i in pair.ids] == expected
    assert set(pair.type_ids) == {0}
    assert tokenizer.encode("hi hi").offsets == [(0, 0), (0, 2), (3, 5), (0, 0)]
    found = SpecialTokens.of(tokenizer)
    assert (found.cls, found.pad, found.sep, found.unk) == (0, 1, 2, 3)
    assert tokenizer.decode(pair.ids) == "hihi"
    spaced = bytes_and_merges(tmp_path / "y", names, {**(said or {}), "add_prefix_space": True})
    assert tokenizers.load(spaced).encode("hi").tokens == [cls, "\u0120hi", sep]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}),
        ("config.json", {"model_type": "gpt2"}),
    ],
)
def test_a_gpt2_that_has_names_of_roberta_is_not_framed(name, kind, tmp_path):
    said = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = bytes_and_merges(tmp_path / "x", ROBERTA, said)
    (folder / name).write_text(json.dumps({**kind, **said}))
    assert tokenizers.load(folder).encode("<s>hi</s>").tokens == ["<s>", "hi", "</s>"]


def test_merges_of_words_are_not_read_as_those_of_bytes(tmp_path):
    """Of XLM and HerBERT, which mark the end of a word."""
    merges = ("h i", "h i</w>")
    folder = bytes_and_merges(tmp_path / "x", (*ROBERTA, "i</w>", "hi</w>"), merges=merges)
    one_sentence(
        r"merges\.txt:3: h i</w> marks the end of a word, .*save_pretrained writes it",
        lambda: tokenizers.load(folder),
    )


# Bad input.


def one_sentence(message, call):
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("gpt2", {"activation_function": "tanh"}, "activation_function='tanh' is not supported; g"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not supported; False"),
        ("gpt2", {"n_layer": 3}, "lacks the tensor transformer.h.2.ln_1.weight"),
        ("gpt2", {"n_layer": 1}, r"tensor transformer.h.1.* does not belong to this archi.* 1 lay"),
        ("gpt2", {"n_head": 3}, "config.json: hidden_dim=8 is not divisible by num_heads=3"),
        (
            "gpt2",
            {"n_inner": 12},
            r"mlp.c_proj.weight has the shape \(32, 8\), but the .* \(12, 8\)",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}},
            "rope_parameters: rope_type='yarn' is not supported; default, linear and llama3 are",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "config.json: rope_base=0.0 is not a finite number above 0; 10000 is usual",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; 1"),
        ("llama", {"num_key_value_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        (
            "llama",
            {"attention_bias": True},
            "lacks the tensor model.layers.0.self_attn.q_proj.bias",
        ),
        ("llama", {"head_dim": 3}, "head_dim=3 is not even: its channels are turned in pairs"),
    ],
)
def test_models_that_do_not_fit(kind, config, message, tmp_path):
    one_sentence(message, lambda: load(tmp_path, kind, config))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_that_should_be_tied_and_is_not(kind, tmp_path):
    other = {"lm_head.weight": np.ones((24, 8), np.float32)}
    one_sentence(
        "lm_head.weight differs from .*; set tie_word_embeddings to false in config.json if",
        lambda: load(tmp_path, kind, weights=other),
    )
    untied = load(tmp_path, kind, {"tie_word_embeddings": False}, other)  # what the error says
    assert untied.lm_head["unembed"]["kernel"].shape == (8, 24)


# The same again by transformers itself, where it is installed.


def greedy(published, tokens, length):
    """The most likely continuation of one row, by a cache."""
    config = published.config
    model, params = WithLmHead(config.make(), config.make_lm_head()), params_of(published)
    cache, new = config.make_cache(1, len(tokens) + length), list(tokens)
    extend = jax.jit(partial(model.apply, method="extend"))
    fed, start = new, 0
    for _ in range(length):
        positions = np.arange(start, start + len(fed), dtype=np.int32)[None]
        logits, cache = extend({"params": params}, np.int32([fed]), cache, positions=positions)
        start += len(fed)
        fed = [int(logits[0].argmax())]
        new += fed
    return new


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["gpt2_flags", "llama_flags"])
def test_transformers_opens_what_is_saved_and_writes_the_same_text(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    published = load(tmp_path, kind)
    saved = tmp_path / "saved"
    huggingface.save(saved, params_of(published), published.config, published.tokenizer)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info  # no missing or unexpected key, no other shape
    prompt = [3, 1, 4]
    theirs = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
    )
    assert theirs[0].tolist() == greedy(published, prompt, 8)
    assert len(set(theirs[0].tolist()[3:])) > 1  # not one token again and again
    words = transformers.AutoTokenizer.from_pretrained(saved)
    assert words("abc")["input_ids"] == published.tokenizer.encode("abc").ids
