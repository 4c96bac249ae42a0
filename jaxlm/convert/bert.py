"""BERT and its kin in Hugging Face's names: the tables, and what ``config.json`` means.

RoBERTa's position table has two unused rows in front; positions there count from 2, here from 0.
XLM-RoBERTa and CamemBERT are RoBERTas with another vocabulary. ELECTRA's discriminator and
generator are BERTs, if their embeddings are as wide as their layers. DistilBERT (Sanh et al. 2019)
has no token types: it is a BERT whose two token types are zeros. All are written as BERTs, unless
the head of a task is one of DistilBERT or ELECTRA, which have other activations.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxlm.convert.architecture import NUMBER, Architecture, Fields, TaskName
from jaxlm.convert.table import Row, Sizes, linear, norm
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.pooling import Pooling


def _encoder(prefix: str, unused_positions: int) -> tuple[Row, ...]:
    embeddings, layer, ours = f"{prefix}embeddings", f"{prefix}encoder.layer.{{layer}}", "encoder"
    attention, layers = f"{layer}.attention", f"{ours}/layers"

    def table(theirs: str, path: str, axis: str, unused: int = 0) -> Row:
        name = f"{embeddings}.{theirs}_embeddings.weight"
        return Row(name, f"{ours}/{path}/embedding", f"{axis} embed -> {axis} embed", unused)

    return (
        table("word", "token_embed", "vocab"),
        table("position", "position_embed", "positions", unused_positions),
        table("token_type", "token_type_embed", "token_types"),
        *norm(f"{embeddings}.LayerNorm", f"{ours}/embed_norm"),
        *(
            row
            for name in ("query", "key", "value")
            for row in linear(
                f"{attention}.self.{name}", f"{layers}/attention/{name}", "embed -> heads head_dim"
            )
        ),
        *linear(f"{attention}.output.dense", f"{layers}/attention/out", "heads head_dim -> embed"),
        *norm(f"{attention}.output.LayerNorm", f"{layers}/attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{layers}/mlp/up", "embed -> mlp"),
        *linear(f"{layer}.output.dense", f"{layers}/mlp/down", "mlp -> embed"),
        *norm(f"{layer}.output.LayerNorm", f"{layers}/mlp_norm"),
    )


def _pooler(prefix: str) -> tuple[Row, ...]:
    return _dense(f"{prefix}pooler.dense")


def _mlm_head(transform: str, layer_norm: str, bias: str) -> tuple[Row, ...]:
    return (
        *linear(transform, "head/transform", "embed -> outputs"),
        *norm(layer_norm, "head/norm"),
        Row(bias, "head/bias", "vocab -> vocab"),
    )


def _last(theirs: str) -> tuple[Row, ...]:
    return linear(theirs, "head/classifier", "embed -> labels")


_ON_TOKENS: dict[TaskName, tuple[Row, ...]] = {
    "TokenClassification": _last("classifier"),
    "QuestionAnswering": _last("qa_outputs"),
}


def _dense(theirs: str) -> tuple[Row, ...]:
    return linear(theirs, "head/pooler", "embed -> outputs")


_PREDICTIONS = "cls.predictions"
BERT = Architecture(
    class_name="Bert",
    prefix="bert.",
    encoder=_encoder("bert.", 0),
    heads=(
        _pooler("bert."),
        _mlm_head(
            f"{_PREDICTIONS}.transform.dense",
            f"{_PREDICTIONS}.transform.LayerNorm",
            f"{_PREDICTIONS}.bias",
        ),
    ),
    copies={
        f"{_PREDICTIONS}.decoder.weight": "bert.embeddings.word_embeddings.weight",
        f"{_PREDICTIONS}.decoder.bias": f"{_PREDICTIONS}.bias",
    },
    ignored=r"bert\.embeddings\.position_ids|cls\.seq_relationship\.",
    task_heads={
        "SequenceClassification": (*_pooler("bert."), *_last("classifier")),
        "MultipleChoice": (*_pooler("bert."), *_last("classifier")),
        **_ON_TOKENS,
    },
    poolings=("bert",),
)
ROBERTA = Architecture(
    class_name="Roberta",
    prefix="roberta.",
    encoder=_encoder("roberta.", 2),
    heads=(
        _pooler("roberta."),
        _mlm_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    ignored=r"roberta\.embeddings\.position_ids",
    task_heads={
        "SequenceClassification": (
            *_dense("classifier.dense"),
            *_last("classifier.out_proj"),
        ),
        "MultipleChoice": (*_pooler("roberta."), *_last("classifier")),
        **_ON_TOKENS,
    },
    poolings=("bert",),
    unused_positions=2,
)


ELECTRA = Architecture(
    class_name="Electra",
    prefix="electra.",
    encoder=_encoder("electra.", 0),
    heads=(
        _mlm_head(
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head.bias",
        ),
    ),
    copies={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ignored=r"electra\.embeddings\.position_ids|discriminator_predictions\.",
    task_heads={
        "SequenceClassification": (*_dense("classifier.dense"), *_last("classifier.out_proj")),
        "MultipleChoice": (*_dense("sequence_summary.summary"), *_last("classifier")),
        **_ON_TOKENS,
    },
    poolings=("electra",),
)


def _distilbert() -> Architecture:
    layer, ours = "distilbert.transformer.layer.{layer}", "encoder/layers"
    heads = "embed -> heads head_dim"
    table = "distilbert.embeddings.word_embeddings.weight"
    qkv = (("q_lin", "query"), ("k_lin", "key"), ("v_lin", "value"))
    maps = [(f"attention.{theirs}", f"attention/{name}", heads) for theirs, name in qkv]
    maps += [
        ("attention.out_lin", "attention/out", "heads head_dim -> embed"),
        ("ffn.lin1", "mlp/up", "embed -> mlp"),
        ("ffn.lin2", "mlp/down", "mlp -> embed"),
    ]
    norms = (("sa_layer_norm", "attention_norm"), ("output_layer_norm", "mlp_norm"))
    embeddings = [row for row in _encoder("distilbert.", 0) if "embeddings" in row.theirs]
    return Architecture(
        class_name="DistilBert",
        prefix="distilbert.",
        encoder=(
            *(replace(r, theirs="") if "token_type" in r.theirs else r for r in embeddings),
            *(r for name, path, a in maps for r in linear(f"{layer}.{name}", f"{ours}/{path}", a)),
            *(row for name, path in norms for row in norm(f"{layer}.{name}", f"{ours}/{path}")),
        ),
        heads=(_mlm_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),),
        copies={"vocab_projector.weight": table},
        ignored=r"distilbert\.embeddings\.position_ids",
        task_heads={
            "SequenceClassification": (*_dense("pre_classifier"), *_last("classifier")),
            "MultipleChoice": (*_dense("pre_classifier"), *_last("classifier")),
            **_ON_TOKENS,
        },
        poolings=("distilbert",),
    )


DISTILBERT = _distilbert()
_DISTILBERT_KEYS = {
    "num_hidden_layers": "n_layers",
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


_EPSILON = 1e-12


def sizes(config: BertConfig) -> Sizes:
    """Size of each axis that the tables name."""
    assert config.vocab_size is not None
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "positions": config.max_length,
        "token_types": config.num_token_types,
        "embed": config.hidden_dim,
        "outputs": config.hidden_dim,
        "heads": config.num_heads,
        "head_dim": config.hidden_dim // config.num_heads,
        "mlp": config.mlp_dim,
    }


def read_config(raw: Mapping[str, Any], source: str) -> tuple[Architecture, BertConfig]:
    """What a ``config.json`` describes; errors call it ``source``."""
    fields = Fields(raw, source)
    get, require = fields.get, fields.require
    match get("model_type", str):
        case "bert":
            architecture = BERT
        case "electra":
            architecture = ELECTRA
            width = get("hidden_size", int)
            if get("embedding_size", int, width) != width:
                raise InputError(
                    f"{source}: embedding_size={raw['embedding_size']} is not hidden_size={width}, "
                    "and a map between them, as in ELECTRA-small, is not supported; the base and "
                    "large ones have none"
                )
        case "distilbert":
            architecture = DISTILBERT
            raw = {**raw, **{ours: raw.get(theirs) for ours, theirs in _DISTILBERT_KEYS.items()}}
            fields.raw = raw
        case "roberta" | "xlm-roberta" | "camembert":
            architecture = ROBERTA
            require("pad_token_id", int, 1)  # where positions count from
        case other:
            raise AssertionError(f"{other} is no model of this table")
    # A key that is missing means the library's default, but for the sizes, which files always say.
    require("hidden_act", str, "gelu")
    require("position_embedding_type", str, "absolute")
    require("is_decoder", bool, False)
    require("add_cross_attention", bool, False)
    values: dict[str, Any] = {
        "vocab_size": get("vocab_size", int),
        "num_layers": get("num_hidden_layers", int),
        "hidden_dim": get("hidden_size", int),
        "num_heads": get("num_attention_heads", int),
        "mlp_dim": get("intermediate_size", int),
        "max_length": get("max_position_embeddings", int) - architecture.unused_positions,
        "num_token_types": get("type_vocab_size", int, 2),
        "dropout_rate": float(get("hidden_dropout_prob", NUMBER, 0.1)),
        "attention_dropout_rate": float(get("attention_probs_dropout_prob", NUMBER, 0.1)),
        "epsilon": float(get("layer_norm_eps", NUMBER, _EPSILON)),
        "initializer_std": float(get("initializer_range", NUMBER, 0.02)),
    }
    return architecture, fields.make(BertConfig, values)


def architecture(pooling: Pooling | None) -> Architecture:
    """What a BERT whose head pools like that is written as."""
    written: dict[Pooling | None, Architecture] = {"distilbert": DISTILBERT, "electra": ELECTRA}
    return written.get(pooling, BERT)


def as_written(params: PyTree, pooling: Pooling | None) -> PyTree:
    """The parameters as what such a BERT is written as has them.

    A DistilBERT adds a position to every token, and so the first type, of which all its tokens are.
    """
    if architecture(pooling) is not DISTILBERT:
        return params
    encoder: Any = params["encoder"]
    types, table = (
        np.asarray(encoder[name]["embedding"]) for name in ("token_type_embed", "position_embed")
    )
    if types[1:].any():
        raise InputError(
            "encoder/token_type_embed/embedding has learned a type of the second texts of pairs, "
            "for which a DistilBERT has no place: use the run from its folder, or train it with "
            "--task.pooling bert to use it elsewhere"
        )
    tables = {"token_type_embed": np.zeros_like(types), "position_embed": table + types[0]}
    new = {name: {"embedding": table} for name, table in tables.items()}
    return {**params, "encoder": {**encoder, **new}}


def write_config(
    config: BertConfig, pad_id: int = 0, pooling: Pooling | None = None
) -> dict[str, Any]:
    """The ``config.json``: the inverse of :func:`read_config`.

    A RoBERTa without its two unused positions is a BERT.
    """
    written = architecture(pooling)
    fields = {
        "architectures": [f"{written.class_name}Model"],
        "model_type": written.class_name.lower(),
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.num_token_types,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "layer_norm_eps": config.epsilon,
        "initializer_range": config.initializer_std,
        "pad_token_id": pad_id,
    }
    if written is ELECTRA:
        fields["embedding_size"] = config.hidden_dim
    if written is DISTILBERT:
        if config.epsilon != _EPSILON:
            raise InputError(
                f"a DistilBERT has epsilon={_EPSILON}, and this model has {config.epsilon}: train "
                "it with --task.pooling bert to use it elsewhere"
            )
        del fields["type_vocab_size"], fields["layer_norm_eps"]
        fields = {_DISTILBERT_KEYS.get(key, key): value for key, value in fields.items()}
    return fields
