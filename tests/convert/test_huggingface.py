import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from jaxlm.convert import bert, huggingface, table
from jaxlm.errors import InputError
from jaxlm.models.heads import MlmHead, WithLmHead
from jaxlm.tree import leaves_with_path

GOLDEN = Path(__file__).parent.parent / "golden"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs"]


class Golden:
    """A model of ``transformers``: its files' contents, inputs and outputs."""

    def __init__(self, kind):
        path = GOLDEN / f"published_{kind}.safetensors"
        with safe_open(path, framework="np") as file:
            self.config = json.loads(file.metadata()["config"])
        arrays = load_file(path)
        weights = {name: value for name, value in arrays.items() if name.startswith("weights/")}
        self.weights = {name.removeprefix("weights/"): value for name, value in weights.items()}
        self.arrays = {name: value for name, value in arrays.items() if name not in weights}
        self.real = np.arange(9)[None] < self.arrays["lengths"][:, None]


BERT, ROBERTA = Golden("bert"), Golden("roberta")


def write(folder, config, weights, vocab=VOCAB):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", BERT.config, BERT.weights)


@partial(jax.jit, static_argnums=0)
def run(config, params, tokens, token_type_ids, segment_ids):
    def both(model):
        hidden = model.encoder(tokens, token_type_ids=token_type_ids, segment_ids=segment_ids)
        return hidden, model.head(hidden, model.encoder.token_embed)

    model = WithLmHead(config.make(), MlmHead(config.epsilon))
    return model.apply({"params": params}, method=both)


def outputs(published, golden):
    """Hidden states and logits."""
    tokens, types = (golden.arrays[name] for name in ("tokens", "token_type_ids"))
    params = published.params | {"head": published.lm_head}
    segments = np.where(golden.real, 0, -1)
    arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, types, segments))
    return run(published.config, params, *arrays)


# The numbers.


@pytest.mark.parametrize("golden", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_equals_transformers(golden, tmp_path):
    published = huggingface.load(write(tmp_path / "model", golden.config, golden.weights))
    hidden, logits = outputs(published, golden)
    for ours, theirs in ((hidden, golden.arrays["hidden"]), (logits, golden.arrays["logits"])):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours[golden.real], theirs[golden.real], rtol=0, atol=1e-5)
    if golden is BERT:
        pooler = published.pooler
        pooled = np.tanh(np.asarray(hidden)[:, 0] @ pooler["kernel"] + pooler["bias"])
        np.testing.assert_allclose(pooled, golden.arrays["pooled"], rtol=0, atol=1e-5)

    # The control: two tensors of one shape under each other's name.
    name = next(name for name in golden.weights if name.endswith("layer.1.attention.self.key.bias"))
    other = name.replace("key", "value")
    weights = golden.weights | {name: golden.weights[other], other: golden.weights[name]}
    exchanged = huggingface.load(write(tmp_path / "other", golden.config, weights))
    assert np.abs(outputs(exchanged, golden)[0] - hidden)[golden.real].max() > 1e-2


@pytest.mark.parametrize("golden", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_the_tree_is_the_models(golden, tmp_path):
    published = huggingface.load(write(tmp_path / "model", golden.config, golden.weights))
    model = WithLmHead(published.config.make(), MlmHead())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    ours = published.params | {"head": published.lm_head}
    assert [(path, leaf.shape) for path, leaf in leaves_with_path(ours)] == [
        (path, leaf.shape) for path, leaf in leaves_with_path(shapes)
    ]


def test_the_config():
    _, config = bert.read_config(
        BERT.config | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0},
        "config.json",
    )
    assert (config.dropout_rate, config.attention_dropout_rate) == (0.2, 0.0)
    assert (config.epsilon, config.max_length, config.num_token_types) == (0.01, 10, 2)
    _, config = bert.read_config(ROBERTA.config, "config.json")
    assert (config.max_length, config.num_token_types) == (10, 1)
    old = {key: value for key, value in BERT.config.items() if "eps" not in key}
    assert bert.read_config(old | {"pad_token_id": None}, "config.json")[1].epsilon == 1e-12


