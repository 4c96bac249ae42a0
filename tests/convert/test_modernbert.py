"""ModernBERT against transformers: numbers, files, heads of tasks, there and back."""

import json
import runpy
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from jaxlm.convert import huggingface, modernbert
from jaxlm.convert.architecture import TaskHead
from jaxlm.errors import InputError
from jaxlm.models.heads import ClassificationHead, TokenHead, WithHead, WithLmHead
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.pooling import POOLS
from jaxlm.tree import leaves_with_path

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = ("modernbert", "modernbert_flags")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
VOCAB = {token: i for i, token in enumerate((*SPECIAL, *"abcdefghijk"))}
both = pytest.mark.parametrize("kind", KINDS)


@cache
def golden(kind, folder=GOLDEN):
    """The ``config.json`` of a model of ``transformers``, its tensors, inputs and outputs."""
    path = folder / f"{kind}.safetensors"
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()["config"])
    arrays = load_file(path)
    weights = {n.removeprefix("weights/"): x for n, x in arrays.items() if n.startswith("weights/")}
    return config, weights, arrays


def load(path, kind, config=None, weights=None, folder=GOLDEN):
    """The golden model, with some other keys and tensors."""
    raw, tensors, _ = golden(kind, folder)
    tensors = {n: x for n, x in (tensors | (weights or {})).items() if x is not None}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw | (config or {}), indent=2))
    save_file(tensors, path / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path / "tokenizer.json"))
    return huggingface.load(path)


def params_of(published):
    return jax.tree.map(jnp.asarray, published.params | {"head": published.lm_head})


@partial(jax.jit, static_argnums=0)
def run(config, params, arrays):
    """Logits with padding on both sides and of the packed row; the gradient of one of them."""
    model = WithLmHead(config.make(), config.make_lm_head())

    def logits(params, tokens, segment_ids):
        return model.apply({"params": params}, tokens, segment_ids=segment_ids)

    def total(params):
        real = arrays["real/right"]
        scores = logits(params, arrays["tokens"], real.astype(jnp.int32) - 1)
        return jnp.where(real[..., None], jnp.sin(scores), 0).sum(), scores

    gradients, right = jax.grad(total, has_aux=True)(params)
    left = logits(params, arrays["tokens"], arrays["real/left"].astype(jnp.int32) - 1)
    packed = logits(params, arrays["packed"], arrays["documents"])
    return {"left": left, "right": right, "alone": packed}, gradients


def check_equal(published, weights, arrays, atol=1e-5):
    given = {n: x for n, x in arrays.items() if not n.startswith(("weights/", "gradients/"))}
    given = {n: x.astype(np.int32) if x.dtype == np.int64 else x for n, x in given.items()}
    logits, gradients = run(published.config, params_of(published), given)
    real = {side: arrays[f"real/{side}"] for side in ("left", "right")}
    for name, ours in logits.items():
        chosen = real.get(name, ...)
        theirs = arrays[f"logits/{name}"][chosen]
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(np.asarray(ours)[chosen], theirs, rtol=0, atol=atol)
    gradients = huggingface.to_huggingface(gradients, published.config)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        theirs = arrays[f"gradients/{name}"]
        assert np.abs(theirs).max() > 1e-2
        scale = max(1, np.abs(theirs).max())
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=atol * scale, err_msg=name)


@both
def test_equals_transformers(kind, tmp_path):
    check_equal(load(tmp_path / "m", kind), *golden(kind)[1:])


@both
def test_the_tree_is_the_models_and_goes_back(kind, tmp_path):
    published = load(tmp_path / "m", kind)
    config, ours = published.config, params_of(published)
    model = WithLmHead(config.make(), config.make_lm_head())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert [(path, leaf.shape) for path, leaf in leaves_with_path(ours)] == [
        (path, leaf.shape) for path, leaf in leaves_with_path(shapes)
    ]
    saved = tmp_path / "saved"
    huggingface.save(saved, ours, config, published.tokenizer)
    again = huggingface.load(saved)
    assert (again.config, again.fingerprint) == (config, published.fingerprint)
    tensors, weights = load_file(saved / "model.safetensors"), golden(kind)[1]
    assert tensors.keys() == weights.keys()
    jax.tree.map(np.testing.assert_array_equal, tensors, weights)
    said = json.loads((saved / "config.json").read_text())
    ids = {name: said[f"{name}_token_id"] for name in ("pad", "cls", "bos", "sep", "eos")}
    assert ids == {"pad": 0, "cls": 1, "bos": 1, "sep": 2, "eos": 2}
    tokens = json.loads((saved / "tokenizer_config.json").read_text())
    assert tokens["model_input_names"] == ["input_ids", "attention_mask"]
    assert (tokens["cls_token"], tokens["sep_token"]) == ("[CLS]", "[SEP]")


