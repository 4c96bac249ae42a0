"""XLNet in Hugging Face's names: the table, and what ``config.json`` means.

Attention's linear maps are stored there with their real axes, that of the output the other way
round, and there is one dropout rate for all. How much memory a model is run with (``mem_len``,
``reuse_len``) is no part of it here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxlm.convert.architecture import (
    ACTIVATIONS,
    NUMBER,
    POOLED,
    Architecture,
    Fields,
    names_task,
    published_activation,
)
from jaxlm.convert.table import LAST, Row, Sizes, linear, norm
from jaxlm.models.xlnet import XlnetConfig

_LAYER, _OURS = "transformer.layer.{layer}", "encoder/layers"
_TABLE = "transformer.word_embedding.weight"
_HEADS = "embed heads head_dim"


def _same(theirs: str, ours: str, axes: str) -> Row:
    return Row(f"{_LAYER}.rel_attn.{theirs}", f"{_OURS}/attention/{ours}", f"{axes} -> {axes}")


_SUMMARY = linear("sequence_summary.summary", "head/pooler", "embed -> outputs")
XLNET = Architecture(
    class_name="XLNet",
    prefix="transformer.",
    encoder=(
        Row(_TABLE, "encoder/token_embed/embedding", "vocab embed -> vocab embed"),
        Row(
            "transformer.mask_emb",
            "encoder/query_embed",
            "single alone embed -> (single alone embed)",
        ),
        *(
            _same(theirs, f"{ours}/kernel", _HEADS)
            for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("r", "position"))
        ),
        Row(
            f"{_LAYER}.rel_attn.o",
            f"{_OURS}/attention/out/kernel",
            f"{_HEADS} -> heads head_dim embed",
        ),
        _same("r_w_bias", "content_bias", "heads head_dim"),
        _same("r_r_bias", "position_bias", "heads head_dim"),
        _same("r_s_bias", "segment_bias", "heads head_dim"),
        _same("seg_embed", "segment_embed", "types heads head_dim"),
        *norm(f"{_LAYER}.rel_attn.layer_norm", f"{_OURS}/attention_norm"),
        *linear(f"{_LAYER}.ff.layer_1", f"{_OURS}/mlp/up", "embed -> mlp"),
        *linear(f"{_LAYER}.ff.layer_2", f"{_OURS}/mlp/down", "mlp -> embed"),
        *norm(f"{_LAYER}.ff.layer_norm", f"{_OURS}/mlp_norm"),
    ),
    heads=((Row("lm_loss.bias", "head/bias", "vocab -> vocab"),),),
    copies={"lm_loss.weight": _TABLE},
    ignored="$^",
    task_heads={
        "SequenceClassification": (*_SUMMARY, *linear("logits_proj", *LAST)),
        "MultipleChoice": (*_SUMMARY, *linear("logits_proj", *LAST)),
        "TokenClassification": linear("classifier", *LAST),
        "QuestionAnswering": linear("qa_outputs", *LAST),
    },
    poolings=("xlnet",),
    question_answering="QuestionAnsweringSimple",  # the other one searches for answers
)


def sizes(config: XlnetConfig) -> Sizes:
    """Size of each axis that the table names."""
    assert config.vocab_size is not None
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "single": 1,
        "alone": 1,
        "types": 2,
        "embed": config.hidden_dim,
        "outputs": config.hidden_dim,
        "heads": config.num_heads,
        "head_dim": config.hidden_dim // config.num_heads,
        "mlp": config.mlp_dim,
    }


def read_config(
    raw: Mapping[str, Any], source: str, names: Iterable[str] = ()
) -> tuple[Architecture, XlnetConfig]:
    """What a ``config.json`` describes; errors call it ``source``. ``names``: of its tensors."""
    fields = Fields(raw, source)
    width, num_heads = fields.get("d_model", int), fields.get("n_head", int)
    fields.require("d_head", int, width // max(num_heads, 1))
    fields.require("bi_data", bool, False)
    fields.require_tied(names, "lm_loss.")
    attention = fields.name("attn_type", {"bi": "bi", "uni": "uni"}, "bi")
    if attention == "uni":  # elsewhere it says nothing
        fields.require("same_length", bool, False)
    if names_task(fields) in POOLED:
        fields.require("summary_type", str, "last")
        fields.require("summary_use_proj", bool, True)
        fields.require("summary_activation", str, "tanh")
    clamp = fields.get("clamp_len", int, -1)
    rate = float(fields.get("dropout", NUMBER, 0.1))
    values: dict[str, Any] = {
        "vocab_size": fields.get("vocab_size", int, fields.maybe("n_token", int)),
        "num_layers": fields.get("n_layer", int),
        "hidden_dim": width,
        "num_heads": num_heads,
        "mlp_dim": fields.get("d_inner", int),
        "attention": attention,
        "clamp_length": clamp if clamp > 0 else None,
        "activation": fields.name("ff_activation", ACTIVATIONS, "gelu"),
        "dropout_rate": rate,
        "attention_dropout_rate": rate,
        "epsilon": float(fields.get("layer_norm_eps", NUMBER, 1e-12)),
        "initializer_std": float(fields.get("initializer_range", NUMBER, 0.02)),
    }
    return XLNET, fields.make(XlnetConfig, values)


def write_config(config: XlnetConfig) -> dict[str, Any]:
    """The ``config.json``: the inverse of :func:`read_config`, without a limit to lengths."""
    return {
        "architectures": ["XLNetLMHeadModel"],
        "model_type": "xlnet",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "d_model": config.hidden_dim,
        "n_head": config.num_heads,
        "d_head": config.hidden_dim // config.num_heads,
        "d_inner": config.mlp_dim,
        "attn_type": config.attention,
        "clamp_len": config.clamp_length or -1,
        "ff_activation": published_activation(config.activation),
        "tie_word_embeddings": True,
        "dropout": config.dropout_rate,
        "layer_norm_eps": config.epsilon,
        "initializer_range": config.initializer_std,
        "mem_len": None,
    }
