"""Adapters in PEFT's format without PEFT: names, shapes, the way back, and what is refused."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file
from tiny_models import BERT

from jaxlm import tree
from jaxlm.convert import bert, gpt2, llama, peft_load, peft_save, t5, task_model, xlnet
from jaxlm.convert.peft_save import CONFIG, ROOT, WEIGHTS, Adapter
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import ClassificationHead, EncoderDecoderLm, TokenHead, WithHead, WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import example_inputs
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import ia3, lora, tuning
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.sharding import MeshConfig, make_mesh, tree_shardings

SIZES = {"vocab_size": 32, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24}
T5 = T5Config(**SIZES, head_dim=8)
MODELS = {
    "bert": (BERT, "SequenceClassification", lambda c: bert.write_config(c)),
    "gpt2": (Gpt2Config(**SIZES, max_length=8), "CausalLM", gpt2.write_config),
    "llama": (LlamaConfig(**SIZES, max_length=8), "TokenClassification", llama.write_config),
    "t5": (T5, "Seq2SeqLM", lambda c: t5.write_config(c, 0)),
    "xlnet": (XlnetConfig(**SIZES), "TokenClassification", xlnet.write_config),
}


class Made:
    """A model of random parameters, its base's folder and what PEFT would call its parts."""

    def __init__(self, name, folder):
        self.config, self.kind, write_config = MODELS[name]
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(write_config(self.config)))
        encoder = self.config.make()
        match self.kind:
            case "SequenceClassification":
                module = WithHead(encoder, ClassificationHead(3))
            case "TokenClassification":
                module = WithHead(encoder, TokenHead(3))
            case _:
                join = WithLmHead if self.kind == "CausalLM" else EncoderDecoderLm
                module = join(encoder, self.config.make_lm_head().clone(name="lm_head"))
        inputs = example_inputs(self.config)
        self.call = lambda variables: module.apply(variables, *inputs)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        rng = np.random.default_rng(0)
        draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        self.params = jax.tree.map(draw, shapes)
        self.folder = folder
        self.model = task_model.read(folder, self.kind, num_labels=3)

    def adapter(self, config, seed=1):
        sites = find_sites(self.call, {"params": self.params})
        if isinstance(config, Ia3Config):
            collection = ia3.init_at(self.params, sites, config)
        else:
            body = sites.only(lambda path: not path.startswith("head"))
            below = {name: leaf for name, leaf in self.params.items() if name != "head"}
            collection = lora.init_at(jax.random.key(0), below, body, config)
        rng = np.random.default_rng(seed)
        collection = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), collection
        )
        flat = dict(tree.leaves_with_path(self.params))
        learned = {p: x for p, x in flat.items() if tuning.learns(config, f"params/{p}")}
        return Adapter(tuning=config, collection=collection, saved=unflatten_dict(learned, sep="/"))

    def save(self, path, config):
        adapter = self.adapter(config)
        peft_save.save(path, adapter, self.params, self.model, str(self.folder))
        tensors = {n.removeprefix(ROOT): x for n, x in load_file(path / WEIGHTS).items()}
        return adapter, tensors, json.loads((path / CONFIG).read_text())


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made = {}

    def one(name):
        if name not in made:
            made[name] = Made(name, tmp_path_factory.mktemp("bases") / name)
        return made[name]

    return one


def test_names_and_shapes_of_lora(make, tmp_path):
    config = LoraConfig(
        targets=("query/kernel", r"mlp/down/kernel", r"token_embed/embedding"), ranks=(2, 3, 2)
    )
    _, tensors, settings = make("bert").save(tmp_path, config)
    layer = "bert.encoder.layer"
    expected = {
        "bert.embeddings.word_embeddings.lora_embedding_A": (2, 32),
        "bert.embeddings.word_embeddings.lora_embedding_B": (16, 2),
        "bert.pooler.dense.weight": (16, 16),
        "bert.pooler.dense.bias": (16,),
        "classifier.weight": (3, 16),
        "classifier.bias": (3,),
    }
    for i in (0, 1):
        expected |= {
            f"{layer}.{i}.attention.self.query.lora_A.weight": (2, 16),
            f"{layer}.{i}.attention.self.query.lora_B.weight": (16, 2),
            f"{layer}.{i}.output.dense.lora_A.weight": (3, 24),
            f"{layer}.{i}.output.dense.lora_B.weight": (16, 3),
        }
    assert {name: x.shape for name, x in tensors.items()} == expected
    down = r"bert\.encoder\.layer\.\d+\.output\.dense"
    assert settings["rank_pattern"] == {down: 3}
    assert settings["alpha_pattern"] == {}
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (2, 16, "SEQ_CLS")
    assert settings["modules_to_save"] == ["classifier", "pooler.dense"]
    # "output.dense" as a suffix would be attention's, too.
    assert down in settings["target_modules"].split("|")


