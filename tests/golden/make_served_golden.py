"""Write served_jax_<version>.zip: a small classifier as StableHLO, by the JAX that is installed.

PYTHONPATH=tests/support python tests/golden/make_served_golden.py
"""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_heads import drawn, model_of
from tiny_models import BERT

from jaxlm.convert import stablehlo

CONFIG = replace(BERT, num_layers=1, max_length=24)


def make_function() -> tuple[Callable[..., Any], dict[str, Any]]:
    """Probabilities of three labels, and weights that numpy draws, by their names."""
    task = "SequenceClassification"
    model, params = model_of(CONFIG, task), drawn(task, config=CONFIG)

    def function(weights, ids, mask):
        given = {"params": unflatten_dict(weights, sep="/")}
        return jax.nn.softmax(model.apply(given, ids, segment_ids=mask - 1))

    return function, flatten_dict(params, sep="/")


if __name__ == "__main__":
    function, weights = make_function()
    written = stablehlo.serialize(function, weights, ["batch, length"] * 2, CONFIG.max_length)
    path = Path(__file__).with_name(f"served_jax_{jax.__version__}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(stablehlo.MODEL, written)
