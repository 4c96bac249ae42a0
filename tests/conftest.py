import os

import pytest
from xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files of whole runs: begun first, so that no process is left alone with the longest test.
LONG = {f"test_{name}.py" for name in ("distributed", "journeys", "readmes", "scripts", "sweep")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