def test_a_folder_names_the_tokens_that_the_tokenizer_frames_by(tmp_path):
    published = load(tmp_path / "m", "modernbert")
    tokenizer = published.tokenizer
    tokenizer.post_processor = TemplateProcessing(
        single="a $A b", special_tokens=[(name, VOCAB[name]) for name in "ab"]
    )
    huggingface.save(tmp_path / "saved", params_of(published), published.config, tokenizer)
    tokens = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert (tokens["cls_token"], tokens["sep_token"]) == ("a", "b")
    said = json.loads((tmp_path / "saved/config.json").read_text())
    assert (said["cls_token_id"], said["eos_token_id"]) == (VOCAB["a"], VOCAB["b"])


def test_every_flag_is_read(tmp_path):
    plain, flags = (load(tmp_path / kind, kind).config for kind in KINDS)
    defaults = {f.name: f.default for f in fields(ModernBertConfig)}
    same = {name for name, value in defaults.items() if vars(flags)[name] == value}
    assert same == {"num_tokens", "initializer_std", "dtype", "attention", "unroll", "remat"}
    told = {"global_every": 2, "window": 3, "global_rope_base": 700.0, "local_rope_base": 90.0}
    assert {name: vars(flags)[name] for name in told} == told
    assert (plain.global_every, plain.window, plain.pooling) == (3, 10, "cls")
    rates = (flags.dropout_rate, flags.attention_dropout_rate, flags.mlp_dropout_rate)
    assert rates == (0.1, 0.2, 0.3)


NEW = ("layer_types", "rope_parameters")
OLD = {"global_attn_every_n_layers": 2, "global_rope_theta": 700.0, "local_rope_theta": 90}


def test_both_spellings_are_one_model(tmp_path):
    new = load(tmp_path / "new", KINDS[1], dict.fromkeys(OLD))
    old = load(tmp_path / "old", KINDS[1], dict.fromkeys(NEW) | OLD)
    assert (old.config, old.fingerprint) == (new.config, new.fingerprint)
    full = load(tmp_path / "full", KINDS[1], {"layer_types": ["full_attention"] * 3})
    first = ["full_attention", *["sliding_attention"] * 2]
    assert full.config.is_local.tolist() == [False] * 3
    alone = load(tmp_path / "first", KINDS[1], {"layer_types": first})
    assert alone.config.is_local.tolist() == [False, True, True]


def test_layouts_of_the_same_model(tmp_path):
    published, weights = load(tmp_path / "m", KINDS[0]), golden(KINDS[0])[1]
    table = weights["model.embeddings.tok_embeddings.weight"]
    tied = load(tmp_path / "tied", KINDS[0], weights={"decoder.weight": table.copy()})
    assert tied.fingerprint == published.fingerprint
    with pytest.raises(InputError, match=r"decoder.weight differs from .*tok_embeddings.weight"):
        load(tmp_path / "untied", KINDS[0], weights={"decoder.weight": table + 1})
    bare = dict.fromkeys(weights) | {
        n.removeprefix("model."): x for n, x in weights.items() if n.startswith("model.")
    }
    encoder = load(tmp_path / "bare", KINDS[0], weights=bare)
    jax.tree.map(np.testing.assert_array_equal, encoder.params, published.params)
    assert encoder.lm_head is None
    # Of a task's file the last layer is not read, but what comes before it.
    last = {"classifier.weight": np.ones((3, 8), np.float32), "classifier.bias": np.ones(3)}
    task = load(tmp_path / "task", KINDS[0], weights={"decoder.bias": None, **last})
    assert task.lm_head is not None
    assert published.lm_head is not None
    assert task.lm_head.keys() == published.lm_head.keys() - {"bias"}


