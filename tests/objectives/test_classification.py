"""What is not by hand in test_supervised.py: extreme logits, and bad settings."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.objectives import classification, contrastive, multi_label


def test_extreme_multi_label_logits_are_finite():
    batch = {"labels": np.ones((4, 3), np.float32), "weights": np.float32([1, 1, 0, 1])}
    sums = multi_label.score(jnp.full((4, 3), 1e4), batch)
    assert float(sums.totals["loss"]) == 0
    sums = multi_label.score(jnp.full((4, 3), -1e4), batch)
    assert float(sums.totals["loss"]) == 3e4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(classification.make_loss, label_smoothing=1.0), r"label_smoothing=1.0 is not in"),
        (partial(contrastive.make_loss, temperature=0.0), r"temperature=0.0 is not above 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(InputError, match=message):
        make(lambda: None)