# There and back.


def test_export_is_the_inverse(folder):
    published = huggingface.load(folder)
    params = published.params | {"head": {"pooler": published.pooler, **published.lm_head}}
    tensors = huggingface.to_huggingface(jax.tree.map(jnp.asarray, params), published.config)
    expected = {
        name: value for name, value in BERT.weights.items() if "seq_relationship" not in name
    }
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])
    encoder = huggingface.to_huggingface(published.params, published.config)
    assert encoder.keys() == {n for n in expected if n.startswith("bert.") and "pooler" not in n}


def test_the_unused_rows_come_back_empty(tmp_path):
    published = huggingface.load(write(tmp_path / "model", ROBERTA.config, ROBERTA.weights))
    sizes = bert.sizes(published.config)
    tensors = table.write(bert.ROBERTA.encoder, published.params, sizes)
    positions = "roberta.embeddings.position_embeddings.weight"
    assert np.abs(ROBERTA.weights[positions][:2]).max() > 0
    for name, tensor in tensors.items():
        unused = 2 if name == positions else 0
        np.testing.assert_array_equal(tensor[unused:], ROBERTA.weights[name][unused:])
        assert not tensor[:unused].any()


def test_a_saved_roberta_is_a_bert_with_its_own_tokens(tmp_path):
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abc"]
    source = write(tmp_path / "model", ROBERTA.config, ROBERTA.weights)
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.save(str(source / "tokenizer.json"))
    published, merged = huggingface.load(source), tmp_path / "merged"
    huggingface.save(merged, published.params, published.config, published.tokenizer)
    saved = {path.name: path.read_text() for path in merged.glob("*.json")}
    assert json.loads(saved["config.json"])["pad_token_id"] == 1
    tokens = json.loads(saved["tokenizer_config.json"])
    # A BertTokenizer, which is what transformers otherwise takes for a BERT's, is WordPiece.
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert [tokens[f"{name}_token"] for name in ("pad", "cls")] == ["<pad>", "<s>"]
    assert "token_type_ids" not in tokens["model_input_names"]  # there is one type alone
    again = huggingface.load(merged)
    assert again.config == published.config
    jax.tree.map(np.testing.assert_array_equal, again.params, published.params)
    with pytest.raises(InputError, match=r"^head/x has no name there"):
        huggingface.save(tmp_path / "x", {"head": {"x": np.ones(3)}}, published.config, tokenizer)
    assert not (tmp_path / ".x").exists()


def test_export_refuses_what_has_no_name(folder):
    published = huggingface.load(folder)
    params = published.params | {"head": {"classifier": {"bias": np.zeros(3, np.float32)}}}
    with pytest.raises(InputError, match=r"^head/classifier/bias has no name there"):
        huggingface.to_huggingface(params, published.config)
    params = published.params | {"head": {"bias": np.zeros(3, np.float32)}}
    with pytest.raises(InputError, match=r"^head/bias has the shape \(1, 3\), but .* \(1, 24\)$"):
        huggingface.to_huggingface(params, published.config)


# The many ways to write a file.


def bare(weights):
    encoder = {name: value for name, value in weights.items() if name.startswith("bert.")}
    return {name.removeprefix("bert."): value for name, value in encoder.items()}


@pytest.mark.parametrize(("limit", "file"), [(100, ""), (5000, r"/out/model\.safetensors: ")])
def test_a_full_disk_leaves_nothing(folder, limit, file, tmp_path, limit_file_size):
    """Nor does a folder go that has the name of the new one behind a dot."""
    found = huggingface.load(folder)
    (tmp_path / "to" / ".out").mkdir(parents=True)
    limit_file_size(limit)
    with pytest.raises(InputError, match=rf"/out cannot be written \(.*{file}.*too large.*; make"):
        huggingface.save(tmp_path / "to" / "out", found.params, found.config, found.tokenizer)
    assert list((tmp_path / "to").iterdir()) == [tmp_path / "to" / ".out"]


