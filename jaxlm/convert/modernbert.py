"""ModernBERT in Hugging Face's names: the tables, and what ``config.json`` means.

Query, key and value are stored there as one matrix, as are the gate and what it multiplies. The
norm that ends a layer here begins the next one there. Which layers see a window, and the bases of
the rotations, are described by ``layer_types`` and ``rope_parameters`` since version 5 of
transformers, and before by ``global_attn_every_n_layers``, ``global_rope_theta`` and
``local_rope_theta``; both are read and written. A window is there what is seen on both sides.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jaxlm.convert.architecture import (
    ACTIVATIONS,
    NUMBER,
    TASKS,
    Architecture,
    Fields,
    published_activation,
)
from jaxlm.convert.table import Row, Sizes, linear, norm
from jaxlm.errors import InputError
from jaxlm.models.modernbert import ModernBertConfig

_KINDS = ("full_attention", "sliding_attention")


def architecture(config: ModernBertConfig) -> Architecture:
    """The tables."""
    layer, ours = "model.layers.{layer}", "encoder/layers"
    table = "model.embeddings.tok_embeddings.weight"

    def some(rows: tuple[Row, Row], bias: bool) -> tuple[Row, ...]:
        return rows if bias else rows[:1]

    def scale(theirs: str, path: str, last: str | None = None) -> tuple[Row, ...]:
        rows = norm(theirs, path)
        if last is not None:
            ends = ("weight", "bias")
            rows = tuple(replace(r, last=f"{last}.{e}") for r, e in zip(rows, ends, strict=True))
        return rows if config.norm_bias else rows[:1]

    def parts(theirs: str, axes: str, bias: bool, *paths: str) -> tuple[Row, ...]:
        """A part of the outputs of one linear map."""
        return tuple(
            replace(row, part=part, parts=len(paths), axis=0)
            for part, path in enumerate(paths)
            for row in some(linear(f"{layer}.{theirs}", f"{ours}/{path}", axes), bias)
        )

    qkv = tuple(f"attention/{name}" for name in ("query", "key", "value"))
    out = linear(f"{layer}.attn.Wo", f"{ours}/attention/out", "heads head_dim -> embed")
    down = linear(f"{layer}.mlp.Wo", f"{ours}/mlp/down", "mlp -> embed")
    transform = linear("head.dense", "head/transform", "embed -> outputs")
    vocab_bias = (Row("decoder.bias", "head/bias", "vocab -> vocab"),)
    return Architecture(
        class_name="ModernBert",
        prefix="model.",
        encoder=(
            Row(table, "encoder/token_embed/embedding", "vocab embed -> vocab embed"),
            *scale("model.embeddings.norm", "encoder/embed_norm"),
            *parts("attn.Wqkv", "embed -> heads head_dim", config.attention_bias, *qkv),
            *some(out, config.attention_bias),
            *scale(f"{layer}.mlp_norm", f"{ours}/mlp_norm"),
            *parts("mlp.Wi", "embed -> mlp", config.mlp_bias, "mlp/gate", "mlp/up"),
            *some(down, config.mlp_bias),
            *scale("model.layers.{next}.attn_norm", f"{ours}/next_norm", "model.final_norm"),
        ),
        heads=(
            (*some(transform, config.head_bias), *scale("head.norm", "head/norm")),
            vocab_bias if config.vocab_bias else (),
        ),
        copies={"decoder.weight": table},
        ignored=r"classifier\.",
        task_heads=dict.fromkeys(TASKS, linear("classifier", "head/classifier", "embed -> labels")),
    )


def sizes(config: ModernBertConfig) -> Sizes:
    """Size of each axis that the tables name, but for a task's labels."""
    assert config.vocab_size is not None
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_dim,
        "outputs": config.hidden_dim,
        "heads": config.num_heads,
        "head_dim": config.hidden_dim // config.num_heads,
        "mlp": config.mlp_dim,
    }