def rope(**changes):
    theta = {"rope_theta": 1e4, "rope_type": "default"}
    return {"rope_parameters": {"full_attention": theta, "sliding_attention": theta | changes}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"local_attention": 7}, "local_attention=7 is odd, .*: write 6, which is what transform"),
        ({"local_attention": 0}, "local_attention=0 is below 2, of which half is .*: 128 is usual"),
        ({"local_attention": -3}, "local_attention=-3 is below 2"),
        ({"local_attention": 128.0}, "local_attention=128.0 is .*: write a whole number"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' is of the wrong type: write a number"),
        ({"sliding_window": 0}, "local_attention=0 is below 2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters has rope_type: write those"),
        (rope() | {"rope_parameters": {"full_atention": {}}}, "rope_parameters has full_atention"),
        ({"rope_parameters": {"full_attention": 5}}, "full_attention=5 is .*: write an object"),
        (rope(rope_theta=0), "local_rope_base=0.0 is not a finite number above 0; 10000 is usual$"),
        (rope(rope_theta=np.nan), "sliding_attention: rope_theta=nan is not a finite number"),
        ({"max_position_embeddings": 0}, r"max_length=0 .* is max_position_embeddings"),
        (
            rope(rope_type="yarn"),
            "rope_parameters: sliding_attention: rope_type='yarn' is .*: write",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: rope_type='linear' is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "of 4 layers, the first and every n-th"),
        ({"layer_types": ["full_attention"] * 3}, "of 4 layers, the first and every n-th"),
        ({"num_hidden_layers": 5, "layer_types": None}, "lacks the tensor model.layers.4.attn.Wqk"),
        ({"num_hidden_layers": 3, "layer_types": None}, "layers.3.* does not belong to this arch"),
        ({"num_hidden_layers": 0, "layer_types": []}, "num_layers=0 is not above 0"),
        (
            {"num_attention_heads": 3},
            r"hidden_dim=8 is not divisible by twice num_heads=3: .*\(in the file hidden_dim is "
            r"hidden_size, num_heads is num_attention_heads\)",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported; True is"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max' is not supported; cls, mean are"),
        ({"hidden_activation": "tanh"}, "hidden_activation='tanh' is not supported"),
        ({"norm_bias": True}, "lacks the tensor model.embeddings.norm.bias"),
    ],
)
def test_models_that_do_not_fit(config, message, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        load(tmp_path / "m", KINDS[0], config)
    assert "\n" not in str(raised.value)
    # The ways out, on the same file.
    assert load(tmp_path / "m", KINDS[0], {"local_attention": 6}).config.window == 3
    assert load(tmp_path / "m", KINDS[0], rope(type="default")).config.local_rope_base == 1e4


def test_a_file_that_scores_no_vocabulary_may_say_anything_of_how(tmp_path):
    untied = {"tie_word_embeddings": False}
    found = load(tmp_path / "m", KINDS[0], untied, {"decoder.bias": None})
    whole = load(tmp_path / "whole", KINDS[0])
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    with pytest.raises(InputError, match="tie_word_embeddings=False is not supported"):
        load(tmp_path / "m", KINDS[0], untied)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"local_rope_theta": None}, 700.0),
        ({"local_rope_theta": 90.0}, 90.0),
        ({}, 10_000.0),
    ],
    ids=str,
)
def test_no_base_of_windows_is_that_of_the_other_layers(said, expected):
    """As before version 5 of transformers, in which a missing key was not null."""
    raw, *_ = golden(KINDS[0])
    old = {k: x for k, x in raw.items() if k not in ("rope_parameters", "local_rope_theta")}
    _, config = modernbert.read_config(old | {"global_rope_theta": 700.0} | said, "config.json")
    assert (config.global_rope_base, config.local_rope_base) == (700.0, expected)


def test_another_prefix_is_that_of_all_names():
    config = ModernBertConfig(
        vocab_size=16, num_layers=2, hidden_dim=8, num_heads=2, mlp_dim=8, norm_bias=True
    )
    bare, sizes = modernbert.architecture(config).with_prefix(""), modernbert.sizes(config)
    names = [name for row in bare.encoder for name in row.names(sizes)]
    assert {"final_norm.weight", "final_norm.bias"} <= set(names)
    assert not any(name.startswith("model.") for name in names)