def test_layouts_of_the_same_model(folder, tmp_path):
    published = huggingface.load(folder)
    word = "bert.embeddings.word_embeddings.weight"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in BERT.weights.items()
    }
    extra = {
        "bert.embeddings.position_ids": np.arange(10)[None],
        "cls.predictions.decoder.weight": BERT.weights[word],
        "cls.predictions.decoder.bias": BERT.weights["cls.predictions.bias"],
    }
    moved = dict(extra)  # tied tensors under their second names alone
    for name, value in BERT.weights.items():
        if name not in (word, "cls.predictions.bias"):
            moved[name] = value
    for i, weights in enumerate((old, BERT.weights | extra, moved)):
        same = huggingface.load(write(tmp_path / str(i), BERT.config, weights))
        assert same.fingerprint == published.fingerprint
        jax.tree.map(np.testing.assert_array_equal, same.lm_head, published.lm_head)

    encoder = huggingface.load(write(tmp_path / "bare", BERT.config, bare(BERT.weights)))
    jax.tree.map(np.testing.assert_array_equal, encoder.params, published.params)
    jax.tree.map(np.testing.assert_array_equal, encoder.pooler, published.pooler)
    assert encoder.lm_head is None
    weights = {name: value for name, value in bare(BERT.weights).items() if "pooler" not in name}
    assert huggingface.load(write(tmp_path / "none", BERT.config, weights)).pooler is None


def shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(index.values()):
        save_file({n: weights[n] for n in weights if index[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards(folder):
    whole = huggingface.load(folder).fingerprint
    shard(folder)
    assert huggingface.load(str(folder)).fingerprint == whole


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_low_precision_is_widened(dtype, folder, tmp_path):
    published = huggingface.load(folder)
    weights = {name: value.astype(dtype) for name, value in BERT.weights.items()}
    low = huggingface.load(write(tmp_path / "low", BERT.config, weights))
    for (path, x), (_, y) in zip(
        leaves_with_path(low.params), leaves_with_path(published.params), strict=True
    ):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, y.astype(dtype).astype(np.float32), err_msg=path)
    assert low.fingerprint != published.fingerprint


def test_the_fingerprint_is_of_weights_and_config(folder, tmp_path):
    first = huggingface.load(folder).fingerprint
    name = "bert.encoder.layer.1.output.dense.bias"
    changed = BERT.weights[name].copy()
    changed[3] = np.nextafter(changed[3], 9)
    for i, (config, weights) in enumerate(
        [({}, {name: changed}), ({"layer_norm_eps": 1e-5}, {}), ({"num_attention_heads": 4}, {})]
    ):
        other = write(tmp_path / str(i), BERT.config | config, BERT.weights | weights)
        assert huggingface.load(other).fingerprint != first
    assert huggingface.load(folder).fingerprint == first


def test_the_tokenizer_cuts_and_pads_nothing(folder):
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = huggingface.load(folder).tokenizer
    assert tokenizer.truncation is None
    assert tokenizer.padding is None


# Bad input.

LAYER = "bert.encoder.layer.1"


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"model_type": "mpnet"}, {}, "json: model_type='mpnet' is not supported; bert, distil"),
        ({"model_type": None}, {}, "config.json lacks model_type"),
        ({"hidden_act": "gelu_new"}, {}, "hidden_act='gelu_new' is not supported; 'gelu' is"),
        ({"position_embedding_type": "relative_key"}, {}, "'relative_key' is not supported"),
        ({"is_decoder": True}, {}, "is_decoder=True is not supported; False is"),
        ({"add_cross_attention": True}, {}, "add_cross_attention=True is not supported"),
        ({"hidden_size": None}, {}, "config.json lacks hidden_size"),
        ({"hidden_size": "8"}, {}, "config.json: hidden_size='8' is of the wrong type: write a wh"),
        (
            {"layer_norm_eps": math.nan},
            {},
            "config.json: layer_norm_eps=nan is not a finite number",
        ),
        ({"layer_norm_eps": 10**400}, {}, "config.json: layer_norm_eps=10+ is not a finite number"),
        ({"layer_norm_eps": -1.0}, {}, "config.json: epsilon=-1.0 is not a finite number above 0"),
        ({"num_hidden_layers": True}, {}, "num_hidden_layers=True is of the wrong type"),
        ({"num_attention_heads": 3}, {}, "config.json: hidden_dim=8 is not divisible by num_heads"),
        ({"vocab_size": 20}, {}, "vocabulary of 24 is larger than the model's vocab_size=20"),
        (
            {"num_hidden_layers": 1},
            {},
            f"tensor {LAYER}.* does not belong to this architecture of 1 lay",
        ),
        ({"num_hidden_layers": 3}, {}, "lacks the tensor bert.encoder.layer.2.attention.self"),
        ({}, {f"{LAYER}.output.dense.bias": None}, f"lacks the tensor {LAYER}.output.dense.bias"),
        ({}, {"bert.pooler.dense.bias": None}, "lacks the tensor bert.pooler.dense.bias"),
        ({}, {"cls.predictions.bias": None}, "lacks the tensor cls.predictions.bias"),
        (
            {},
            {"classifier.weight": np.zeros((2, 8))},
            "the tensor classifier.weight does not belong",
        ),
        (
            {"intermediate_size": 16},
            {},
            r"layer.0.output.dense.weight has the shape \(8, 12\), but the .* \(8, 16\)",
        ),
        (
            {},
            {f"{LAYER}.output.dense.bias": np.zeros(8, np.int8)},
            f"{LAYER}.output.dense.bias is int8; quantised weights cannot be read",
        ),
        (
            {},
            {"cls.predictions.decoder.bias": np.zeros(24, np.float32)},
            "cls.predictions.decoder.bias differs from cls.predictions.bias; untied",
        ),
    ],
)
def test_models_that_do_not_fit(config, weights, message, tmp_path):
    tensors = {name: value for name, value in (BERT.weights | weights).items() if value is not None}
    refused(write(tmp_path / "model", BERT.config | config, tensors), message)


