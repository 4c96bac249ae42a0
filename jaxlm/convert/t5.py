"""T5 in Hugging Face's names: the tables, and what ``config.json`` means.

``tie_word_embeddings`` says there whether the decoder's outputs are scaled, in version 1.0 of T5
and not in 1.1, and since version 5 of transformers ``scale_decoder_outputs`` does, whatever the
other says. Whether logits are made by the token table, the weights themselves say.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.convert.architecture import (
    ACTIVATIONS,
    NUMBER,
    Architecture,
    Fields,
    published_activation,
)
from jaxlm.convert.table import Row, Sizes, Tensors, linear
from jaxlm.errors import InputError
from jaxlm.models.t5 import T5Config

TABLE, HEAD = "shared.weight", "lm_head.weight"
_INSIDE = "transformer."  # the prefix in classes that have the model as a part
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def architecture(config: T5Config) -> Architecture:
    """The tables."""

    def scale(theirs: str, path: str, stack: str = "layers") -> Row:
        return Row(f"{theirs}.weight", f"{path}/scale", "embed -> embed", stack=stack)

    def kernel(theirs: str, path: str, axes: str, stack: str) -> Row:
        return linear(theirs, path, axes)[0].of(stack)

    def attention(theirs: str, path: str, stack: str) -> tuple[Row, ...]:
        inside, outside = "embed -> heads head_dim", "heads head_dim -> embed"
        return (
            kernel(f"{theirs}.q", f"{path}/query", inside, stack),
            kernel(f"{theirs}.k", f"{path}/key", inside, stack),
            kernel(f"{theirs}.v", f"{path}/value", inside, stack),
            kernel(f"{theirs}.o", f"{path}/out", outside, stack),
        )

    def mlp(theirs: str, path: str, stack: str) -> tuple[Row, ...]:
        ups = (("wi_0", "gate"), ("wi_1", "up")) if config.gated else (("wi", "up"),)
        rows = (kernel(f"{theirs}.{a}", f"{path}/{b}", "embed -> mlp", stack) for a, b in ups)
        return (*rows, kernel(f"{theirs}.wo", f"{path}/down", "mlp -> embed", stack))

    def stack(side: str, stack: str, *sublayers: str) -> tuple[Row, ...]:
        block, ours = f"{side}.block.{{layer}}.layer", f"encoder/{side}_layers"
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names = {
            "SelfAttention": "attention",
            "EncDecAttention": "cross_attention",
            "DenseReluDense": "mlp",
        }
        rows: list[Row] = []
        for number, theirs in enumerate(sublayers):
            path = f"{ours}/{names[theirs]}"
            rows.append(scale(f"{block}.{number}.layer_norm", f"{path}_norm", stack))
            parts = mlp if theirs == "DenseReluDense" else attention
            rows += parts(f"{block}.{number}.{theirs}", path, stack)
        table = f"encoder/{side}_bias/relative_embed/embedding"
        rows.append(Row(relative, table, "buckets heads -> buckets heads"))
        rows.append(scale(f"{side}.final_layer_norm", f"encoder/{side}_norm"))
        return tuple(rows)

    unembed = Row(HEAD, "head/unembed/kernel", "vocab embed -> embed vocab")
    return Architecture(
        class_name="T5",
        prefix="",
        encoder=(
            Row(TABLE, "encoder/token_embed/embedding", "vocab embed -> vocab embed"),
            *stack("encoder", "layers", "SelfAttention", "DenseReluDense"),
            *stack(
                "decoder", "decoder_layers", "SelfAttention", "EncDecAttention", "DenseReluDense"
            ),
        ),
        heads=() if config.tied else ((unembed,),),
        copies=dict.fromkeys((*_COPIES, *((HEAD,) if config.tied else ())), TABLE),
        # A table that the oldest files have, and no code reads.
        ignored=r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
        untied="one table for the source, the target and the head is supported",
        prefixes={"SequenceClassification": _INSIDE, "TokenClassification": _INSIDE},
    )


def sizes(config: T5Config) -> Sizes:
    """Size of each axis that the tables name, and of each stack."""
    assert config.vocab_size is not None
    return {
        "layers": config.num_layers,
        "decoder_layers": config.decoder_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_dim,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "buckets": config.num_buckets,
    }


def read_config(
    raw: Mapping[str, Any], source: str, tensors: Tensors
) -> tuple[Architecture, T5Config]:
    """What a ``config.json`` describes, which errors call ``source``, and the file beside it."""
    fields = Fields(raw, source)
    if tensors and not any(name.startswith(("decoder.", f"{_INSIDE}decoder.")) for name in tensors):
        raise InputError(
            f"{source}: the weights beside it are a T5's encoder without its decoder, and a T5 "
            "here reads a source and writes a target: take the folder of a whole one "
            "(T5ForConditionalGeneration), or of another encoder, such as a BERT"
        )
    gated, activation = _feed_forward(fields)
    scaled = fields.get("tie_word_embeddings", bool, True)
    values: dict[str, Any] = {
        "vocab_size": fields.get("vocab_size", int),
        "num_layers": fields.get("num_layers", int),
        "num_decoder_layers": fields.maybe("num_decoder_layers", int),
        "hidden_dim": fields.get("d_model", int),
        "num_heads": fields.get("num_heads", int),
        "head_dim": fields.get("d_kv", int),
        "mlp_dim": fields.get("d_ff", int),
        "num_buckets": fields.get("relative_attention_num_buckets", int, 32),
        "max_distance": fields.get("relative_attention_max_distance", int, 128),
        "activation": activation,
        "gated": gated,
        "tied": _tied(tensors),
        "scale_outputs": fields.get("scale_decoder_outputs", bool, scaled),
        "dropout_rate": float(fields.get("dropout_rate", NUMBER, 0.1)),
        "epsilon": float(fields.get("layer_norm_epsilon", NUMBER, 1e-6)),
    }
    config = fields.make(T5Config, values)
    return architecture(config), config


def check_start(raw: Mapping[str, Any], source: str, start: int) -> None:
    """Raise if targets begin with another token there than texts here."""
    Fields(raw, source).require("decoder_start_token_id", int, start)


def _feed_forward(fields: Fields) -> tuple[bool, str]:
    """Whether it is gated, and its activation; ``gated-gelu`` stands for the approximation."""
    said = fields.get("feed_forward_proj", str, "relu")
    known = {**ACTIVATIONS, **{f"gated-{theirs}": ours for theirs, ours in ACTIVATIONS.items()}}
    known["gated-gelu"] = "gelu_tanh"
    return said.startswith("gated-"), fields.name("feed_forward_proj", known, "relu")


def _tied(tensors: Tensors) -> bool:
    """Whether the file has no other head than the table."""
    tables = [name for name in (TABLE, *_COPIES) if name in tensors]
    if HEAD not in tensors or not tables:
        return True
    return np.array_equal(tensors[HEAD], tensors[tables[0]])


def write_config(config: T5Config, start: int) -> dict[str, Any]:
    """The ``config.json``: the inverse of :func:`read_config`; ``start`` begins targets."""
    theirs = published_activation(config.activation)
    if config.gated:
        if config.activation == "gelu":
            raise InputError(
                "activation=gelu in gated blocks cannot be written for other libraries, which take "
                "it for gelu_tanh: use that"
            )
        theirs = f"gated-{'gelu' if config.activation == 'gelu_tanh' else theirs}"
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.num_tokens or config.vocab_size,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.hidden_dim,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": theirs,
        "tie_word_embeddings": config.scale_outputs,
        "scale_decoder_outputs": config.scale_outputs,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": config.epsilon,
        "decoder_start_token_id": start,
    }
