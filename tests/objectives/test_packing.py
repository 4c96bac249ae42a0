"""Documents that share a row are told apart."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxlm.objectives.masking import Vocabulary
from jaxlm.objectives.packing import documents, whole_rows

START, END = 1, 2
VOCABULARY = Vocabulary(
    mask_id=None,
    start_id=START,
    end_id=END,
    ordinary=jnp.arange(3, 10),
    is_ordinary=jnp.arange(10) >= 3,
    word_starts=jnp.arange(10) >= 3,
)


def test_documents_by_hand():
    tokens = jnp.asarray(np.array([[5, 6, 1, 7, 1, 0], [1, 5, 5, 1, 1, 9], [1, 5, 5, 5, 5, 5]]))
    lengths = jnp.asarray(np.array([5, 6, 0]))
    ids, positions = documents(tokens, lengths, VOCABULARY)
    assert ids.tolist() == [[0, 0, 1, 1, 2, -1], [1, 1, 1, 2, 3, 3], [-1] * 6]
    assert positions is not None
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 0, 1], [*range(6)]]
    ids, positions = whole_rows(tokens, lengths, VOCABULARY)
    assert (ids.tolist()[0], positions) == ([0, 0, 0, 0, 0, -1], None)


def test_one_token_that_starts_and_ends():
    vocabulary = replace(VOCABULARY, end_id=START)
    rows = [[1, 5, 6, 1, 1, 7], [5, 1, 1, 6, 1, 1], [1, 1, 5, 1, 0, 0]]
    lengths = jnp.asarray(np.array([6, 6, 4]))
    ids, _ = documents(jnp.asarray(np.array(rows)), lengths, vocabulary)
    # The end belongs to the text before it, so that a model learns to end.
    assert ids.tolist() == [[1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2], [1, 2, 2, 2, -1, -1]]


def test_texts_that_only_end():
    vocabulary = replace(VOCABULARY, start_id=None)  # an XLNet's <cls>
    rows = [[5, 6, 2, 7, 2, 5], [2, 5, 5, 5, 2, 0]]
    lengths = jnp.asarray(np.array([6, 5]))
    ids, positions = documents(jnp.asarray(np.array(rows)), lengths, vocabulary)
    assert ids[:, 1:].tolist() == [[0, 0, 1, 1, 2], [1, 1, 1, 1, -1]]
    assert positions is not None
    assert positions[0].tolist() == [0, 1, 2, 0, 1, 0]
