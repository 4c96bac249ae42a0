"""Choosing among given continuations by their likelihood: a classifier without a head."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.decode.causal_model import CausalModel, bucket, left_padded, require_several, shortened
from jaxlm.decode.decoding import layout
from jaxlm.errors import InputError

Per = Literal["text", "token", "byte"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the given continuations of a prompt."""

    text: str
    log_probability: float
    """That of all its tokens behind the prompt, in nats, by the model itself."""
    num_tokens: int
    """How many these are."""
    probability: float
    """Among the choices: they sum to 1."""


class Choose:
    """Ranks given continuations of texts, a batch of texts at a time.

    A text and a continuation are encoded together, as one text: their border may lie in a token.
    What all continuations of a text have in common is read once, and each goes on from there.
    """

    def __init__(self, model: CausalModel):
        self._model = model

        def scores(prompts, lengths, choices, counts, variables, *, kv_length):
            def inside(prompts, lengths, choices, counts, variables):
                return _scores(model, prompts, lengths, choices, counts, variables, kv_length)

            return model.traced(inside)(prompts, lengths, choices, counts, variables)

        self._scores = jax.jit(scores, static_argnames="kv_length")

    def __call__(
        self,
        texts: Iterable[str],
        choices: Sequence[str],
        *,
        per: Per = "text",
        batch_size: int = 8,
    ) -> Iterator[list[Choice]]:
        """For each text the choices, likeliest first.

        Longer choices are less likely: ``per="token"`` compares the means over tokens, and
        ``per="byte"`` those over bytes of UTF-8, which do not depend on the tokenizer.
        """
        require_several("texts", texts)
        require_several("choices", choices)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is not above 0")
        if per not in get_args(Per):
            raise InputError(f"per={per!r} is none of {', '.join(get_args(Per))}")
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise InputError(f"choices={list(choices)} are not two or more different ones")
        texts = iter(texts)
        while batch := list(islice(texts, batch_size)):
            yield from self._batch(batch, choices, per, batch_size)

    def _split(self, text: str, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """What all choices share, and the rest of each."""
        model = self._model
        prompt = model.prompt(text)
        whole = [[*model.start, *model.encode(text + choice)] for choice in choices]
        for choice, ids in zip(choices, whole, strict=True):
            if len(ids) <= len(prompt) and ids == prompt[: len(ids)]:
                raise InputError(f"the choice {choice!r} adds no token to {shortened(text)}")
            if len(ids) > model.max_length:
                raise InputError(
                    f"{shortened(text)} with the choice {shortened(choice)} has {len(ids)} tokens, "
                    f"more than the model's {model.max_length}: shorten either"
                )
        shared = 0
        for column in zip(prompt, *whole, strict=False):
            if len(set(column)) > 1:
                break
            shared += 1
        shared = min(shared, *(len(ids) - 1 for ids in whole))
        if not shared:
            raise InputError(
                f"the choices join the first token of {shortened(text)}: begin each with a space"
            )
        return prompt[:shared], [ids[shared:] for ids in whole]

    def _batch(
        self, texts: list[str], choices: Sequence[str], per: Per, batch_size: int
    ) -> Iterator[list[Choice]]:
        split = [self._split(text, choices) for text in texts]
        count = self._model.num_rows(len(split), batch_size)
        split += [split[0]] * (count - len(split))
        prompts = [prompt for prompt, _ in split]
        length = bucket(max(map(len, prompts)))
        counts = np.array([[len(rest) for rest in rests] for _, rests in split], np.int32)
        longest = 1 << int(counts.max() - 1).bit_length()
        tokens = np.zeros((*counts.shape, longest), np.int32)
        for i, (_, rests) in enumerate(split):
            for j, rest in enumerate(rests):
                tokens[i, j, : len(rest)] = rest
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        rows = self._model.put((left_padded(prompts, length), lengths, tokens, counts))
        room = bucket(length + longest)
        scores = np.asarray(self._scores(*rows, self._model.arranged, kv_length=room))
        for score, num_tokens in zip(scores[: len(texts)], counts, strict=False):
            yield _ranked(choices, score, num_tokens, per)


def _ranked(
    choices: Sequence[str],
    score: Float[np.ndarray, " choices"],
    num_tokens: Int[np.ndarray, " choices"],
    per: Per,
) -> list[Choice]:
    sizes = {
        "text": np.ones(len(choices)),
        "token": num_tokens,
        "byte": np.array([len(choice.encode()) for choice in choices]),
    }
    compared = score / sizes[per]
    likelihood = np.exp(compared - compared.max())
    return [
        Choice(
            text=choices[int(j)],
            log_probability=float(score[j]),
            num_tokens=int(num_tokens[j]),
            probability=float(likelihood[j] / likelihood.sum()),
        )
        for j in np.argsort(-compared, kind="stable")
    ]


def _scores(
    model: CausalModel,
    prompts: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    choices: Int[Array, "batch choices tokens"],
    counts: Int[Array, "batch choices"],
    variables,
    kv_length: int,
) -> Float[Array, "batch choices"]:
    """Summed log-probabilities of the first ``counts`` tokens of each choice."""
    positions, segment_ids = layout(lengths, prompts.shape[1])
    state = model.make_state(len(prompts), kv_length)
    logits, state = model.step(variables, state, prompts, positions, segment_ids)
    first = logits[:, -1:]
    column = jnp.arange(choices.shape[2])[None, :]

    step_all = model.step_all or model.step

    def one(choice: tuple[Array, Array]) -> Float[Array, " batch"]:
        # Each starts from the same state: it is a value, and nothing is written into it.
        tokens, count = choice
        logits = first
        if (given := tokens.shape[1] - 1) > 0:
            positions = lengths[:, None] + jnp.minimum(column[:, :given], count[:, None] - 1)
            segment_ids = jnp.where(column[:, :given] < count[:, None] - 1, 0, -1)
            after, _ = step_all(variables, state, tokens[:, :-1], positions, segment_ids)
            if after.shape[1] != given:
                raise InputError(
                    "choices of several tokens need the logits of all positions: give step_all"
                )
            logits = jnp.concatenate([first, after], axis=1)
        logits = logits[..., : model.vocab_size]
        taken = jnp.take_along_axis(logits, tokens[..., None], axis=2)[..., 0]
        log_probabilities = taken - jax.nn.logsumexp(logits, axis=-1)
        return jnp.where(column < count[:, None], log_probabilities, 0).sum(axis=1)

    by_choice = rearrange(choices, "batch choices tokens -> choices batch tokens")
    sums = lax.map(one, (by_choice, rearrange(counts, "batch choices -> choices batch")))
    return rearrange(sums, "choices batch -> batch choices")
