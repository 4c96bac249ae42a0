"""Beam search: of each text the likeliest continuations, several of them if wanted."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from jaxlm.decode import beam_decoding
from jaxlm.decode.beam_decoding import Rules
from jaxlm.decode.causal_model import (
    CausalModel,
    bucket,
    left_padded,
    longest_first,
    require_several,
    shortened,
)
from jaxlm.decode.continuation import Continuation
from jaxlm.decode.generate import GenerateConfig, Generation, not_numbers, require_limits, stopped
from jaxlm.errors import InputError

LengthPenalty = Literal["hf", "gnmt"]
EarlyStopping = Literal["exact", "heuristic", "first"]


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """How the likeliest continuations are searched. Of other values only another size, and a limit
    that needs more room, compile anything."""

    size: int = 4
    """Continuations that are followed at a time; 1 takes the likeliest token each time."""
    n_best: int = 1
    """Continuations to give, best first; fewer where fewer were found."""
    length_penalty: LengthPenalty = "hf"
    """What sums of log-probabilities are divided by, or short texts would be best: hf, length **
    alpha, as in Hugging Face's generate; gnmt, ((5 + length) / 6) ** alpha (Wu et al. 2016). The
    length is that of what was added behind the prefix, its last token among it."""
    alpha: float = 1.0
    """0 compares the sums themselves; the larger, the longer texts become. With gnmt 0.6 is
    usual."""
    early_stopping: EarlyStopping = "exact"
    """When a text's search ends: exact, when nothing that may follow can be better than what was
    found; heuristic, when nothing would be at the length so far, as by default in Hugging Face's
    generate; first, when as many have ended as are followed, which is faster, and worse."""
    max_new_tokens: int = 128
    """The most tokens to add, those of the prefix among them."""
    min_new_tokens: int = 0
    """The fewest: before, stop tokens are not taken."""
    prefix: str = ""
    """How each continuation or target begins."""
    no_repeat_ngram: int | None = None
    """No run of so many tokens comes twice, the prompt's and the prefix's among them."""
    banned_tokens: tuple[str, ...] = ()
    """Tokens never to take, by their names in the vocabulary or by their texts."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens to end with, beside that of the end of a text; they are not part of the text."""

    def __post_init__(self) -> None:
        for name in ("banned_tokens", "stop_tokens"):
            require_several(name, vars(self)[name])
        if self.size < 1:
            raise InputError(f"size={self.size} is not above 0: 4 is usual, 1 is greedy")
        if not 1 <= self.n_best <= self.size:
            raise InputError(
                f"n_best={self.n_best} is not from 1 to size={self.size}, of which they are the "
                "best: raise size, or lower n_best"
            )
        if not math.isfinite(self.alpha):
            raise InputError(
                f"alpha={self.alpha} is not a finite number: 0 is no length penalty, 1 is usual"
            )
        if (n := self.no_repeat_ngram) is not None and n < 1:
            raise InputError(f"no_repeat_ngram={n} is not above 0; leave it out to allow all")
        require_limits(self.min_new_tokens, self.max_new_tokens)


Writing = GenerateConfig | BeamConfig  # two ways to write


@dataclass(frozen=True, kw_only=True)
class Hypothesis(Generation):
    """A continuation that was found; log-probabilities of tokens of the prefix are 0."""

    score: float
    """The sum of log-probabilities by the length penalty: the larger, the better."""
    others: tuple["Hypothesis", ...] = ()
    """The next best after the best, best first."""


def beyond_text(written: Generation) -> dict[str, Any]:
    """What answers say of a hypothesis beside its text: nothing of others."""
    if not isinstance(written, Hypothesis):
        return {}
    every = [
        {"text": one.text, "score": one.score, "log_probability": sum(one.log_probabilities)}
        for one in (written, *written.others)
    ]
    return {"score": written.score, "n_best": every}


