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


def make_params(config: FinetuneConfig, model: nn.Module, key: PRNGKey, given: Params) -> Params:
    """The parameters that are given, of a base, and new ones."""
    assert config.model is not None  # resolved
    params = dict(model.init(jax.random.split(key)[0], *example_inputs(config.model))["params"])
    given = dict(given)
    head = given.pop("head", {})
    params |= given  # what is not returned is not computed
    return params | {"head": {**params["head"], **head}} if head else params


def given(config: FinetuneConfig, model: nn.Module, base: Base | None) -> dict[str, Any]:
    """The base's parameters for a model: of the encoder, and of heads as far as they are its own.

    They stay where they are: ``Placement.put_params`` lays them out.
    """
    assert config.model is not None  # resolved
    if base is None:
        return {}
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(config.model))["params"]
    found = {"encoder": steps.with_rows(base.encoder, config.model)}
    known = {name: x for name, x in _known(base).items() if name in shapes.get("head", {})}
    if known:
        found["head"] = known
    if LM_HEAD not in shapes:
        return found
    if base.lm_head is None:
        raise InputError(
            f"base={base.name!r} has no head that scores the vocabulary, which its "
            f"{type(config.model).__name__} does not share with its embeddings: name one with it"
        )
    return found | {LM_HEAD: steps.with_bias(base.lm_head, config.model)}


def _known(base: Base) -> dict[str, Any]:
    """Parts of a task's head that a base has: a pooler, or what its own head shares with those."""
    shared, own = ("transform", "norm"), base.lm_head or {}
    known = {name: own[name] for name in shared} if own.keys() >= set(shared) else {}
    return known if base.pooler is None else known | {"pooler": base.pooler}