def test_gpt2s_one_map_is_all_three_of_ours(make, tmp_path):
    config = LoraConfig(targets=("query/kernel", "value/kernel"), ranks=(2, 3), alpha=6.0)
    adapter, tensors, settings = make("gpt2").save(tmp_path, config)
    module = "transformer.h.1.attn.c_attn"
    a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    assert (a.shape, b.shape) == ((5, 16), (48, 5))
    scale = settings["lora_alpha"] / settings["r"]
    delta = scale * (b @ a).T  # [inputs, outputs]
    found = adapter.collection["encoder"]["layers"]["attention"]
    for part, (name, factor) in enumerate((("query", 3.0), ("key", 0.0), ("value", 2.0))):
        wanted = np.zeros((16, 16), np.float32)
        if factor:
            one = found[name]
            wanted = factor * np.asarray(one["a"][1] @ one["b"][1].reshape(one["a"].shape[-1], -1))
        np.testing.assert_allclose(delta[:, part * 16 : part * 16 + 16], wanted, atol=1e-4)
    assert settings["fan_in_fan_out"] is True


def test_names_and_shapes_of_ia3(make, tmp_path):
    _, tensors, settings = make("t5").save(tmp_path, Ia3Config())
    shapes = {name: x.shape for name, x in tensors.items()}
    block = "decoder.block.1.layer"
    assert shapes[f"{block}.1.EncDecAttention.k.ia3_l"] == (16, 1)
    assert shapes[f"{block}.2.DenseReluDense.wo.ia3_l"] == (1, 24)
    assert len(shapes) == 2 * 3 + 2 * 5
    assert settings["peft_type"] == "IA3"
    assert "wo" in settings["feedforward_modules"]


def test_names_and_shapes_of_biases_of_queries(make, tmp_path):
    config = LoraConfig(targets=(r"mlp/up/kernel",), rank=2, bias="all")
    _, tensors, settings = make("xlnet").save(tmp_path, config)
    assert settings["bias"] == "all"
    for name in ("r_w_bias", "r_r_bias", "r_s_bias"):  # as PEFT has them, which takes "bias" in all
        for layer in (0, 1):
            assert tensors[f"transformer.layer.{layer}.rel_attn.{name}"].shape == (2, 8)


