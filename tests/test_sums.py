import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm.sums import Sums, add_all


def sums(loss, weight, **counts):
    return Sums(
        {"loss": jnp.float32(loss)},
        jnp.float32(weight),
        {name: jnp.float32(count) for name, count in counts.items()},
    )


def test_the_mean_of_sums_is_not_the_mean_of_means():
    parts = [sums(8, 2, tokens=5), sums(1, 1, tokens=2), sums(0, 7, tokens=0)]
    total = add_all(parts)
    assert total.means() == {"loss": pytest.approx(0.9)}
    assert float(total.counts["tokens"]) == 7
    assert sum(part.means()["loss"] for part in parts) / 3 == pytest.approx(5 / 3)  # another number


def test_empty_sums_have_no_mean():
    assert math.isnan(sums(0, 0).means()["loss"])
    assert math.isnan(add_all([sums(0, 0), sums(0, 0)]).means()["loss"])
    assert add_all([sums(0, 0), sums(3, 2)]).means()["loss"] == 1.5


def test_different_quantities_do_not_add():
    with pytest.raises(ValueError, match="counts"):
        sums(1, 1, tokens=1) + sums(1, 1, overflow=1)


def test_sums_pass_through_jit():
    doubled = jax.jit(lambda s: s + s)(sums(3, 2, tokens=4))
    assert (float(doubled.totals["loss"]), float(doubled.weight)) == (6, 4)
    assert float(doubled.counts["tokens"]) == 8
