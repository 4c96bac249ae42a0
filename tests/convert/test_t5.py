"""T5 against transformers: numbers, files, there and back."""

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
from jaxlm.convert import huggingface, report
from jaxlm.errors import InputError
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.t5 import T5Config
from jaxlm.runs.embedder import open_embedder
from jaxlm.runs.published_task import read_config_of
from jaxlm.tree import leaves_with_path

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("t5", "t5_flags")
VOCAB = {"<pad>": 0, "</s>": 1} | {c: i for i, c in enumerate("abcdefghijkl", 2)}
HEAD, TABLE = "lm_head.weight", "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@cache
def golden(kind):
    """The ``config.json`` of a model of ``transformers``, its tensors, inputs and outputs."""
    path = GOLDEN / f"seq2seq_{kind}.safetensors"
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
    """The golden model, with some other keys and tensors; None takes one away."""
    raw, tensors, _ = golden(kind)
    without = lambda fields: {name: x for name, x in fields.items() if x is not None}
    raw, tensors = raw | (config or {}), tensors | (weights or {})
    return huggingface.load(write(path / "model", without(raw), without(tensors)))


def params_of(published):
    head = {"head": published.lm_head} if published.lm_head else {}
    return jax.tree.map(jnp.asarray, published.params | head)


def model_of(config):
    return EncoderDecoderLm(config.make(), config.make_lm_head())


@partial(jax.jit, static_argnums=0)
def run(config, params, tokens, decoder_tokens, segment_ids, decoder_segment_ids):
    """Logits, and the gradient of the sum of their sines over the real positions."""

    def total(params):
        logits = model_of(config).apply(
            {"params": params},
            tokens,
            decoder_tokens,
            segment_ids=segment_ids,
            decoder_segment_ids=decoder_segment_ids,
        )
        return jnp.where(decoder_segment_ids[..., None] >= 0, jnp.sin(logits), 0).sum(), logits

    gradients, logits = jax.grad(total, has_aux=True)(params)
    return logits, gradients


def outputs(published, kind, side):
    _, _, arrays = golden(kind)
    names = "tokens", "decoder_tokens"
    tokens = [np.int32(arrays[name]) for name in names]
    segments = [np.int32(arrays[f"{name}/{side}"]) - 1 for name in names]
    return run(published.config, params_of(published), *tokens, *segments)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind, tmp_path):
    published = load(tmp_path, kind)
    assert published.config.tied == published.config.scale_outputs == (kind == "t5")
    _, _, arrays = golden(kind)
    for side in ("left", "right"):
        real = arrays[f"decoder_tokens/{side}"]
        logits, gradients = outputs(published, kind, side)
        theirs = arrays[f"logits/{side}"][real]
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(np.asarray(logits)[real], theirs, rtol=0, atol=1e-4)
    gradients = huggingface.to_huggingface(gradients, published.config)
    theirs = {n.removeprefix("gradients/"): x for n, x in arrays.items() if "gradients/" in n}
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        scale = np.abs(theirs[name]).max()
        assert scale > 1e-3
        np.testing.assert_allclose(
            gradient, theirs[name], rtol=0, atol=1e-4 * max(1, scale), err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_the_models_and_goes_back(kind, tmp_path):
    published = load(tmp_path, kind)
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model_of(published.config).init, jax.random.key(0), tokens, tokens)
    ours = params_of(published)
    assert [(path, leaf.shape) for path, leaf in leaves_with_path(ours)] == [
        (path, leaf.shape) for path, leaf in leaves_with_path(shapes["params"])
    ]
    saved = tmp_path / "saved"
    huggingface.save(saved, ours, published.config, published.tokenizer)
    again = huggingface.load(saved)
    assert again.config == published.config == huggingface.read_config(saved)
    jax.tree.map(np.testing.assert_array_equal, params_of(again), ours)
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == golden(kind)[1].keys()
    jax.tree.map(np.testing.assert_array_equal, tensors, golden(kind)[1])
    written = json.loads((saved / "config.json").read_text())
    ids = [written[f"{name}_token_id"] for name in ("decoder_start", "pad", "eos")]
    assert ids == [0, 0, 1]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, tensor=2))
    config, placed = huggingface.place(saved, mesh)
    assert config == published.config
    jax.tree.map(np.testing.assert_array_equal, placed, ours)


