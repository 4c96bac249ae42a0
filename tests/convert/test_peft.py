"""Adapters in PEFT's format against PEFT itself, which is not installed everywhere."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from jaxlm import tree
from jaxlm.convert import huggingface, peft_load, peft_save, table, task_model
from jaxlm.convert.peft_save import Adapter
from jaxlm.models.heads import (
    ClassificationHead,
    EmbeddingHead,
    EncoderDecoderLm,
    TokenHead,
    WithHead,
    WithLmHead,
    as_it_is,
)
from jaxlm.models.model import example_inputs, has_transform
from jaxlm.models.pooling import POOLS
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import tuning as tunings
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig, init_at
from jaxlm.sharding import MeshConfig, make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("default", "error::UserWarning")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MORE = {"intermediate_size": 24, "max_position_embeddings": 20}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
T5 = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24}
BASES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, **MORE)),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SIZES, **MORE, pad_token_id=1)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **GPT2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            scale_attn_by_inverse_layer_idx=True,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, **MORE, num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=False
        )
    ),
    "llama encoder": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(**SIZES, **MORE, num_key_value_heads=1, pad_token_id=0)
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **SIZES, **MORE, local_attention=4, classifier_pooling="mean", pad_token_id=0
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)
    ),
}
TOKENS = np.random.default_rng(0).integers(2, 40, (3, 9))
KERNELS = (r"(query|value|out)/kernel", r"mlp/down/kernel")
EMBED = r"(token|position)_embed/embedding"
# architecture, kind of model, tuning
CASES = {
    "lora": ("bert", "SequenceClassification", LoraConfig(targets=KERNELS, rank=3, alpha=5.0)),
    "ranks": (
        "bert",
        "TokenClassification",
        LoraConfig(targets=(*KERNELS, r"mlp/up/kernel"), ranks=(2, 4, 4), scaling="rslora"),
    ),
    "dora": ("bert", "QuestionAnswering", LoraConfig(targets=KERNELS, rank=2, kind="dora")),
    "ia3": ("bert", "MultipleChoice", Ia3Config()),
    "pissa": ("bert", "SequenceClassification", LoraConfig(rank=2, init="pissa")),
    "biases": ("bert", "TokenClassification", LoraConfig(rank=2, bias="all")),
    "biases beside": ("bert", "TokenClassification", LoraConfig(rank=2, bias="lora_only")),
    "tables": ("bert", "FeatureExtraction", LoraConfig(targets=(EMBED, *KERNELS), rank=2)),
    "tables dora": ("bert", "FeatureExtraction", LoraConfig(targets=(EMBED,), rank=2, kind="dora")),
    "roberta": ("roberta", "SequenceClassification", LoraConfig(targets=(EMBED, *KERNELS))),
    "roberta ia3": ("roberta", "TokenClassification", Ia3Config()),
    "gpt2": ("gpt2", "CausalLM", LoraConfig(targets=(*KERNELS, "mlp/up/kernel"), rank=2)),
    "gpt2 ranks": (
        "gpt2",
        "TokenClassification",
        LoraConfig(targets=("query/kernel", "value/kernel"), ranks=(2, 3), bias="lora_only"),
    ),
    "gpt2 dora": ("gpt2", "SequenceClassification", LoraConfig(rank=2, kind="dora")),
    "gpt2 pissa": ("gpt2", "QuestionAnswering", LoraConfig(rank=2, init="pissa", scaling="rslora")),
    "gpt2 ia3": ("gpt2", "CausalLM", Ia3Config()),
    "llama": ("llama", "CausalLM", LoraConfig(targets=(*KERNELS, "(gate|up)/kernel"), rank=3)),
    "llama dora": ("llama", "TokenClassification", LoraConfig(rank=2, kind="dora")),
    "llama tags": ("llama", "TokenClassification", Ia3Config()),
    "llama classes": ("llama", "SequenceClassification", LoraConfig(rank=2)),
    "llama answers": ("llama encoder", "QuestionAnswering", LoraConfig(rank=2)),
    "modernbert": (
        "modernbert",
        "SequenceClassification",
        LoraConfig(targets=(*KERNELS, "mlp/(gate|up)/kernel"), rank=3),
    ),
    "modernbert dora": ("modernbert", "TokenClassification", LoraConfig(rank=2, kind="dora")),
    "modernbert ia3": ("modernbert", "QuestionAnswering", Ia3Config()),
    "t5": ("t5", "Seq2SeqLM", LoraConfig(targets=(*KERNELS, "mlp/up/kernel"), rank=2)),
    "t5 ia3": ("t5", "Seq2SeqLM", Ia3Config()),
}
QUICK = ("lora", "gpt2 ranks", "gpt2")  # of either kind


def each(cases):
    slow = pytest.mark.slow
    names = [pytest.param(name, marks=() if name in QUICK else slow) for name in cases]
    return pytest.mark.parametrize("name", names)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of an architecture's base."""

    @cache
    def make(name):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = BASES[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
        return folder

    return make


def make_ours(folder, kind):
    """The module, the base's parameters with a new head, and a call of both on the tokens."""
    config, params = huggingface.place(folder, make_mesh(MeshConfig(), jax.devices()[:1]))
    config = config.with_dropout(0.0)
    encoder = config.make()
    transform = config.make_transform() if has_transform(config) else None
    match kind:
        case "SequenceClassification" | "MultipleChoice":
            pooling = config.pooling if has_transform(config) else "bert"
            pool = POOLS["last" if config.is_causal else pooling]
            size = 1 if kind == "MultipleChoice" else 3
            module = WithHead(encoder, ClassificationHead(size, 0.0, pool, transform=transform))
        case "TokenClassification" | "QuestionAnswering":
            size = 3 if kind == "TokenClassification" else 2
            module = WithHead(encoder, TokenHead(size, 0.0, transform=transform))
        case "FeatureExtraction":
            module = WithHead(encoder, EmbeddingHead(POOLS["mean"], as_it_is))
        case "CausalLM":
            module = WithLmHead(encoder, config.make_lm_head().clone(name="lm_head"))
        case "Seq2SeqLM":
            module = EncoderDecoderLm(encoder, config.make_lm_head().clone(name="lm_head"))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    inputs = (tokens, tokens) if kind == "Seq2SeqLM" else (tokens,)
    new = module.init(jax.random.key(1), *example_inputs(config))["params"]
    merged = {**new, "encoder": params["encoder"]}
    given = params.get("head", {})
    known = {"pooler", "transform", "norm"} & new.get("head", {}).keys()
    if known:
        merged["head"] = {**new["head"], **{name: given[name] for name in known}}
    if "lm_head" in new:
        merged["lm_head"] = given
    return module, merged, lambda apply: lambda variables: apply(variables, *inputs)


def moved(trainable, seed=0):
    """As if it had been trained."""
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        return leaf + np.float32(0.1) * rng.standard_normal(leaf.shape).astype(np.float32)

    return tree.map_with_path(move, trainable)


def make_theirs(folder, kind):
    auto = "AutoModel" if kind == "FeatureExtraction" else f"AutoModelFor{kind}"
    labels = {"SequenceClassification": 3, "TokenClassification": 3}.get(kind)
    torch.manual_seed(1)
    more = {} if labels is None else {"num_labels": labels}
    return getattr(transformers, auto).from_pretrained(folder, **more).eval()


def outputs(model, kind):
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        match kind:
            case "MultipleChoice":
                return model(input_ids=tokens[:, None]).logits.numpy()
            case "QuestionAnswering":
                found = model(input_ids=tokens)
                return torch.stack([found.start_logits, found.end_logits], -1).numpy()
            case "FeatureExtraction":
                return model(input_ids=tokens).last_hidden_state.mean(1).numpy()
            case "Seq2SeqLM":
                return model(input_ids=tokens, decoder_input_ids=tokens).logits.numpy()
            case _:
                return model(input_ids=tokens).logits.numpy()


def trained(name, base):
    architecture, kind, tuning = CASES[name]
    module, params, call = make_ours(base(architecture), kind)
    trainable, frozen = tunings.prepare(tuning, jax.random.key(0), params, call(module.apply))
    trainable = moved(trainable)
    classifier = trainable.get("params", {}).get("head", {}).get("classifier", {})
    if kind == "SequenceClassification" and architecture in ("gpt2", "llama"):
        classifier["bias"] = jnp.zeros(3)
    variables = {
        key: merged_trees(frozen.get(key, {}), trainable.get(key, {}))
        for key in {**frozen, **trainable}
    }
    return kind, tuning, params, trainable, variables, module, call


def merged_trees(one, other):
    """Nested dicts as one, with the leaves of the second where both have any."""
    flat = {**dict(tree.leaves_with_path(one)), **dict(tree.leaves_with_path(other))}
    return unflatten_dict(flat, sep="/")


def start_of(tuning, params, call, module):
    if getattr(tuning, "init", "") != "pissa":
        return None
    sites = find_sites(call(module.apply), {"params": params})
    return init_at(jax.random.key(0), params, sites.only(lambda p: "head" not in p), tuning)


def export(path, name, base):
    kind, tuning, params, trainable, variables, module, call = trained(name, base)
    folder = base(CASES[name][0])
    model = task_model.read(folder, kind, num_labels=3)
    if kind in ("QuestionAnswering", "MultipleChoice"):
        model = replace(model, sizes={**model.sizes, "labels": 2 if "Q" in kind else 1})
    collection = trainable["ia3" if isinstance(tuning, Ia3Config) else "lora"]
    adapter = Adapter(tuning=tuning, collection=collection, saved=trainable.get("params", {}))
    start = start_of(tuning, params, call, module)
    full = {**params, **variables["params"]}
    peft_save.save(path, adapter, full, model, str(folder), start=start)
    ours = call(tunings.adapt(tuning, module.apply))(variables)
    return ours, model, adapter, params, {**variables, "params": full}, module, call


@each(CASES)
def test_what_is_trained_here_is_the_same_there(name, base, tmp_path):
    ours, model, adapter, params, variables, module, call = export(tmp_path, name, base)
    kind = model.kind
    theirs = make_theirs(base(CASES[name][0]), kind)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()  # without a UserWarning
    found = outputs(adapted, kind)
    np.testing.assert_allclose(
        np.asarray(ours).reshape(found.shape), found, atol=1e-5 * max(1, np.abs(found).max())
    )
    without = call(module.apply)({"params": variables["params"]})
    assert np.abs(without - ours).max() > 1e-3
    # Merged in either place.
    merged = tunings.merge(adapter.tuning, variables, call(module.apply))
    there = adapted.merge_and_unload().state_dict()
    flat = dict(tree.leaves_with_path(merged))
    for row in model.encoder:
        same = [r for r in model.encoder if r.theirs == row.theirs]
        if any(r.factors for r in same):
            continue
        written = table.write(
            same, unflatten_dict({r.ours: flat[r.ours] for r in same}, sep="/"), model.sizes
        )
        for key, value in written.items():
            want = there[key].numpy()[row.unused :] if row.unused else there[key].numpy()
            np.testing.assert_allclose(value[row.unused :], want, atol=2e-5)

    # And back. (A DoRA of parts has factors of all, and PiSSA is a plain LoRA there.)
    again = peft_load.load(tmp_path, params, model)
    if "pissa" not in name and name not in ("gpt2 dora", "modernbert dora"):
        assert_same(again.collection, adapter.collection)
    assert_same(again.saved, adapter.saved)


def assert_same(found, expected):
    found, expected = (dict(tree.leaves_with_path(x)) for x in (found, expected))
    for path, leaf in expected.items():
        if path != "head/classifier/bias" or leaf.any():  # those of zeros are not written
            np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=path)