def test_a_trained_table_of_biases_is_refused(make, tmp_path):
    """PEFT trains T5's with bias="all", by its name."""
    made, name = make("t5"), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    made.save(tmp_path, LoraConfig(rank=2, bias="all"))
    tensors = load_file(tmp_path / WEIGHTS)
    table = made.params["encoder"]["encoder_bias"]["relative_embed"]["embedding"]
    save_file({**tensors, ROOT + name: np.asarray(table)}, tmp_path / WEIGHTS)
    peft_load.load(tmp_path, made.params, made.model)  # as it was
    save_file({**tensors, ROOT + name: np.asarray(table + 1)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"relative_attention_bias\.weight, trained as a whole"):
        peft_load.load(tmp_path, made.params, made.model)


BACK = {
    "bert": LoraConfig(targets=(r"(query|out)/kernel", r"mlp/up/kernel"), ranks=(2, 3)),
    "bert dora": LoraConfig(rank=3, kind="dora", scaling="rslora"),
    "bert biases": LoraConfig(rank=2, bias="all"),
    "bert ia3": Ia3Config(),
    "gpt2": LoraConfig(targets=(r"(query|value|out)/kernel",), rank=2),
    "gpt2 dora": LoraConfig(targets=(r"(query|key|value)/kernel",), rank=2, kind="dora"),
    "gpt2 ia3": Ia3Config(),
    "llama": LoraConfig(targets=(r"(query|gate|down)/kernel",), rank=4, alpha=7.0),
    "t5": LoraConfig(targets=(r"query/kernel", r"cross_attention/value/kernel"), rank=2),
    "xlnet biases": LoraConfig(targets=(r"mlp/(up|down)/kernel",), rank=2, bias="all"),
}


@pytest.mark.parametrize("name", BACK)
def test_there_and_back(name, make, tmp_path):
    made = make(name.split()[0])
    adapter, tensors, _ = made.save(tmp_path / "one", BACK[name])
    back = peft_load.load(tmp_path / "one", made.params, made.model)
    for part in ("collection", "saved"):
        found, wanted = (dict(tree.leaves_with_path(getattr(x, part))) for x in (back, adapter))
        if name == "gpt2 dora":  # their factors are one, with blocks of zeros
            found = {p: x for p, x in found.items() if p.endswith("magnitude")}
            wanted = {p: x for p, x in wanted.items() if p.endswith("magnitude")}
        assert found.keys() == wanted.keys()
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    peft_save.save(tmp_path / "two", back, made.params, made.model, "base")
    again = {n.removeprefix(ROOT): x for n, x in load_file(tmp_path / "two" / WEIGHTS).items()}
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)


def test_from_a_mesh(make, tmp_path):
    made, config = make("bert"), LoraConfig(targets=(r"(query|value)/kernel",), rank=4)
    adapter, tensors, _ = made.save(tmp_path / "one", config)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    places = tree_shardings({"lora": adapter.collection}, mesh)["lora"]
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(places))
    sharded = replace(adapter, collection=jax.device_put(adapter.collection, places))
    peft_save.save(tmp_path / "two", sharded, made.params, made.model, "base")
    again = load_file(tmp_path / "two" / WEIGHTS)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[ROOT + key], tensor, err_msg=key)


def test_the_pickle_is_not_read(make, tmp_path):
    made = make("bert")
    made.save(tmp_path, LoraConfig(rank=2))
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin, which could run any code"):
        peft_load.load(tmp_path, made.params, made.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
        ({"use_qalora": True}, "use_qalora=true changes what is computed"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"arrow_config": {"k": 1}}, "arrow_config="),
        ({"kasa_config": {"beta": 1}}, "kasa_config="),
        ({"lora_bias": True}, "lora_bias=true"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices="),
        ({"a_key_of_next_year": 1}, "a_key_of_next_year=1"),
        ({"init_lora_weights": "pissa_niter_4"}, "stands for a base that was changed"),
        ({"r": 4}, "has the rank 2, but adapter_config.json says 4"),
        ({"target_modules": ["query"]}, "adapts .*value, which target_modules .* do not name"),
        ({"target_modules": ["query", "value", "key"]}, "has no adapter for .*key"),
        ({"bias": "some"}, "bias='some' is not supported"),
        (
            {"target_modules": 5},
            "adapter_config.json: target_modules=5 is not a pattern, or a list",
        ),
        ({"modules_to_save": [5]}, r"modules_to_save=\[5\] is not a pattern"),
        ({"exclude_modules": "("}, r"exclude_modules='\(' is not a pattern"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all' is not a number"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern=.* is not an object of whole numbers"),
        ({"alpha_pattern": {"query": math.nan}}, "alpha_pattern=.* is not an object of finite"),
        ({"lora_alpha": math.nan}, "adapter_config.json: lora_alpha=nan is not a finite number"),
        ({"lora_dropout": math.inf}, "lora_dropout=inf is not a finite number"),
    ],
)
def test_what_is_refused_by_name(changes, message, make, tmp_path):
    made = make("bert")
    _, _, settings = made.save(tmp_path, LoraConfig(rank=2))
    peft_load.load(tmp_path, made.params, made.model)  # the control
    (tmp_path / CONFIG).write_text(json.dumps(settings | changes))
    with pytest.raises(InputError, match=message):
        peft_load.load(tmp_path, made.params, made.model)


