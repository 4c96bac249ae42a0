"""The axis glossary, and the array aliases built from it.

Axes, one word each, in signatures and in the sharding table:

    batch      rows, over all devices        vocab      entries of the vocabulary
    length     positions of a row            embed      the residual stream
    q_length   positions that attend         heads      attention heads
    kv_length  positions attended to         head_dim   channels of one head
    masked     predicted positions of a row  mlp        channels inside a feed-forward block
    layers     a stack of equal blocks       rank       inner channels of an adapter
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

Tokens = Int[Array, "batch length"]
Hidden = Float[Array, "batch length embed"]
Encoded = Float[Array, "sources source_length embed"]  # an encoder's, as a decoder reads them
Mask = Bool[Array, "#batch #heads #q_length #kv_length"]  # True = may attend
SourceMask = Bool[Array, "#batch #heads #q_length #source_length"]  # of what an encoder has read
Before = tuple[Int[Array, "batch memory"], Int[Array, "batch"]]  # tokens in front, and how many
Bias = Float[Array, "#batch #heads #q_length #kv_length"]  # added to the attention logits
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]

Params = PyTree[Array]  # one collection
Variables = Mapping[str, Params]  # all collections, by name
Batch = Mapping[str, Array | np.ndarray]
HostBatch = dict[str, np.ndarray]  # the rows of this process
Apply = Callable[..., Any]  # (variables, batch arrays, *, deterministic, rngs) -> outputs
Loss = Callable[..., Any]  # (variables, batch, key, *, progress, deterministic) -> (sum, Sums)
Dtype = jax.typing.DTypeLike