MADE = {
    "modernbert": (
        "modernbert",
        "TokenClassification",
        dict(target_modules=["Wqkv", "Wo", "Wi"], r=2),
    ),
    "lora": (
        "bert",
        "SequenceClassification",
        dict(target_modules=["query", "value"], r=4, lora_alpha=6, modules_to_save=["pooler"]),
    ),
    "patterns": (
        "bert",
        "TokenClassification",
        dict(
            target_modules=["query", "value", "output.dense"],
            exclude_modules=["attention.output.dense"],
            r=4,
            rank_pattern={"layer.1.attention.self.query": 2, "value": 3},
            alpha_pattern={"layer.0.*.value": 5},
            use_rslora=True,
        ),
    ),
    "layers": (
        "bert",
        "QuestionAnswering",
        dict(target_modules=["query", "key"], layers_to_transform=[1], r=2, use_dora=True),
    ),
    "bias": (
        "bert",
        "TokenClassification",
        dict(target_modules=["query", "dense"], r=2, bias="all"),
    ),
    "lora_only": (
        "bert",
        "TokenClassification",
        dict(target_modules=r".*\.(query|key)", r=2, bias="lora_only"),
    ),
    "roberta": (
        "roberta",
        "SequenceClassification",
        dict(target_modules=["word_embeddings", "query"], r=2),
    ),
    "gpt2": (
        "gpt2",
        "CausalLM",
        dict(target_modules=["c_attn", "mlp.c_proj"], r=2, fan_in_fan_out=True, use_dora=True),
    ),
    "gpt2 bias": (
        "gpt2",
        "TokenClassification",
        dict(target_modules=["c_attn"], r=2, fan_in_fan_out=True, bias="lora_only"),
    ),
    "llama": ("llama", "SequenceClassification", dict(target_modules="all-linear", r=2)),
    "llama answers": ("llama encoder", "QuestionAnswering", dict(target_modules=["v_proj"], r=2)),
    "t5": ("t5", "Seq2SeqLM", dict(target_modules=["q", "v", "wi", "wo"], r=2)),
    "ia3": (
        "bert",
        "SequenceClassification",
        dict(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            modules_to_save=["pooler"],
        ),
    ),
    "gpt2 ia3": (
        "gpt2",
        "CausalLM",
        dict(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
}


@each(MADE)
def test_what_peft_has_made_is_the_same_here(name, base, tmp_path):
    architecture, kind, settings = MADE[name]
    folder = base(architecture)
    config = peft.IA3Config if "ia3" in name else peft.LoraConfig
    theirs = peft.get_peft_model(
        make_theirs(folder, kind), config(task_type=peft_save.TASK_TYPES[kind], **settings)
    ).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    expected = outputs(theirs, kind)
    theirs.save_pretrained(tmp_path)
    module, params, call = make_ours(folder, kind)
    size = peft_load.num_labels(tmp_path, task_model.read(folder, kind))
    model = task_model.read(folder, kind, num_labels=size)
    adapter = peft_load.load(tmp_path, params, model)
    trainable, _ = tunings.prepare(adapter.tuning, jax.random.key(0), params, call(module.apply))
    own = "ia3" if isinstance(adapter.tuning, Ia3Config) else "lora"
    given = jax.tree.map(jnp.asarray, {own: adapter.collection, "params": adapter.saved})
    shapes = lambda x: {p: leaf.shape for p, leaf in tree.leaves_with_path(x)}
    assert shapes(given).items() <= shapes(trainable).items()
    assert shapes(given[own]) == shapes(trainable[own])
    variables = {own: given[own], "params": merged_trees(params, given["params"])}
    if kind == "SequenceClassification" and architecture == "llama":
        variables["params"]["head"]["classifier"]["bias"] *= 0
    ours = np.asarray(call(tunings.adapt(adapter.tuning, module.apply))(variables))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, np.abs(expected).max()))
    before = np.asarray(call(module.apply)({"params": variables["params"]}))
    assert np.abs(before - expected).max() > 1e-2
    # Written again, it is the same.
    out = tmp_path / "again"
    again = Adapter(tuning=adapter.tuning, collection=given[own], saved=given["params"])
    peft_save.save(out, again, variables["params"], model, str(folder))
    adapted = peft.PeftModel.from_pretrained(make_theirs(folder, kind), out).eval()
    np.testing.assert_allclose(
        outputs(adapted, kind), expected, atol=1e-5 * max(1, np.abs(expected).max())
    )