def refused(folder, message):
    with pytest.raises(InputError, match=message) as raised:
        huggingface.load(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_roberta_counts_positions_from_two(tmp_path):
    folder = write(tmp_path / "m", ROBERTA.config | {"pad_token_id": 0}, ROBERTA.weights)
    refused(folder, "pad_token_id=0 is not supported; 1 is")


def test_a_bare_file_is_named_as_it_is(tmp_path):
    weights = bare(BERT.weights) | {"encoder.more": np.zeros(3)}
    refused(write(tmp_path / "m", BERT.config, weights), "the tensor encoder.more does not belong")


def keep_torch(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def point(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def spoil_the_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is not a model's folder .*: no config.json"),
        (lambda f: (f / "config.json").write_text('{\n"a": 1,,\n}'), "config.json:2: not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json is not JSON, because"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (
            lambda f: (f / "config.json").write_text('{"a":' + 10**5 * "["),
            "json:1: not JSON .too many",
        ),
        (lambda f: (f / "vocab.txt").unlink(), "holds neither tokenizer.json nor vocab.txt nor"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (keep_torch, "holds pytorch_model.bin but no model.safetensors: .* save_pretrained"),
        (cut, "model.safetensors is not a complete safetensors file .*; download it again"),
        (point, "model.safetensors is not a complete safetensors file"),
        (lose_a_shard, "index.json names model-00002-of-00002.safetensors, which is not there"),
        (spoil_the_index, "index.json has no weight_map from tensors to files beside it"),
    ],
)
def test_damaged_folders(damage, message, folder):
    damage(folder)
    refused(folder, message)


def test_a_byte_order_mark_before_json_is_nothing(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert huggingface.read_config(folder).hidden_dim == BERT.config["hidden_size"]


def test_the_messages_name_the_folder_once(folder):
    cut(folder)
    with pytest.raises(InputError) as raised:
        huggingface.load(folder)
    assert len(re.findall(re.escape(str(folder)), str(raised.value))) == 1