def test_a_longer_table_is_cut_where_it_is_saved(tmp_path):
    published = load(tmp_path / "m", KINDS[0])
    config = published.config.with_vocab_size(24)
    params = params_of(published)
    table = params["encoder"]["token_embed"]["embedding"]
    params["encoder"]["token_embed"]["embedding"] = jnp.pad(table, ((0, 8), (0, 0)))
    params["head"]["bias"] = jnp.pad(params["head"]["bias"], (0, 8))
    tensors = huggingface.to_huggingface(params, config)
    jax.tree.map(np.testing.assert_array_equal, tensors, golden(KINDS[0])[1])


HEADS = {
    "SequenceClassification": ClassificationHead,
    "MultipleChoice": ClassificationHead,
    "TokenClassification": TokenHead,
    "QuestionAnswering": TokenHead,
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("task", HEADS)
@both
def test_transformers_opens_every_head_and_agrees(kind, task, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    published, arrays = load(tmp_path / "m", kind), golden(kind)[2]
    config = published.config
    assert published.lm_head is not None
    rng, size = np.random.default_rng(0), {"MultipleChoice": 1, "QuestionAnswering": 2}.get(task, 3)
    last = {"kernel": rng.normal(size=(8, size)), "bias": rng.normal(size=size)}
    shared = {name: published.lm_head[name] for name in ("transform", "norm")}
    head = shared | {"classifier": {name: np.float32(x) for name, x in last.items()}}
    pooled = HEADS[task] is ClassificationHead
    labels = tuple("abc") if size == 3 else ()
    said = TaskHead(task=task, labels=labels, pooling=config.pooling if pooled else None)
    params = {"encoder": published.params["encoder"], "head": head}
    saved = tmp_path / "saved"
    huggingface.save(saved, params, config, published.tokenizer, task_head=said)
    auto = getattr(transformers, f"AutoModelFor{task}")
    model, info = auto.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == f"ModernBertFor{task}"
    if labels:
        assert model.config.label2id == {"a": 0, "b": 1, "c": 2}

    pool = {"pool": POOLS[config.pooling]} if pooled else {}
    ours = WithHead(config.make(), HEADS[task](size, transform=config.make_transform(), **pool))
    tokens, real = arrays["tokens"], arrays["real/right"]
    given = np.int32(tokens), np.int32(real) - 1
    found = jax.jit(lambda p, t, s: ours.apply({"params": p}, t, segment_ids=s))(params, *given)
    rows = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real).long()}
    if task == "MultipleChoice":
        rows = {name: x[None] for name, x in rows.items()}
    with torch.no_grad():
        answer = model.eval()(**rows)
    if task == "QuestionAnswering":
        theirs = torch.stack([answer.start_logits, answer.end_logits], -1).numpy()
    else:
        theirs = answer.logits.numpy().reshape(np.shape(found))
    chosen = ... if pooled else real
    np.testing.assert_allclose(np.asarray(found)[chosen], theirs[chosen], rtol=0, atol=1e-4)
    again = huggingface.load(saved)  # it is a base, too
    assert again.lm_head is not None
    jax.tree.map(np.testing.assert_array_equal, again.lm_head, shared)


@pytest.mark.filterwarnings("default")
@both
def test_transformers_opens_the_language_model(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    published, arrays = load(tmp_path / "m", kind), golden(kind)[2]
    saved = tmp_path / "saved"
    huggingface.save(saved, params_of(published), published.config, published.tokenizer)
    auto = transformers.AutoModelForMaskedLM
    model, info = auto.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model.eval()(torch.tensor(arrays["packed"][:, :80])).logits
    np.testing.assert_allclose(logits, arrays["logits/alone"][:, :80], rtol=0, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(saved)
    assert (words.cls_token_id, words.sep_token_id, words.mask_token_id) == (1, 2, 3)


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_equals_transformers_whatever_the_flags(seed, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make = runpy.run_path(str(GOLDEN / "make_modernbert_golden.py"))
    rng, (names, values) = np.random.default_rng(seed), zip(*make["FLAGS"].items(), strict=True)
    torch.manual_seed(seed)
    flags = {name: value for name, value in zip(names, values, strict=True) if rng.random() < 0.7}
    flags |= {"num_hidden_layers": int(rng.integers(1, 6)), "local_attention": 2 * (seed + 1)}
    config = transformers.ModernBertConfig(**make["SIZES"] | flags)
    make["write"](tmp_path / "random.safetensors", config)
    published = load(tmp_path / "m", "random", folder=tmp_path)
    check_equal(published, *golden("random", tmp_path)[1:], atol=1e-4)
