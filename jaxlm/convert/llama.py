"""Llama in Hugging Face's names: the tables, and what ``config.json`` means.

Rotations are described there by ``rope_parameters`` since version 5 of transformers, and before by
``rope_theta`` and ``rope_scaling``; both are read and written.
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
from jaxlm.convert.table import LAST, Row, Sizes, linear, without_bias
from jaxlm.errors import InputError
from jaxlm.models.llama import LlamaConfig
from jaxlm.nn.positions import LinearScaling, Llama3Scaling, Scaling


def architecture(config: LlamaConfig) -> Architecture:
    """The tables."""
    layer, ours = "model.layers.{layer}", "encoder/layers"
    attention, table = f"{ours}/attention", "model.embed_tokens.weight"

    def scale(theirs: str, path: str) -> Row:
        return Row(f"{theirs}.weight", f"{path}/scale", "embed -> embed")

    def maps(bias: bool, *names: tuple[str, str, str]) -> tuple[Row, ...]:
        rows = [linear(f"{layer}.{theirs}", path, axes) for theirs, path, axes in names]
        return tuple(row for pair in rows for row in (pair if bias else pair[:1]))

    unembed = Row("lm_head.weight", "head/unembed/kernel", "vocab embed -> embed vocab")
    return Architecture(
        class_name="Llama",
        prefix="model.",
        encoder=(
            Row(table, "encoder/token_embed/embedding", "vocab embed -> vocab embed"),
            scale(f"{layer}.input_layernorm", f"{ours}/attention_norm"),
            *maps(
                config.attention_bias,
                ("self_attn.q_proj", f"{attention}/query", "embed -> heads head_dim"),
                ("self_attn.k_proj", f"{attention}/key", "embed -> kv_heads head_dim"),
                ("self_attn.v_proj", f"{attention}/value", "embed -> kv_heads head_dim"),
                ("self_attn.o_proj", f"{attention}/out", "heads head_dim -> embed"),
            ),
            scale(f"{layer}.post_attention_layernorm", f"{ours}/mlp_norm"),
            *maps(
                config.mlp_bias,
                ("mlp.gate_proj", f"{ours}/mlp/gate", "embed -> mlp"),
                ("mlp.up_proj", f"{ours}/mlp/up", "embed -> mlp"),
                ("mlp.down_proj", f"{ours}/mlp/down", "mlp -> embed"),
            ),
            scale("model.norm", "encoder/final_norm"),
        ),
        heads=() if config.tied else ((unembed,),),
        copies={"lm_head.weight": table} if config.tied else {},
        ignored=r"(model|transformer)\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",
        untied="set tie_word_embeddings to false in config.json if that head is meant",
        task_heads={
            "SequenceClassification": without_bias("score"),
            "TokenClassification": linear("score", *LAST),
            "QuestionAnswering": linear("qa_outputs", *LAST),
        },
        poolings=("last",),
        prefixes={"QuestionAnswering": "transformer."},
    )


def sizes(config: LlamaConfig) -> Sizes:
    """Size of each axis that the tables name."""
    assert config.vocab_size is not None
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_dim,
        "heads": config.num_heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "mlp": config.mlp_dim,
    }


def read_config(raw: Mapping[str, Any], source: str) -> tuple[Architecture, LlamaConfig]:
    """What a ``config.json`` describes; errors call it ``source``."""
    fields = Fields(raw, source)
    base, scaling = _rope(fields)
    values: dict[str, Any] = {
        "vocab_size": fields.get("vocab_size", int),
        "num_layers": fields.get("num_hidden_layers", int),
        "hidden_dim": fields.get("hidden_size", int),
        "num_heads": fields.get("num_attention_heads", int),
        "num_kv_heads": fields.maybe("num_key_value_heads", int),
        "head_dim": fields.maybe("head_dim", int),
        "mlp_dim": fields.get("intermediate_size", int),
        "max_length": fields.get("max_position_embeddings", int, 2048),
        "rope_base": base,
        "rope_scaling": scaling,
        "activation": fields.name("hidden_act", ACTIVATIONS, "silu"),
        "tied": fields.get("tie_word_embeddings", bool, False),
        "attention_bias": fields.get("attention_bias", bool, False),
        "mlp_bias": fields.get("mlp_bias", bool, False),
        "attention_dropout_rate": float(fields.get("attention_dropout", NUMBER, 0.0)),
        "epsilon": float(fields.get("rms_norm_eps", NUMBER, 1e-6)),
        "initializer_std": float(fields.get("initializer_range", NUMBER, 0.02)),
    }
    try:
        config = LlamaConfig(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return architecture(config), config


def _rope(fields: Fields) -> tuple[float, Scaling | None]:
    """The base of the rotations and how they are scaled."""
    new = fields.maybe("rope_parameters", dict)
    said = new or fields.maybe("rope_scaling", dict) or {}
    inner = Fields(said, f"{fields.source}: {'rope_parameters' if new else 'rope_scaling'}")
    base = inner.maybe("rope_theta", NUMBER)
    base = fields.get("rope_theta", NUMBER, 10_000.0) if base is None else base
    part = inner.get(
        "partial_rotary_factor", NUMBER, fields.get("partial_rotary_factor", NUMBER, 1)
    )
    if part != 1:
        raise InputError(f"{fields.source}: partial_rotary_factor={part} is not supported; 1 is")
    match inner.maybe("rope_type", str) or inner.get("type", str, "default"):
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=float(inner.get("factor", NUMBER)))
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            scaling = Llama3Scaling(
                **{name: float(inner.get(name, NUMBER)) for name in names},
                original_length=inner.get("original_max_position_embeddings", int),
            )
        case other:
            raise InputError(
                f"{inner.source}: rope_type={other!r} is not supported; default, linear and "
                "llama3 are: write default if the model was trained without, or take another"
            )
    return float(base), scaling


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """The ``config.json``: the inverse of :func:`read_config`."""
    match config.rope_scaling:
        case None:
            scaling = None
        case LinearScaling(factor=factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as llama3:
            scaling = {
                "rope_type": "llama3",
                "factor": llama3.factor,
                "low_freq_factor": llama3.low_freq_factor,
                "high_freq_factor": llama3.high_freq_factor,
                "original_max_position_embeddings": llama3.original_length,
            }
    theta = {"rope_theta": config.rope_base}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.num_tokens or config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        **theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **theta, **(scaling or {})},
        "hidden_act": published_activation(config.activation),
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": config.attention_dropout_rate,
        "rms_norm_eps": config.epsilon,
        "initializer_range": config.initializer_std,
    }
