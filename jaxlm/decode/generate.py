"""Continuing texts: greedily or by sampling, whole or piece by piece."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from jaxlm.decode import decoding
from jaxlm.decode.causal_model import (
    CausalModel,
    bucket,
    left_padded,
    longest_first,
    require_several,
    shortened,
)
from jaxlm.decode.continuation import Continuation, Stopped
from jaxlm.decode.decoding import Progress
from jaxlm.decode.sampling import Sampling
from jaxlm.errors import InputError

_ROOM = 128  # there is for so many new tokens at least: it costs little, and limits share programs


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How a text is continued. Other values compile nothing, unless a limit needs more room."""

    max_new_tokens: int = 128
    """The most tokens to add."""
    min_new_tokens: int = 0
    """The fewest: before, stop tokens are not taken, and stop strings do not count."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples from the model's probabilities, less makes
    likely tokens likelier."""
    top_k: int | None = None
    """Sample from the so many likeliest tokens."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability, after temperature and
    top_k; the one with which they reach it is among them."""
    min_p: float | None = None
    """Sample from tokens at least this many times as likely as the likeliest, after temperature."""
    repetition_penalty: float | None = None
    """Make tokens of the prompt and of the continuation less likely: their logits are divided by
    this, or multiplied where negative. 1.2 is usual."""
    banned_tokens: tuple[str, ...] = ()
    """Tokens never to take, by their names in the vocabulary or by their texts."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens to end with, beside that of the end of a text; they are not part of the text."""
    stop_strings: tuple[str, ...] = ()
    """Strings to end before. A string may be spread over several tokens."""
    seed: int = 0
    """What a text becomes depends on this and on its number among the texts, not on its batch."""

    def __post_init__(self) -> None:
        for name in ("banned_tokens", "stop_tokens", "stop_strings"):
            require_several(name, vars(self)[name])
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature={self.temperature} is not a number from 0 up: 0 is greedy, 1 the "
                "model's own probabilities"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} is not above 0; leave it out for all tokens")
        for name in ("top_p", "min_p"):
            value = vars(self)[name]
            if value is not None and not 0 < value <= 1:
                raise InputError(
                    f"{name}={value} is not above 0 and at most 1; leave it out for all tokens"
                )
        for name in ("top_k", "top_p", "min_p"):
            if vars(self)[name] is not None and self.temperature == 0:
                raise InputError(
                    f"{name}={vars(self)[name]} changes nothing at temperature=0, which takes the "
                    "likeliest token: set temperature=1, or leave it out"
                )
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < penalty < math.inf:
            raise InputError(
                f"repetition_penalty={penalty} is not a number above 0: above 1 it makes "
                "repetitions rarer; leave it out for none"
            )
        require_limits(self.min_new_tokens, self.max_new_tokens)
        if "" in self.stop_strings:
            raise InputError("a stop string is empty, and would end every text: leave it out")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} is not from 0 to {2**32 - 1}")


def not_numbers(text: str) -> InputError:
    """What to say of logits behind a text that are NaN."""
    return InputError(
        f"the model's logits behind {shortened(text)} are not numbers: training has diverged, or "
        "the weights are damaged; take an earlier step"
    )


def require_limits(min_new_tokens: int, max_new_tokens: int) -> None:
    """Raises for numbers of new tokens that cannot be."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} is not above 0")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InputError(
            f"min_new_tokens={min_new_tokens} is not from 0 to max_new_tokens={max_new_tokens}"
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A prompt's continuation."""

    prompt: str
    text: str
    """What was added to the prompt."""
    tokens: list[int]
    """The new tokens, up to a stop token or the end of a stop string, which are among them."""
    log_probabilities: list[float]
    """Each of these tokens', in nats, by the model itself: untouched by temperature and rules."""
    stopped: Stopped
    """Why it ended; ``max_length``: prompt and continuation fill the model's positions."""


