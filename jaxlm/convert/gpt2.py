"""GPT-2 in Hugging Face's names: the tables, and what ``config.json`` means.

Linear maps are stored there as matrices [inputs, outputs], unlike those of all other models, and
query, key and value as one. Scores are divided there by other numbers, if the configuration says
so; here the query's kernel and bias are, which is the same model.
"""

from collections.abc import Mapping
from typing import Any

from jaxlm.convert.architecture import (
    ACTIVATIONS,
    NUMBER,
    Architecture,
    Fields,
    published_activation,
)
from jaxlm.convert.table import LAST, Row, Sizes, linear, norm, without_bias
from jaxlm.models.gpt2 import Gpt2Config


def _linear(theirs: str, ours: str, axes: str, part: int = 0, parts: int = 1) -> tuple[Row, Row]:
    inputs, outputs = axes.split(" -> ")
    kernel = f"({inputs}) ({outputs}) -> {inputs} {outputs}"
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", kernel, part=part, parts=parts),
        Row(f"{theirs}.bias", f"{ours}/bias", f"({outputs}) -> {outputs}", part=part, parts=parts),
    )


def architecture(*, tied: bool, query_factors: tuple[float, ...] | None = None) -> Architecture:
    """The tables. The query of each layer is multiplied by its factor when it is read."""
    layer, ours = "transformer.h.{layer}", "encoder/layers"
    query, key, value = (
        _linear(
            f"{layer}.attn.c_attn", f"{ours}/attention/{name}", "embed -> heads head_dim", part, 3
        )
        for part, name in enumerate(("query", "key", "value"))
    )
    query = tuple(row.times(query_factors) for row in query)
    table = "transformer.wte.weight"
    unembed = Row("lm_head.weight", "head/unembed/kernel", "vocab embed -> embed vocab")
    positions = "positions embed -> positions embed"
    return Architecture(
        class_name="GPT2",
        prefix="transformer.",
        encoder=(
            Row(table, "encoder/token_embed/embedding", "vocab embed -> vocab embed"),
            Row("transformer.wpe.weight", "encoder/position_embed/embedding", positions),
            *norm(f"{layer}.ln_1", f"{ours}/attention_norm"),
            *query,
            *key,
            *value,
            *_linear(f"{layer}.attn.c_proj", f"{ours}/attention/out", "heads head_dim -> embed"),
            *norm(f"{layer}.ln_2", f"{ours}/mlp_norm"),
            *_linear(f"{layer}.mlp.c_fc", f"{ours}/mlp/up", "embed -> mlp"),
            *_linear(f"{layer}.mlp.c_proj", f"{ours}/mlp/down", "mlp -> embed"),
            *norm("transformer.ln_f", "encoder/final_norm"),
        ),
        heads=() if tied else ((unembed,),),
        copies={"lm_head.weight": table} if tied else {},
        ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)$",
        task_heads={
            "SequenceClassification": without_bias("score"),
            "TokenClassification": linear("classifier", *LAST),
            "QuestionAnswering": linear("qa_outputs", *LAST),
        },
        poolings=("last",),
        untied="set tie_word_embeddings to false in config.json if that head is meant",
    )


def sizes(config: Gpt2Config) -> Sizes:
    """Size of each axis that the tables name."""
    assert config.vocab_size is not None
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "positions": config.max_length,
        "embed": config.hidden_dim,
        "heads": config.num_heads,
        "head_dim": config.hidden_dim // config.num_heads,
        "mlp": config.mlp_dim,
    }


def read_config(raw: Mapping[str, Any], source: str) -> tuple[Architecture, Gpt2Config]:
    """What a ``config.json`` describes; errors call it ``source``."""
    fields = Fields(raw, source)
    fields.require("add_cross_attention", bool, False)
    width, num_layers = fields.get("n_embd", int), fields.get("n_layer", int)
    values: dict[str, Any] = {
        "vocab_size": fields.get("vocab_size", int),
        "num_layers": num_layers,
        "hidden_dim": width,
        "num_heads": fields.get("n_head", int),
        "mlp_dim": fields.get("n_inner", int, 4 * width),
        "max_length": fields.get("n_positions", int),
        "activation": fields.name("activation_function", ACTIVATIONS, "gelu_new"),
        "tied": fields.get("tie_word_embeddings", bool, True),
        "dropout_rate": float(fields.get("resid_pdrop", NUMBER, 0.1)),
        "embed_dropout_rate": float(fields.get("embd_pdrop", NUMBER, 0.1)),
        "attention_dropout_rate": float(fields.get("attn_pdrop", NUMBER, 0.1)),
        "epsilon": float(fields.get("layer_norm_epsilon", NUMBER, 1e-5)),
        "initializer_std": float(fields.get("initializer_range", NUMBER, 0.02)),
    }
    config = fields.make(Gpt2Config, values)
    # Softmax in float32, which reorder_and_upcast_attn asks for, is ours in any case.
    factor = 1.0
    if not fields.get("scale_attn_weights", bool, True):
        factor = (width // config.num_heads) ** 0.5
    factors = (factor,) * num_layers
    if fields.get("scale_attn_by_inverse_layer_idx", bool, False):
        factors = tuple(factor / (layer + 1) for layer in range(num_layers))
    return architecture(tied=config.tied, query_factors=factors), config


def write_config(config: Gpt2Config) -> dict[str, Any]:
    """The ``config.json``: the inverse of :func:`read_config`."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.num_tokens or config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.hidden_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": config.max_length,
        "activation_function": published_activation(config.activation),
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.embed_dropout_rate,
        "attn_pdrop": config.attention_dropout_rate,
        "layer_norm_epsilon": config.epsilon,
        "initializer_range": config.initializer_std,
    }