class BeamSearch:
    """Searches the likeliest continuations of texts, a batch of texts at a time.

    Rows are padded, and programs compiled, as in :class:`~jaxlm.decode.generate.Generate`; there
    is one program for each number of rows and of beams, each bucket of lengths and each of room.
    """

    def __init__(self, model: CausalModel):
        self._model = model
        model = replace(model, variables={})  # none are kept by what is compiled

        def search(sources, prompts, lengths, rules, variables, *, num_beams, room):
            def inside(sources, prompts, lengths, rules, variables):
                kv_length = prompts.shape[1] + room - 1
                if model.read is None:
                    state = model.make_state(prompts.shape[0], kv_length)
                else:
                    state = model.read(variables, *sources, kv_length)
                given = variables, state, prompts, lengths, rules
                return beam_decoding.search(model.step, model.take, *given, num_beams, room)

            return model.traced(inside)(sources, prompts, lengths, rules, variables)

        self._search = jax.jit(search, static_argnames=("num_beams", "room"))

    def __call__(
        self,
        texts: Iterable[str | Sequence[int]],
        config: BeamConfig = BeamConfig(),
        *,
        batch_size: int | None = None,
    ) -> Iterator[Hypothesis]:
        """The best continuation of each text, or of the tokens of one; or target of each source.

        ``batch_size`` counts texts; unless given, there are as many beams as the model's. Sources
        are read all before the first target is written, those of like length together.
        """
        require_several("texts", texts)
        if batch_size is None:
            batch_size = max(1, self._model.batch_size // config.size)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is not above 0")
        if self._model.read is not None:
            sources = [self._model.source(text) for text in texts]

            def written(order: list[int]) -> Iterator[Hypothesis]:
                return self._in_batches([sources[i] for i in order], config, batch_size)

            yield from longest_first(sources, written)
            return
        yield from self._in_batches(texts, config, batch_size)

    def _in_batches(
        self, texts: Iterable[str | Sequence[int]], config: BeamConfig, batch_size: int
    ) -> Iterator[Hypothesis]:
        texts = iter(texts)
        while batch := list(islice(texts, batch_size)):
            yield from self._batch(batch, config, batch_size)

    def _batch(
        self, given: list[str | Sequence[int]], config: BeamConfig, batch_size: int
    ) -> Iterator[Hypothesis]:
        model, prefix = self._model, self._prefix(config)
        texts = [model.shown(text) for text in given]
        prompts = [model.prompt(text) for text in given]
        limits = [min(config.max_new_tokens, model.max_length - len(ids)) for ids in prompts]
        if (least := min(limits)) <= len(prefix):
            raise InputError(
                f"behind {shortened(texts[limits.index(least)])} there is room for {least} tokens, "
                f"and prefix={shortened(config.prefix)} has {len(prefix)}: shorten either"
            )
        stops = model.stops(config.stop_tokens)
        found, broken = self._run(given, prompts, limits, prefix, stops, config, batch_size)
        for i, (text, prompt, limit) in enumerate(zip(texts, prompts, limits, strict=True)):
            if broken[i]:
                raise not_numbers(text)
            best: list[Hypothesis] = []
            for j in range(config.n_best):
                if found.scores[i, j] == -math.inf:
                    break
                count = int(found.lengths[i, j])
                row = Continuation(model.decode, prompt, stop_tokens=stops, max_tokens=limit)
                row.extend([*prefix, *found.tokens[i, j, :count].tolist()])
                each = found.log_probabilities[i, j, :count].tolist()
                best.append(
                    Hypothesis(
                        prompt=text,
                        text=row.text,
                        tokens=row.tokens,
                        log_probabilities=[*[0.0] * len(prefix), *each],
                        stopped=stopped(row, config.max_new_tokens),
                        score=float(found.scores[i, j]),
                    )
                )
            if not best:
                raise InputError(
                    f"nothing can follow {shortened(text)}: banned_tokens, no_repeat_ngram and "
                    "min_new_tokens together leave no token; lower one of them"
                )
            yield replace(best[0], others=tuple(best[1:]))

    def _prefix(self, config: BeamConfig) -> list[int]:
        prefix = self._model.encode(config.prefix) if config.prefix else []
        if config.prefix and not prefix:
            raise InputError(f"prefix={config.prefix!r} holds no token: leave it out")
        if len(prefix) >= config.max_new_tokens:
            raise InputError(
                f"prefix={shortened(config.prefix)} has {len(prefix)} tokens, which count among "
                f"max_new_tokens={config.max_new_tokens}: raise that above {len(prefix)}"
            )
        return prefix

    def _run(
        self,
        texts: Sequence[str | Sequence[int]],
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        prefix: list[int],
        stops: set[int],
        config: BeamConfig,
        batch_size: int,
    ) -> Any:
        model = self._model
        spare = model.num_rows(len(prompts), batch_size) - len(prompts)  # copies of the first
        begun = [[*prompt, *prefix] for prompt in (*prompts, *[prompts[0]] * spare)]
        lengths = np.array([len(ids) for ids in begun], np.int32)
        length, read = bucket(int(lengths.max())), None
        if model.read is not None:
            length = int(lengths.max())  # equal for all sources
            sources = [model.source(text) for text in texts]
            read = model.source_arrays([*sources, *[sources[0]] * spare])
        new = np.array([*(limit - len(prefix) for limit in limits), *[0] * spare], np.int32)
        room = bucket(length + int(new.max()) - 1) - length + 1
        rules = self._rules(config, len(prefix), stops, new, room)
        rows = model.put((read, left_padded(begun, length), lengths))
        return jax.device_get(
            self._search(*rows, rules, model.arranged, num_beams=config.size, room=room)
        )

    def _rules(
        self, config: BeamConfig, given: int, stops: set[int], limits: Any, room: int
    ) -> Rules:
        model = self._model
        banned: Any = model.banned(config.banned_tokens, stops, config.min_new_tokens)
        ends = sorted(stop for stop in stops if not banned[stop])
        several = 1 << max(len(ends) - 1, 0).bit_length()  # few numbers are compiled
        banned[list(stops)] = True
        table: Any = divisors(config, room)
        if not (np.isfinite(table) & (table > 0)).all():
            raise InputError(
                f"alpha={config.alpha} makes scores of {room} tokens that are not numbers: 0 is no "
                "length penalty, 1 is usual"
            )
        prospects = model.put(_prospects(config, table, limits))

        def whole(value: Any) -> Any:
            return np.asarray(value, np.int32)

        return Rules(
            banned=banned,
            stops=whole([*ends, *[-1] * (several - len(ends))]),
            min_tokens=whole(max(0, config.min_new_tokens - given)),
            no_repeat_ngram=whole(config.no_repeat_ngram or 0),
            divisors=table,
            max_tokens=model.put(limits),
            prospects=prospects,
        )


def divisors(config: BeamConfig, most: int) -> Float[np.ndarray, " lengths"]:
    """What sums are divided by at each length from 0 to the most; at 0 it is 1."""
    lengths = np.arange(most + 1.0)
    base = lengths if config.length_penalty == "hf" else (5 + lengths) / 6
    with np.errstate(over="ignore", divide="ignore"):
        table = (base**config.alpha).astype(np.float32)
    table[0] = 1
    return table


def _prospects(
    config: BeamConfig, table: Float[np.ndarray, " lengths"], limits: Any
) -> Float[np.ndarray, "batch lengths"]:
    """What sums at each length are divided by, to be above all scores that may become of them.

    Sums only fall: a score is best with no further loss and the largest divisor to come.
    """
    # A beam of one is greedy decoding, which ends with its first stop token.
    if config.early_stopping == "first" or config.size == 1:
        return np.zeros((len(limits), len(table)), np.float32)
    if config.early_stopping == "heuristic":
        return np.tile(table, (len(limits), 1))
    lengths = np.arange(len(table))
    within = np.where(lengths[None, :] <= limits[:, None], table[None, :], 0)
    largest = np.maximum.accumulate(within[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([largest[:, 1:], np.zeros_like(largest[:, :1])], axis=1)