class Generate:
    """Continues texts, a batch at a time.

    Prompts are padded to the lengths of :func:`~jaxlm.decode.causal_model.bucket`, and so is the
    room for prompt and continuation, of which limits up to 128 need the same. For each pair of
    these, and each number of rows (a power of two), two programs are compiled, whatever the
    configuration: one reads prompts, one goes on.
    """

    def __init__(self, model: CausalModel):
        self._model = model
        model = replace(model, variables={})  # none are kept by what is compiled

        def begin(sources, tokens, lengths, sampling, variables, *, kv_length):
            def inside(sources, tokens, lengths, sampling, variables):
                if model.read is None:
                    state = model.make_state(tokens.shape[0], kv_length)
                else:
                    state = model.read(variables, *sources, kv_length)
                return decoding.begin(
                    model.step, variables, state, tokens, lengths, sampling, kv_length
                )

            return model.traced(inside)(sources, tokens, lengths, sampling, variables)

        def advance(state, progress, sampling, ended, steps, variables, *, places):
            step = model.traced(partial(decoding.advance, model.step))
            leaves, tree = jax.tree.flatten(
                step(variables, state, progress, sampling, ended, steps)
            )
            # Where they lay before, or the next call would need another program.
            leaves = map(jax.lax.with_sharding_constraint, leaves, places) if places else leaves
            return jax.tree.unflatten(tree, leaves)

        self._begin = jax.jit(begin, static_argnames="kv_length")
        self._advance = jax.jit(advance, donate_argnums=0, static_argnames="places")

    @property
    def model(self) -> CausalModel:
        """What writes."""
        return self._model

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and its continuation together."""
        return self._model.max_length

    def check(self, text: str | Sequence[int]) -> None:
        """:class:`InputError` for a prompt that cannot be continued: empty, or too long."""
        self._model.prompt(text)

    def __call__(
        self,
        texts: Iterable[str | Sequence[int]],
        config: GenerateConfig = GenerateConfig(),
        *,
        batch_size: int | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Generation]:
        """The continuation of each text, or of the tokens of one; or the target of each source.

        ``numbers`` are theirs among all texts, for the seed of each: from 0 on unless given.
        ``batch_size`` is the model's unless given. Sources are read all before the first target is
        written, those of like length together.
        """
        require_several("texts", texts)
        batch_size = self._model.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is not above 0")
        numbered = enumerate(texts) if numbers is None else zip(numbers, texts, strict=True)
        if self._model.read is not None:
            sources = [(number, self._model.source(text)) for number, text in numbered]

            def written(order: list[int]) -> Iterator[Generation]:
                return self._in_batches([sources[i] for i in order], config, batch_size)

            yield from longest_first([source for _, source in sources], written)
            return
        yield from self._in_batches(numbered, config, batch_size)

    def _in_batches(
        self,
        numbered: Iterable[tuple[int, str | Sequence[int]]],
        config: GenerateConfig,
        batch_size: int,
    ) -> Iterator[Generation]:
        numbered = iter(numbered)
        while batch := list(islice(numbered, batch_size)):
            # Stop strings are looked for on the host, now and then.
            steps = 8 if config.stop_strings else self._model.max_length
            rows = _Rows(self._model, batch, config)
            *_, progress = self._run(rows, batch_size, steps)
            yield from rows.generations(progress)

    def stream(
        self,
        text: str | Sequence[int],
        config: GenerateConfig = GenerateConfig(),
        *,
        number: int = 0,
        steps: int = 1,
    ) -> Iterator[str]:
        """The continuation in pieces: after the first token, then after each ``steps`` more.

        Together they are the text that a call gives for the text of this number.
        """
        rows = _Rows(self._model, [(number, text)], config)
        (row,) = rows.continuations
        for _ in self._run(rows, 1, steps):
            if piece := row.show():
                yield piece

    def of(self, other: "Generate | None") -> "Generate":
        """The other, whose model has other values: with what this one has compiled.

        None: without any values, to be kept for that.
        """
        same = copy.copy(self)
        same._model = other._model if other else replace(self._model, variables={})
        return same

    def _run(self, rows: "_Rows", batch_size: int, steps: int) -> Iterator[Progress]:
        """Runs the model ``steps`` tokens at a time, until all rows have ended."""
        model = self._model
        *given, kv_length = rows.arrays(batch_size)
        sources, tokens, lengths, sampling = model.put(given)
        state, progress = self._begin(
            sources, tokens, lengths, sampling, model.arranged, kv_length=kv_length
        )
        places = tuple(x.sharding for x in jax.tree.leaves((state, progress)) if model.mesh)
        while not all(ended := rows.extend(progress)):
            yield progress
            every = model.put(np.array([*ended, *[True] * (len(tokens) - len(ended))]))
            state, progress = self._advance(
                state, progress, sampling, every, np.int32(steps), model.arranged, places=places
            )
        yield progress


def stopped(row: Continuation, max_new_tokens: int) -> Stopped:
    """Why a row has ended that may have had less room than that."""
    assert row.stopped is not None
    short = row.stopped == "max_new_tokens" and len(row.tokens) < max_new_tokens
    return "max_length" if short else row.stopped


class _Rows:
    """A batch of prompts and what has become of them."""

    def __init__(
        self,
        model: CausalModel,
        numbered: Sequence[tuple[int, str | Sequence[int]]],
        config: GenerateConfig,
    ):
        self._model, self._config = model, config
        self._numbers, texts = map(list, zip(*numbered, strict=True))
        self._texts = [model.shown(text) for text in texts]
        self._prompts = [model.prompt(text) for text in texts]
        self._sources = None if model.read is None else [model.source(text) for text in texts]
        self._limits = [
            min(config.max_new_tokens, model.max_length - len(prompt)) for prompt in self._prompts
        ]
        self._stops = model.stops(config.stop_tokens)
        for stop in config.stop_strings:
            if any(name in stop for name in model.special_tokens):
                raise InputError(
                    f"the stop string {stop!r} holds a special token, which has no text: name it "
                    "in stop_tokens"
                )
        self.continuations = [
            Continuation(
                model.decode,
                prompt,
                stop_tokens=self._stops,
                stop_strings=config.stop_strings,
                min_tokens=config.min_new_tokens,
                max_tokens=limit,
            )
            for prompt, limit in zip(self._prompts, self._limits, strict=True)
        ]

    def arrays(self, batch_size: int) -> tuple[Any, Any, Any, Sampling, int]:
        """Sources if there are any, tokens, their numbers and rules, and the room they need."""
        config, model = self._config, self._model
        count = model.num_rows(len(self._prompts), batch_size)
        spare = count - len(self._prompts)  # copies of the first, which end at once
        prompts = [*self._prompts, *[self._prompts[0]] * spare]
        longest = max(map(len, prompts))
        length = bucket(longest) if self._sources is None else longest  # equal for all sources
        banned: Any = model.banned(config.banned_tokens, self._stops, config.min_new_tokens)
        stops: Any = np.zeros_like(banned)
        stops[list(self._stops)] = True

        def tiled(row: Any) -> Any:
            return np.tile(row, (count, 1))

        def full(value: Any, dtype: Any = np.float32) -> Any:
            return np.full(count, value, dtype)

        numbers: Any = np.array([*self._numbers, *[0] * spare], np.int32)
        limits: Any = np.array([*self._limits, *[1] * spare], np.int32)
        sampling = Sampling(
            temperature=full(config.temperature),
            top_k=full(min(config.top_k or model.vocab_size, model.vocab_size), np.int32),
            top_p=full(config.top_p or 1),
            min_p=full(config.min_p or 0),
            repetition_penalty=full(config.repetition_penalty or 1),
            banned=tiled(banned),
            stops=tiled(stops),
            min_tokens=full(config.min_new_tokens, np.int32),
            max_tokens=limits,
            seed=full(config.seed, np.uint32),
            number=numbers,
        )
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        room = bucket(length + max(_ROOM, *self._limits))
        sources = self._sources and [*self._sources, *[self._sources[0]] * spare]
        read = model.source_arrays(sources) if sources else None
        return read, left_padded(prompts, length), lengths, sampling, room

    def extend(self, progress: Progress) -> list[bool]:
        """Takes over what is new; gives which rows have ended."""
        tokens, lengths = np.asarray(progress.tokens), np.asarray(progress.lengths)
        log_probabilities = np.asarray(progress.log_probabilities)
        for i, row in enumerate(self.continuations):
            if row.stopped is None:
                new = slice(len(row.tokens), lengths[i])
                if np.isnan(log_probabilities[i, new]).any():
                    raise not_numbers(self._texts[i])
                row.extend(tokens[i, new].tolist())
        return [row.stopped is not None for row in self.continuations]

    def generations(self, progress: Progress) -> Iterator[Generation]:
        """What has become of each prompt, once all have ended."""
        log_probabilities = np.asarray(progress.log_probabilities)
        for i, (text, row) in enumerate(zip(self._texts, self.continuations, strict=True)):
            yield Generation(
                prompt=text,
                text=row.text,
                tokens=row.tokens,
                log_probabilities=log_probabilities[i, : len(row.tokens)].tolist(),
                stopped=stopped(row, self._config.max_new_tokens),
            )