# What a file says, and what it holds.


def test_the_file_says_whether_logits_are_by_the_table(tmp_path):
    published = load(tmp_path, "t5")
    table = golden("t5")[1][TABLE]
    for copies in ((HEAD,), COPIES, (*COPIES, HEAD)):
        same = load(tmp_path, "t5", weights={name: table.copy() for name in copies})
        assert same.fingerprint == published.fingerprint
    for copy in COPIES:  # alone, as files have it from which copies are left out
        same = load(tmp_path, "t5", weights={TABLE: None, copy: table.copy(), HEAD: table.copy()})
        assert same.fingerprint == published.fingerprint
    # A head of its own, whatever the configuration says; and none.
    untied = load(tmp_path, "t5", weights={HEAD: table + 1})
    assert (untied.config.tied, untied.config.scale_outputs) == (False, True)
    np.testing.assert_array_equal(untied.lm_head["unembed"]["kernel"], table.T + 1)
    tied = load(tmp_path, "t5_flags", weights={HEAD: None})
    assert (tied.config.tied, tied.config.scale_outputs) == (True, False)


@pytest.mark.parametrize(
    ("said", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
)
def test_the_configuration_says_whether_outputs_are_scaled(said, scaled, tmp_path):
    nothing = {"tie_word_embeddings": None, "scale_decoder_outputs": None}
    assert load(tmp_path, "t5", nothing | said).config.scale_outputs == scaled


def test_old_and_new_configurations(tmp_path):
    names = ("feed_forward_proj", "num_decoder_layers", "dense_act_fn", "is_gated_act")
    old = dict.fromkeys((*names, "relative_attention_max_distance"), None)
    config = load(tmp_path, "t5", old | {"n_positions": 512}).config
    assert (config.activation, config.gated) == ("relu", False)
    assert (config.num_layers, config.decoder_layers, config.max_distance) == (2, 2, 128)
    for said, activation in (("gated-silu", "silu"), ("gated-gelu", "gelu_tanh")):
        config = load(tmp_path, "t5_flags", {"feed_forward_proj": said}).config
        assert (config.activation, config.gated, config.decoder_layers) == (activation, True, 3)
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    load(tmp_path, "t5", weights={unread: np.ones((8, 2), np.float32)})


def test_rows_that_are_no_tokens_are_neither_predicted_nor_written(tmp_path):
    published = load(tmp_path, "t5")
    params = params_of(published)
    table = params["encoder"]["token_embed"]
    table["embedding"] = jnp.pad(table["embedding"], ((0, 8), (0, 0)), constant_values=9)
    config = published.config.with_vocab_size(32)
    score = lambda module, hidden: module.head(hidden, module.encoder.token_embed)
    logits = model_of(config).apply({"params": params}, jnp.ones((1, 2, 8)), method=score)
    assert float(logits[..., 24:].max()) < -1e29 < float(logits[..., :24].min())
    huggingface.save(tmp_path / "saved", params, config, published.tokenizer)
    again = huggingface.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, params_of(again), params_of(published))


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"feed_forward_proj": "gated-tanh"}, {}, "feed_forward_proj='gated-tanh' is not suppor"),
        ({"decoder_start_token_id": 1}, {}, "decoder_start_token_id=1 is not supported; 0 is"),
        ({"num_layers": 3}, {}, "lacks the tensor encoder.block.2.layer.0.layer_norm.weight"),
        ({"num_decoder_layers": 1}, {}, "tensor decoder.block.1.* does not belong to this archi"),
        ({"d_kv": 5}, {}, r"k.weight has the shape \(12, 8\), but the configuration .* \(10, 8\)"),
        ({"num_heads": 0}, {}, "config.json: num_heads=0 is not above 0"),
        ({"relative_attention_num_buckets": 3}, {}, "num_buckets=3 is not an even number from 4"),
        ({"relative_attention_max_distance": 4}, {}, "max_distance=4 is not above half of num_bu"),
        ({"d_model": None}, {}, "config.json lacks d_model"),
        (
            {},
            {COPIES[0]: np.ones((24, 8), np.float32)},
            "encoder.* differs from shared.weight; o",
        ),
        ({}, {"decoder.final_layer_norm.weight": None}, "lacks the tensor decoder.final_layer_nor"),
    ],
)
def test_models_that_do_not_fit(config, weights, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path, "t5", config, weights)
    assert "\n" not in str(raised.value)