def test_an_adapter_of_another_base(make, tmp_path):
    made = make("bert")
    made.save(tmp_path, LoraConfig(rank=2))
    with pytest.raises(InputError, match=r"adapts bert\..*query, which this base has not"):
        peft_load.load(tmp_path, make("llama").params, make("llama").model)
    wider = {**made.model.sizes, "embed": 32, "head_dim": 16}
    with pytest.raises(InputError, match=r"has the shape \(2, 16\), where the base has \(2, 32\)"):
        peft_load.load(tmp_path, made.params, replace(made.model, sizes=wider))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.encoder.layer.0.output.dense.weight", "trained as a whole, which is frozen here"),
        ("bert.encoder.layer.7.output.dense.weight", "which has no place"),
        ("prompt_embeddings", "which has no place"),
    ],
)
def test_what_else_is_in_the_file(name, message, make, tmp_path):
    made = make("bert")
    made.save(tmp_path, LoraConfig(rank=2))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, ROOT + name: np.ones((16, 24), np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        peft_load.load(tmp_path, made.params, made.model)


def test_what_peft_has_not(make, tmp_path):
    made = make("gpt2")
    config = LoraConfig(targets=(r"token_embed/embedding",), rank=2)
    with pytest.raises(InputError, match="also scores the vocabulary"):
        made.save(tmp_path / "table", config)
    with pytest.raises(InputError, match=r"parts of .*c_attn have different scales"):
        made.save(tmp_path / "ia3", Ia3Config(outputs=(), inputs=(r"(query|key)/kernel",)))
    with pytest.raises(InputError, match="pooling=mean is not what AutoModelForSequence"):
        task_model.read(make("bert").folder, "SequenceClassification", "mean")
    with pytest.raises(InputError, match="no AutoModelForMultipleChoice of a gpt2"):
        task_model.read(made.folder, "MultipleChoice")


def test_what_peft_has_and_one_table_here_has_not(make, tmp_path):
    """Values that would be others, without a word."""
    made, config = make("gpt2"), LoraConfig(targets=(r"token_embed/embedding",), rank=2)
    untied = replace(made.model, scoring=frozenset())
    peft_save.save(tmp_path / "tied", made.adapter(config), made.params, untied, "base")
    peft_load.load(tmp_path / "tied", made.params, untied)  # the control
    with pytest.raises(InputError, match=r"wte has an adapter and also scores the vocabulary"):
        peft_load.load(tmp_path / "tied", made.params, made.model)
    made = make("bert")
    config = LoraConfig(targets=(r"position_embed/embedding",), rank=2, kind="dora")
    made.save(tmp_path / "dora", config)
    rows = (replace(row, unused=2 * ("position" in row.ours)) for row in made.model.encoder)
    with pytest.raises(InputError, match=r"position_embeddings has 2 rows there .*DoRA"):
        peft_load.load(tmp_path / "dora", made.params, replace(made.model, encoder=tuple(rows)))


@pytest.mark.parametrize(
    ("saved", "tensor", "kind", "is_read"),
    [
        ("LlamaForCausalLM", "model.norm.weight", "QuestionAnswering", False),
        ("LlamaForCausalLM", "model.norm.weight", "TokenClassification", True),
        ("LlamaModel", "norm.weight", "QuestionAnswering", True),
        ("LlamaForQuestionAnswering", "transformer.norm.weight", "QuestionAnswering", True),
        ("LlamaForQuestionAnswering", "transformer.norm.weight", "CausalLM", False),
    ],
)
def test_llamas_class_for_questions_has_another_name_for_it(saved, tensor, kind, is_read, tmp_path):
    written = llama.write_config(MODELS["llama"][0]) | {"architectures": [saved]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file({tensor: np.ones(16, np.float32)}, tmp_path / "model.safetensors")
    model = task_model.read(tmp_path, kind)
    begins = "transformer." if kind == "QuestionAnswering" else "model."
    assert all(row.theirs.startswith((begins, "lm_head.")) for row in model.encoder)
    if is_read:
        task_model.check_base(tmp_path, model, "it")
        return
    with pytest.raises(
        InputError, match=rf"AutoModelFor{kind} finds no encoder in it, .*merge_lora"
    ):
        task_model.check_base(tmp_path, model, "it")
