import os
import resource

import pytest
from xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files of whole runs: begun first, so that no process is left alone with the longest test.
LONG = {f"test_{name}.py" for name in ("distributed", "journeys", "readmes", "scripts", "sweep")}


@pytest.fixture
def limit_file_size():
    """Sets a limit on the size of files, which stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
