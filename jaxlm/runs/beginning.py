"""The parameters that a fine-tuning begins with."""

from typing import Any

import flax.linen as nn
import jax

from jaxlm.config import FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.models.model import example_inputs
from jaxlm.runs import steps
from jaxlm.runs.base import Base
from jaxlm.typing import Params, PRNGKey

LM_HEAD = "lm_head"


def make_params(config: FinetuneConfig, model: nn.Module, base: Base | None) -> Params:
    """The base's parameters and a new head, on the host's first device."""
    assert config.model is not None  # resolved
    inputs = example_inputs(config.model)
    key, _ = jax.random.split(jax.random.key(config.train.seed))

    def init(key: PRNGKey) -> Params:
        params = dict(model.init(key, *inputs)["params"])
        if base is not None:  # what is not returned is not computed
            del params["encoder"]
            params.pop(LM_HEAD, None)
        return params

    params = jax.jit(init)(key)
    if base is not None:
        params = params | _given(config, model, base)
        if "head" in params:
            known = _known(base)
            params["head"] = {name: known.get(name, new) for name, new in params["head"].items()}
    return jax.device_put(params)


def _known(base: Base) -> dict[str, Any]:
    """Parts of a task's head that a base has: a pooler, or what its own head shares with those."""
    shared, own = ("transform", "norm"), base.lm_head or {}
    known = {name: own[name] for name in shared} if own.keys() >= set(shared) else {}
    return known if base.pooler is None else known | {"pooler": base.pooler}


def _given(config: FinetuneConfig, model: nn.Module, base: Base) -> dict[str, Any]:
    """The base's parameters for a model: of the encoder, and of the head over the vocabulary."""
    assert config.model is not None  # resolved
    given = {"encoder": steps.with_rows(base.encoder, config.model)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(config.model))
    if LM_HEAD not in shapes["params"]:
        return given
    if base.lm_head is None:
        raise InputError(
            f"base={base.name!r} has no head that scores the vocabulary, which its "
            f"{type(config.model).__name__} does not share with its embeddings: name one with it"
        )
    return given | {LM_HEAD: steps.with_bias(base.lm_head, config.model)}
