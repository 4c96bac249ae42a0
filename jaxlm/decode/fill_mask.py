"""Filling in blanks: the likeliest tokens at each mask of a text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.errors import InputError
from jaxlm.typing import Apply, Variables

MASK = "[MASK]"  # how a blank is written, whatever the tokenizer calls it


@dataclass(frozen=True, kw_only=True)
class Filling:
    """One candidate for one blank."""

    token: str
    probability: float
    text: str
    """The whole text with this blank filled in, and the others with their best candidates."""


class FillMask:
    """Fills in the blanks of texts, a batch at a time.

    ``apply(variables, tokens, predicted, *, segment_ids)`` gives logits at the positions
    ``predicted``; segment ids are 0 at real tokens and -1 at padding.
    Rows are padded to a multiple of 32 tokens, so that few shapes are compiled.
    """

    def __init__(self, apply: Apply, variables: Variables, tokenizer: Tokenizer, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        names = (MASK, "<mask>")
        self._mask_token = next(name for name in names if tokenizer.token_to_id(name) is not None)
        self._mask_id = tokenizer.token_to_id(self._mask_token)
        self._vocab_size = tokenizers.vocab_size(tokenizer)  # ids may have gaps

        @jax.jit
        def probabilities(
            tokens: Int[Array, "batch length"],
            lengths: Int[Array, "batch"],
            predicted: Int[Array, "batch masked"],
        ) -> Float[Array, "batch masked vocab"]:
            position = jnp.arange(tokens.shape[1])[None, :]
            segment_ids = jnp.where(position < lengths[:, None], 0, -1)
            logits = apply(variables, tokens, predicted, segment_ids=segment_ids)
            return jax.nn.softmax(logits[..., : self._vocab_size], axis=-1)

        self._probabilities = probabilities

    def __call__(
        self, texts: Iterable[str], *, top_k: int = 5, batch_size: int = 32
    ) -> Iterator[list[list[Filling]]]:
        """For each text, for each of its blanks, the ``top_k`` candidates, likeliest first."""
        if top_k < 1:
            raise InputError(f"top_k={top_k} is not above 0")
        texts = iter(texts)
        while batch := list(islice(texts, batch_size)):
            yield from self._batch(batch, top_k, batch_size)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text.replace(MASK, self._mask_token)).ids
        if self._mask_id not in ids:
            raise InputError(f"{text!r} has no blank: write {MASK} where a word is to be filled in")
        if len(ids) > self._max_length:
            raise InputError(
                f"{text[:40]!r}… has {len(ids)} tokens, more than the model's {self._max_length}"
            )
        return ids

    def _batch(self, texts: list[str], top_k: int, batch_size: int) -> list[list[list[Filling]]]:
        rows = [self._encode(text) for text in texts]
        blanks = [[i for i, token in enumerate(row) if token == self._mask_id] for row in rows]
        length = min(-(-max(map(len, rows)) // 32) * 32, self._max_length)
        num_blanks = max(map(len, blanks))
        tokens = np.zeros((batch_size if len(texts) > 1 else 1, length), np.int32)
        predicted = np.zeros((tokens.shape[0], num_blanks), np.int32)
        lengths = np.ones(tokens.shape[0], np.int32)
        for i, (row, masked) in enumerate(zip(rows, blanks, strict=True)):
            tokens[i, : len(row)] = row
            predicted[i, : len(masked)] = masked
            lengths[i] = len(row)
        probabilities = np.asarray(
            self._probabilities(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(predicted))
        )
        return [
            self._fillings(row, masked, probabilities[i], top_k)
            for i, (row, masked) in enumerate(zip(rows, blanks, strict=True))
        ]

    def _fillings(
        self, row: list[int], masked: list[int], probabilities: Any, top_k: int
    ) -> list[list[Filling]]:
        best = [np.argsort(-probabilities[j])[:top_k] for j in range(len(masked))]

        def filled(j: int, token: int) -> str:
            ids = list(row)
            for k, position in enumerate(masked):
                ids[position] = token if k == j else int(best[k][0])
            return self._tokenizer.decode(ids)

        return [
            [
                Filling(
                    token=self._tokenizer.decode([int(token)]).strip(),
                    probability=float(probabilities[j][token]),
                    text=filled(j, int(token)),
                )
                for token in best[j]
            ]
            for j in range(len(masked))
        ]
