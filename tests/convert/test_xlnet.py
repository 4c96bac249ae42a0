"""XLNet against transformers: both streams, memory, files, there and back."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_xlnet
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlm.convert import huggingface
from jaxlm.data.labelled.framing import Framer
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import WithLmHead
from jaxlm.models.pooling import last_pool
from jaxlm.models.xlnet import XlnetConfig, remember
from jaxlm.tree import leaves_with_path

GOLDEN = Path(__file__).parent.parent / "golden"
both = pytest.mark.parametrize("kind", ["bi", "uni"])


@cache
def golden(kind):
    """The ``config.json`` of a model of ``transformers``, its tensors, inputs and outputs."""
    path = GOLDEN / f"xlnet_{kind}.safetensors"
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()["config"])
    arrays = load_file(path)
    weights = {n.removeprefix("weights/"): x for n, x in arrays.items() if n.startswith("weights/")}
    return config, weights, arrays


def load(path, kind, config=None, weights=None):
    """The golden model, with some other keys and tensors."""
    raw, tensors, _ = golden(kind)
    tensors = {n: x for n, x in (tensors | (weights or {})).items() if x is not None}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw | (config or {}), indent=2))
    save_file(tensors, path / "model.safetensors")
    tiny_xlnet.tokenizer("abcdefg").save(str(path / "tokenizer.json"))  # of 24 tokens
    return huggingface.load(path)


def params_of(published):
    return jax.tree.map(jnp.asarray, published.params | {"head": published.lm_head})


@partial(jax.jit, static_argnums=0)
def run(config, params, arrays):
    """Logits of both streams, the new memory, and the gradient of those of the query stream."""
    encoder, head = config.make(), config.make_lm_head()

    def logits(params, hidden):
        table = config.make().bind({"params": params["encoder"]}).token_embed
        return head.apply({"params": params["head"]}, hidden, table)

    def total(params):
        streams = encoder.apply(
            {"params": params["encoder"]},
            arrays["tokens"],
            arrays["predicted"],
            token_type_ids=arrays["types"],
            mask=(arrays["sees"] & arrays["real/right"][:, None])[:, None],
            memory=arrays["memory/old"],
            method="streams",
        )
        scores = logits(params, streams.query)
        return jnp.sin(scores).sum(), (scores, remember(arrays["memory/old"], streams.inputs, 7, 5))

    gradients, (query, memory) = jax.grad(total, has_aux=True)(params)
    content = {}
    for side in ("left", "right"):
        hidden = encoder.apply(
            {"params": params["encoder"]},
            arrays["tokens"],
            token_type_ids=arrays["types"],
            segment_ids=arrays[f"real/{side}"].astype(jnp.int32) - 1,
        )
        content[side] = logits(params, hidden)
    return content, query, memory, gradients


@both
def test_equals_transformers(kind, tmp_path):
    published = load(tmp_path / "m", kind)
    _, weights, arrays = golden(kind)
    given = {n: jnp.asarray(x) for n, x in arrays.items() if not n.startswith("weights/")}
    given = {n: x.astype(jnp.int32) if x.dtype == jnp.int64 else x for n, x in given.items()}
    content, query, memory, gradients = run(published.config, params_of(published), given)
    for side in ("left", "right"):
        real = arrays[f"real/{side}"]
        theirs = arrays[f"logits/{side}"][real]
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(np.asarray(content[side])[real], theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(query, arrays["logits/query"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(memory, arrays["memory/new"], rtol=0, atol=1e-5)
    gradients = huggingface.to_huggingface(gradients, published.config)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        theirs = arrays[f"gradients/{name}"]
        assert np.abs(theirs).max() > 1e-2
        scale = max(1, np.abs(theirs).max())
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=1e-5 * scale, err_msg=name)


@both
def test_the_tree_is_the_models_and_goes_back(kind, tmp_path):
    published = load(tmp_path / "m", kind)
    config = published.config
    model = WithLmHead(config.make(), config.make_lm_head())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    ours = params_of(published)
    assert [(path, leaf.shape) for path, leaf in leaves_with_path(ours)] == [
        (path, leaf.shape) for path, leaf in leaves_with_path(shapes)
    ]
    saved = tmp_path / "saved"
    huggingface.save(saved, ours, config, published.tokenizer)
    again = huggingface.load(saved)
    assert (again.config, again.fingerprint) == (config, published.fingerprint)
    assert config.attention == kind
    assert (config.clamp_length, config.dropout_rate) == (3 if kind == "bi" else None, 0.2)
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == golden(kind)[1].keys()
    jax.tree.map(np.testing.assert_array_equal, tensors, golden(kind)[1])
    said = json.loads((saved / "tokenizer_config.json").read_text())
    names = {name: said[f"{name}_token"] for name in ("cls", "sep", "pad", "mask", "unk")}
    assert names == {name: f"<{name}>" for name in names}
    assert said["padding_side"] == "left"


def test_layouts_of_the_same_xlnet(tmp_path):
    published = load(tmp_path / "m", "bi")
    _, weights, _ = golden("bi")
    table = {"lm_loss.weight": weights["transformer.word_embedding.weight"].copy()}
    assert load(tmp_path / "copy", "bi", weights=table).fingerprint == published.fingerprint
    bare = {name: None for name in weights}
    bare |= {n.partition(".")[2]: x for n, x in weights.items() if n != "lm_loss.bias"}
    encoder = load(tmp_path / "bare", "bi", weights=bare)
    jax.tree.map(np.testing.assert_array_equal, encoder.params, published.params)
    assert encoder.lm_head is None
    old = {"n_token": 24, "vocab_size": None, "untie_r": True, "clamp_len": -1, "mem_len": None}
    assert load(tmp_path / "old", "bi", old).config.clamp_length is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bi_data": True}, "config.json: bi_data=True is not supported; False is"),
        ({"attn_type": "uni", "same_length": True}, "same_length=True is not supported; False"),
        ({"d_head": 3}, "d_head=3 is not supported; 4 is"),
        ({"attn_type": "x"}, "attn_type='x' is not supported; bi, uni are"),
        ({"ff_activation": "tanh"}, "ff_activation='tanh' is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported; True is"),
        ({"n_layer": 3}, "lacks the tensor transformer.layer.2.rel_attn.q"),
        ({"n_layer": 1}, "tensor transformer.layer.1.* does not belong to this archi.* 1 layers"),
        ({"n_head": 0, "d_head": None}, "num_heads=0 is not above 0"),
        ({"n_head": 3, "d_head": None}, "hidden_dim=8 is not divisible by num_heads=3"),
    ],
)
def test_models_that_do_not_fit(config, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path / "m", "bi", config)
    assert "\n" not in str(raised.value)
    assert load(tmp_path / "m", "bi", {"same_length": True}).config.attention == "bi"  # idle there


def test_a_file_that_scores_no_vocabulary_may_say_anything_of_how(tmp_path):
    found = load(tmp_path / "m", "bi", {"tie_word_embeddings": False}, {"lm_loss.bias": None})
    assert found.lm_head is None


def test_texts_are_framed_with_the_classifier_behind(tmp_path):
    framer = Framer(load(tmp_path / "m", "bi").tokenizer, 8)
    one, two = framer.ids(["ab", "cdefgh"])
    framed = framer.frame(one, two)
    unk, cls, sep, *_ = (tiny_xlnet.SPECIAL.index(name) for name in ("<unk>", "<cls>", "<sep>"))
    tokens = framed.tokens.tolist()
    assert (tokens[-2:], tokens[len(one)]) == ([sep, cls], sep)
    assert unk not in tokens
    assert framed.token_type_ids.tolist() == [0] * (len(one) + 1) + [1] * (6 - len(one)) + [2]
    assert framer.special.cls == cls


@pytest.mark.filterwarnings("default")
@both
def test_transformers_opens_what_is_saved_and_pools_the_same(kind, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    published = load(tmp_path / "m", kind)
    saved = tmp_path / "saved"
    huggingface.save(saved, params_of(published), published.config, published.tokenizer)
    for auto in (transformers.XLNetLMHeadModel, transformers.AutoModel):
        model, info = auto.from_pretrained(saved, output_loading_info=True)
        extra = {"lm_loss.bias"} if auto is transformers.AutoModel else set()
        assert set(info.pop("unexpected_keys")) <= extra
        assert not any(info.values()), info  # no missing key, no other shape
    words = transformers.AutoTokenizer.from_pretrained(saved)
    texts = ["a bed", "ab"]
    framer = Framer(published.tokenizer, 12)
    rows = np.zeros((3, 2, 12), np.int32)
    for i, one in enumerate(map(framer.frame, framer.ids(texts))):
        size = len(one.tokens)
        rows[:2, i, :size] = one.tokens, one.token_type_ids
        rows[2, i] = np.where(np.arange(12) < size, 0, -1)
    tokens, types, segments = map(jnp.asarray, rows)
    params = {"params": published.params["encoder"]}
    hidden = jax.jit(published.config.make().apply)(
        params, tokens, token_type_ids=types, segment_ids=segments
    )
    # Ours are padded on the right, theirs on the left.
    for text, ours in zip(texts, last_pool(hidden, segments), strict=True):
        given = words(text, padding="max_length", max_length=9, return_tensors="pt")
        assert given["input_ids"][0, 0] == published.tokenizer.token_to_id("<pad>")
        theirs = model.eval()(**given).last_hidden_state[0, -1].detach().numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_has_no_name_there_is_refused(tmp_path):
    config = XlnetConfig(vocab_size=24, num_layers=1, hidden_dim=8, num_heads=2, mlp_dim=12)
    with pytest.raises(InputError, match="head/transform/kernel has no name there"):
        huggingface.to_huggingface({"head": {"transform": {"kernel": np.ones(2)}}}, config)
    assert not huggingface.keeps_pooler(config)  # the other such layer, which a BERT's folder has
    assert huggingface.keeps_pooler(BertConfig(vocab_size=24))