HEADS = {  # of classes of transformers, and their shapes; the other classes have none
    "T5ForSequenceClassification": {
        "classification_head.dense.weight": (8, 8),
        "classification_head.dense.bias": (8,),
        "classification_head.out_proj.weight": (2, 8),
        "classification_head.out_proj.bias": (2,),
    },
    "T5ForTokenClassification": {"classifier.weight": (2, 8), "classifier.bias": (2,)},
    "T5ForQuestionAnswering": {"qa_outputs.weight": (2, 8), "qa_outputs.bias": (2,)},
    "T5EncoderModel": {},
}


def tensors_of(name):
    """Those of a class that is not a whole T5 with its own head."""
    own = golden("t5")[1]
    if name in ("T5ForTokenClassification", "T5EncoderModel"):
        own = {n: x for n, x in own.items() if not n.startswith("decoder.")}
    if name in ("T5ForSequenceClassification", "T5ForTokenClassification"):
        own = {f"transformer.{n}": x for n, x in own.items()}
    return own | {n: np.ones(shape, np.float32) for n, shape in HEADS[name].items()}


@pytest.mark.parametrize("name", HEADS)
def test_classes_with_another_head_or_without_a_decoder(name, tmp_path, capsys):
    raw = golden("t5")[0] | {"architectures": [name]}
    folder = write(tmp_path / "m", raw, tensors_of(name))
    if not any("decoder." in n for n in tensors_of(name)):
        for read in (huggingface.load, report.read, read_config_of, open_embedder):
            with pytest.raises(InputError, match=r"encoder without its decoder.*: take the folder"):
                read(folder if read in (huggingface.load, report.read) else str(folder))
        return
    published, whole = huggingface.load(folder), load(tmp_path, "t5")
    jax.tree.map(np.testing.assert_array_equal, published.params, whole.params)
    said = f"the head of a {name} ({len(HEADS[name])} tensors) is computed in another way than any"
    assert said in capsys.readouterr().err
    found = report.read(folder)
    assert (found.differences, len(found.others)) == ((), len(HEADS[name]))
    with pytest.raises(InputError, match=f"is a {name}, whose head is computed .* with --base"):
        read_config_of(str(folder))


@pytest.mark.parametrize("kind", ["mt5", "umt5"])
def test_kin_that_is_not_read(kind, tmp_path):
    raw = golden("t5")[0] | {"model_type": kind}
    folder = write(tmp_path / "m", raw, tensors_of("T5ForQuestionAnswering"))
    for read in (huggingface.load, read_config_of, open_embedder):
        with pytest.raises(InputError, match=f"model_type='{kind}' is not supported; .* t5 and"):
            read(str(folder))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", HEADS)
