"""A new phase of pretraining: what it changes of the model that it starts from, its base.

Its parameters stay, so only fields that change none of their shapes may be others, such as the base
of rotations; but there may be more positions, and more tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped
from tokenizers import Tokenizer

from jaxlm import tree
from jaxlm.data import tokenizers
from jaxlm.data.extension import pieces_of_new
from jaxlm.data.prepared import Prepared
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, example_inputs, is_attentive
from jaxlm.runs import steps
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.task import PretrainTask
from jaxlm.train.stored import changed

POSITIONS = "encoder/position_embed/embedding"
_VOCABULARY = ("vocab_size", "num_tokens")  # which tokenizer and the first mesh decide
_CHOSEN = ("dtype", "unroll", "remat")  # how it is computed
Pieces = Mapping[int, Sequence[int]]  # a new token -> the tokens of the base that it was before


def next_model(
    base: ModelConfig,
    given: ModelConfig | None,
    num_tokens: int,
    task: PretrainTask,
    mesh: MeshConfig,
    own: ModelConfig | None = None,
) -> Any:
    """The base's model with ``num_tokens`` tokens or more, and as ``given``, where that can be.

    ``own`` is that of the run so far, whose number of rows it keeps.
    Raises :class:`InputError` where the parameters of the base would not fit.
    """
    model = steps.base_model(_with_tokens(base, num_tokens), mesh, own)
    if given is None:
        return model
    if type(given) is not type(model):
        raise InputError(
            f"model is a {type(given).__name__}, and the base's a {type(model).__name__}: leave it "
            "out (--model None)"
        )
    if given.vocab_size not in (None, base.vocab_size, model.vocab_size):
        raise InputError(
            f"model.vocab_size={given.vocab_size} is not the base's {base.vocab_size}: leave it "
            "out; new tokens come with --prepare.extend-vocab"
        )
    known = {name: vars(model)[name] for name in _VOCABULARY if name in vars(model)}
    wanted: Any = replace(given, **known)  # pyright: ignore[reportArgumentType]
    there, here = (_shapes(task, config) for config in (model, wanted))
    for path in sorted({*there, *here}):
        one, other = there.get(path), here.get(path)
        if one != other and not (path == POSITIONS and one and other and one < other):
            fields = "; ".join(differences(model, wanted))
            raise InputError(
                f"model, which differs from the base's in {fields}, would have {path} of shape "
                f"{other}, where the base has {one}: change only what shapes do not depend on, or "
                "leave model out (--model None)"
            )
    return wanted


def differences(base: ModelConfig, model: ModelConfig) -> list[str]:
    """The fields of a model that are not its base's, but those that the run decides."""
    decided = (*_VOCABULARY, *_CHOSEN, *(("attention",) if is_attentive(base) else ()))
    return [
        f"{name}={vars(model)[name]} (there {value})"
        for name, value in vars(base).items()
        if name not in decided and vars(model)[name] != value
    ]


def continues(tokenizer: Tokenizer, data: Prepared) -> bool:
    """Whether data were cut by a tokenizer, or by one that has all of its tokens and more."""
    if data.info.tokenizer_sha256 == tokenizers.fingerprint(tokenizer):
        return True
    return bool(pieces_of_new(tokenizer, tokenizers.load(data.tokenizer_path)))


def new_tokens(old: Tokenizer, new: Tokenizer) -> Pieces:
    """What each token beyond those of the base's tokenizer was cut into before."""
    same = tokenizers.fingerprint(old) == tokenizers.fingerprint(new)
    return {} if same else pieces_of_new(old, new) or {}


def with_tokens(params: Mapping[str, Any], new: Pieces) -> dict[str, Any]:
    """Encoder and heads with a row for each new token: the mean of those of its pieces.

    Of the token table, and of bias and kernel of the head and of a generator's, where they have
    them. Rows that stood for no token give way.
    """

    num_tokens = min(new) + len(new)

    def one(path: str, leaf: Any) -> Any:
        own = path.removeprefix("generator/")
        if own in ("encoder/token_embed/embedding", "head/bias"):
            return changed(leaf, lambda x: _extended(x, new), (num_tokens, *leaf.shape[1:]))
        if own == "head/unembed/kernel":
            shape = (*leaf.shape[:-1], num_tokens)
            return changed(leaf, lambda x: _extended(x.T, new).T, shape)
        return leaf

    return tree.map_with_path(one, dict(params))


def with_positions(encoder: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """An encoder with a longer table of learned positions, if its model has one and is longer.

    The rows that are there begin anew behind themselves (as in Beltagy et al. 2020), so that
    near positions stay apart as they were.
    """
    if "position_embed" not in encoder or model.max_length is None:
        return encoder
    table = encoder["position_embed"]["embedding"]
    rows = np.arange(model.max_length) % table.shape[0]
    longer = changed(table, lambda x: x[rows], (len(rows), *table.shape[1:]))
    return encoder | {"position_embed": {"embedding": longer}}


def _with_tokens(base: ModelConfig, num_tokens: int) -> ModelConfig:
    assert base.vocab_size is not None
    changes: Any = {}
    if num_tokens > base.vocab_size:
        changes["vocab_size"] = num_tokens
    known = vars(base).get("num_tokens")
    if known is not None and num_tokens > known:
        changes["num_tokens"] = num_tokens
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def _extended(
    rows: Shaped[np.ndarray, "tokens ..."], new: Pieces
) -> Float[np.ndarray, "more_tokens ..."]:
    means = [rows[list(pieces)].mean(0) for _, pieces in sorted(new.items())]
    return np.concatenate([rows[: min(new)], means]).astype(rows.dtype)


def _shapes(task: PretrainTask, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    init = task.make_model(config).init
    return tree.shapes(jax.eval_shape(init, jax.random.key(0), *example_inputs(config))["params"])
