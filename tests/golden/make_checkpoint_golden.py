"""Write checkpoint_jax_<version>.zip: a small checkpoint, by the JAX that is installed.

python tests/golden/make_checkpoint_golden.py
"""

import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlm.train.checkpoint import Checkpointer


def make_state() -> dict:
    """No random numbers: those might be others in another version."""
    kernel = jnp.arange(12, dtype=jnp.float32).reshape(4, 3) / 7
    dense = {"kernel": kernel, "bias": jnp.arange(3, dtype=jnp.bfloat16)}
    return {"trainable": {"params": {"dense": dense}}, "step": jnp.asarray(20)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        with Checkpointer(Path(folder)) as checkpointer:
            checkpointer.save(20, make_state(), {"examples_seen": 160}, {"loss": 1.5})
        name = f"checkpoint_jax_{jax.__version__}"
        shutil.make_archive(str(Path(__file__).with_name(name)), "zip", folder)