def test_transformers_names_them_so(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = golden("t5")[0] | {"num_labels": 2}
    model = getattr(transformers, name)(transformers.T5Config(**raw))
    model.save_pretrained(tmp_path)
    shapes = lambda tensors: {n: x.shape for n, x in tensors.items()}
    assert shapes(load_file(tmp_path / "model.safetensors")) == shapes(tensors_of(name))


def test_an_activation_that_other_libraries_would_take_for_another(tmp_path):
    config = T5Config(vocab_size=14, activation="gelu", gated=True)
    with pytest.raises(InputError, match=r"activation=gelu in gated blocks .*: use that"):
        huggingface.save(tmp_path / "x", {}, config, Tokenizer(models.BPE(VOCAB, [])))


def test_it_embeds_no_text(tmp_path):
    load(tmp_path, "t5")
    with pytest.raises(InputError, match="task=Embedding reads one text, and a model of T5Config"):
        open_embedder(str(tmp_path / "model"))


# Texts: with a cache, as transformers writes them.


def greedy(published, tokens, segment_ids, length):
    """The likeliest continuations, by a cache."""
    model, params = model_of(published.config), {"params": params_of(published)}
    rows, source_length = tokens.shape

    @jax.jit
    def start(tokens, segment_ids):
        empty = published.config.make_cache(rows, length, source_length)
        return model.apply(params, tokens, empty, segment_ids=segment_ids, method="start")

    @jax.jit
    def extend(fed, cache, positions):
        return model.apply(params, fed, cache, positions=positions, method="extend")

    cache, new = start(tokens, segment_ids), [np.zeros(rows, np.int32)]
    for place in range(length):
        positions = np.full((rows, 1), place, np.int32)
        logits, cache = extend(new[-1][:, None], cache, positions)
        new.append(np.asarray(logits.argmax(-1), np.int32))
    return np.stack(new, 1)


@pytest.mark.parametrize("kind", [pytest.param("t5", marks=pytest.mark.slow), "t5_flags"])
def test_generates_what_transformers_does(kind, tmp_path):
    _, _, arrays = golden(kind)
    tokens, real = np.int32(arrays["tokens"]), np.int32(arrays["tokens/right"])
    ours = greedy(load(tmp_path, kind), tokens, real - 1, 10)
    np.testing.assert_array_equal(ours, arrays["generated"])
    assert len(np.unique(ours)) > 3  # not one token again and again


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "tied"), [("t5", False), ("t5_flags", True)])
def test_the_other_ways_to_score_the_vocabulary(kind, tied, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, _, arrays = golden(kind)
    head = None if tied else np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    published = load(tmp_path, kind, weights={HEAD: head})
    logits, _ = outputs(published, kind, "right")
    saved = tmp_path / "saved"
    huggingface.save(saved, params_of(published), published.config, published.tokenizer)
    for folder in (tmp_path / "model", saved):
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        told = {"input_ids": "tokens", "decoder_input_ids": "decoder_tokens"}
        told |= {"attention_mask": "tokens/right", "decoder_attention_mask": "decoder_tokens/right"}
        theirs = model(**{name: torch.tensor(arrays[key]).long() for name, key in told.items()})
        real = arrays["decoder_tokens/right"]
        made = theirs.logits.detach().numpy()[real]
        np.testing.assert_allclose(np.asarray(logits)[real], made, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_what_is_saved(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    published = load(tmp_path, kind)
    saved = tmp_path / "saved"
    huggingface.save(saved, params_of(published), published.config, published.tokenizer)
    auto = transformers.AutoModelForSeq2SeqLM
    model, info = auto.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info  # no missing or unexpected key, no other shape
    _, _, arrays = golden(kind)
    theirs = model.generate(
        torch.tensor(arrays["tokens"]),
        attention_mask=torch.tensor(arrays["tokens/right"]).long(),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=None,
        use_cache=False,
    )
    np.testing.assert_array_equal(theirs, arrays["generated"])
    words = transformers.AutoTokenizer.from_pretrained(saved)
    assert words("abc")["input_ids"] == published.tokenizer.encode("abc").ids