def read_config(
    raw: Mapping[str, Any], source: str, names: Iterable[str] = ()
) -> tuple[Architecture, ModernBertConfig]:
    """What a ``config.json`` describes; errors call it ``source``. ``names``: of its tensors."""
    fields = Fields(raw, source)
    fields.require_tied(names, "decoder.")
    num_layers = fields.get("num_hidden_layers", int)
    # Since version 5 another name for half of it, which goes first.
    half = fields.maybe("sliding_window", int)
    seen = fields.get("local_attention", int, 128) if half is None else 2 * half
    if seen < 2:
        raise InputError(
            f"{source}: local_attention={seen} is below 2, of which half is seen on each side: "
            "128 is usual"
        )
    if seen % 2:
        raise InputError(
            f"{source}: local_attention={seen} is odd, and half of it is seen on each side: "
            f"write {seen - 1}, which is what transformers makes of it"
        )
    global_base = _rope_base(fields, _KINDS[0], "global_rope_theta", 160_000.0)
    # Null is a value of its own: as in the other layers.
    is_null = "local_rope_theta" in raw and raw["local_rope_theta"] is None
    local_default = global_base if is_null else 10_000.0
    values: dict[str, Any] = {
        "vocab_size": fields.get("vocab_size", int),
        "num_layers": num_layers,
        "hidden_dim": fields.get("hidden_size", int),
        "num_heads": fields.get("num_attention_heads", int),
        "mlp_dim": fields.get("intermediate_size", int),
        "max_length": fields.get("max_position_embeddings", int, 8192),
        "global_every": _global_every(fields, num_layers),
        "window": seen // 2,
        "global_rope_base": global_base,
        "local_rope_base": _rope_base(fields, _KINDS[1], "local_rope_theta", local_default),
        "activation": fields.name("hidden_activation", ACTIVATIONS, "gelu"),
        "head_activation": fields.name("classifier_activation", ACTIVATIONS, "gelu"),
        "pooling": fields.name("classifier_pooling", {"cls": "cls", "mean": "mean"}, "cls"),
        "attention_bias": fields.get("attention_bias", bool, False),
        "mlp_bias": fields.get("mlp_bias", bool, False),
        "norm_bias": fields.get("norm_bias", bool, False),
        "head_bias": fields.get("classifier_bias", bool, False),
        "vocab_bias": fields.get("decoder_bias", bool, True),
        "dropout_rate": float(fields.get("embedding_dropout", NUMBER, 0.0)),
        "attention_dropout_rate": float(fields.get("attention_dropout", NUMBER, 0.0)),
        "mlp_dropout_rate": float(fields.get("mlp_dropout", NUMBER, 0.0)),
        "epsilon": float(fields.get("norm_eps", NUMBER, 1e-5)),
        "initializer_std": float(fields.get("initializer_range", NUMBER, 0.02)),
    }
    config = fields.make(ModernBertConfig, values)
    return architecture(config), config


def _layer_types(num_layers: int, every: int) -> list[str]:
    return [_KINDS[layer % every > 0] for layer in range(num_layers)]


def _global_every(fields: Fields, num_layers: int) -> int:
    every = fields.get("global_attn_every_n_layers", int, 3)
    types = fields.maybe("layer_types", list)
    if types is None or (every > 0 and types == _layer_types(num_layers, every)):
        return every
    apart = [layer for layer, kind in enumerate(types) if kind == _KINDS[0] and layer > 0]
    every = apart[0] if apart else max(num_layers, 1)
    if types != _layer_types(num_layers, every):
        raise InputError(
            f"{fields.source}: layer_types={types} is not supported; of {num_layers} layers, the "
            f"first and every n-th after it are {_KINDS[0]}, and all others {_KINDS[1]}"
        )
    return every


def _rope_base(fields: Fields, kind: str, old: str, default: float) -> float:
    """The base of the rotations in layers of a kind."""
    by_kind = fields.maybe("rope_parameters", dict) or {}
    if others := [key for key in by_kind if key not in _KINDS]:
        raise InputError(
            f"{fields.source}: rope_parameters has {', '.join(others)}: write those of each kind "
            f"of layer into {' and '.join(_KINDS)}"
        )
    where = f"{fields.source}: rope_parameters"
    said = Fields(Fields(by_kind, where).maybe(kind, dict) or {}, f"{where}: {kind}")
    scaling = Fields(fields.maybe("rope_scaling", dict) or {}, f"{fields.source}: rope_scaling")
    for one in (said, scaling):
        type = one.maybe("rope_type", str) or one.get("type", str, "default")
        if type != "default":
            raise InputError(
                f"{one.source}: rope_type={type!r} is not supported, default is: write that if the "
                "model was trained without, or take another"
            )
    return float(said.get("rope_theta", NUMBER, fields.get(old, NUMBER, default)))


def write_config(config: ModernBertConfig, special: Mapping[str, int]) -> dict[str, Any]:
    """The ``config.json``, with the ids of special tokens: the inverse of :func:`read_config`."""
    bases = (config.global_rope_base, config.local_rope_base)
    ids = {f"{name}_token_id": special.get(name) for name in ("pad", "cls", "sep")}
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "model_type": "modernbert",
        "vocab_size": config.num_tokens or config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "local_attention": 2 * config.window,
        "global_attn_every_n_layers": config.global_every,
        "layer_types": _layer_types(config.num_layers, config.global_every),
        "global_rope_theta": bases[0],
        "local_rope_theta": bases[1],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base}
            for kind, base in zip(_KINDS, bases, strict=True)
        },
        "hidden_activation": published_activation(config.activation),
        "classifier_activation": published_activation(config.head_activation),
        "classifier_pooling": config.pooling,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "norm_bias": config.norm_bias,
        "classifier_bias": config.head_bias,
        "decoder_bias": config.vocab_bias,
        "tie_word_embeddings": True,
        "embedding_dropout": config.dropout_rate,
        "attention_dropout": config.attention_dropout_rate,
        "mlp_dropout": config.mlp_dropout_rate,
        "norm_eps": config.epsilon,
        "initializer_range": config.initializer_std,
        **ids,
        "bos_token_id": special.get("cls"),
        "eos_token_id": special.get("sep"),
    }
