"""Laws hold up to rounding, in each dtype that models compute in: this is how far."""

import jax.numpy as jnp

DTYPES = ("float32", "bfloat16")
BLOCK = 20  # a Transformer's block: ten results one after the other, and as many on the way back


def tolerance(dtype: str, *, depth: int, terms: int = 64) -> float:
    """Largest difference of two right ways to compute the same, over the largest size compared.

    One rounding is off by up to half an eps, evenly: by 0.29 eps of root mean square at a number's
    lower end and 0.2 on average. Two ways, and ``depth`` results that are each rounded and do not
    know of each other: 0.29 sqrt(depth) eps; of thousands of numbers the largest is 3.5 times that.
    Sums of up to ``terms`` are in float32 whatever the dtype, but in any order: an eps a term.
    """
    eps = float(jnp.finfo(dtype).eps)
    return depth**0.5 * eps + terms * float(jnp.finfo("float32").eps)
