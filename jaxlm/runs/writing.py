"""What a fine-tuned model writes: for a user, in conversation, and as samples while it learns."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
from tokenizers import Tokenizer

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.instruction import Dialogue, Turn
from jaxlm.data.tabular import json_text
from jaxlm.decode.beam import BeamConfig, BeamSearch, Hypothesis, Writing
from jaxlm.decode.generate import Generate, GenerateConfig, Generation
from jaxlm.errors import InputError
from jaxlm.models.model import example_inputs
from jaxlm.peft import tuning
from jaxlm.runtime.storage import StoragePath, write_whole
from jaxlm.tasks.task import Responsive, Scored
from jaxlm.train.state import TrainState
from jaxlm.typing import Variables

SAMPLES = "samples.jsonl"
GREEDY_BEAM = BeamConfig(size=1)


@dataclass(frozen=True, kw_only=True)
class Responder:
    """A model that responds.

    A space at the beginning of a response is dropped: decoders of whole words write one there.
    """

    task: Responsive
    framer: Framer
    generate: Generate

    def prompt(self, example: Any, room: int | None = None) -> list[int]:
        """The tokens that a response is a response to, or so many as have ``room``."""
        return self.task.prompt_ids(self.framer, example, room=room)

    @cached_property
    def search(self) -> BeamSearch:
        """What searches responses with the same model."""
        return BeamSearch(self.generate.model)

    def respond(
        self,
        examples: Sequence[Any],
        config: Writing,
        *,
        room: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Generation]:
        """The response to each; by beam search a :class:`~jaxlm.decode.beam.Hypothesis`.

        ``numbers`` are theirs among all examples: from 0 on unless given.
        """
        prompts = (self.prompt(one, room) for one in examples)
        if isinstance(config, BeamConfig):
            for best in self.search(prompts, config):
                yield replace(_without_space(best), others=tuple(map(_without_space, best.others)))
            return
        for written in self.generate(prompts, config, numbers=numbers):
            yield replace(written, text=written.text.removeprefix(" "))

    def stream(self, example: Any, config: GenerateConfig) -> Iterator[str]:
        """The response to one, in pieces."""
        pieces = self.generate.stream(self.prompt(example), config)
        yield next(pieces, "").removeprefix(" ")
        yield from pieces


def _without_space(one: Hypothesis) -> Hypothesis:
    return replace(one, text=one.text.removeprefix(" "))


def chosen_way(generate: GenerateConfig, beam: BeamConfig) -> Writing:
    """Beam search where ``beam`` is other than greedy; raises where both say how to write."""
    if beam == GREEDY_BEAM:
        return generate
    if generate != GenerateConfig():
        raise InputError(
            f"generate and beam (size={beam.size}) are two ways to write: leave out one; limits, "
            "bans and stop tokens are beam's as well, such as --beam.max-new-tokens"
        )
    return beam


def make_responder(
    config: FinetuneConfig, model: nn.Module, framer: Framer, tokenizer: Tokenizer
) -> Callable[[Variables], Responder]:
    """What makes a responder of a state's variables; they share what is compiled.

    Raises :class:`InputError` where models do not write that are tuned for the config's task.
    """
    task = config.task
    if not isinstance(task, Responsive):
        raise InputError(
            f"{config.name} was trained for {type(task).__name__}, which does not write: use "
            f"{task.verb}"
        )
    decoder = config.model
    assert decoder is not None  # resolved
    inputs = example_inputs(decoder)
    call = lambda variables: model.apply(variables, *inputs)
    # Adapters would be computed for each token.
    merge = jax.jit(lambda variables: tuning.merge(config.tuning, variables, call))
    compiled: list[Generate] = []

    def responder(variables: Variables) -> Responder:
        params = {"params": merge(variables)}
        generate = task.make_generate(decoder, params, tokenizer)
        if framer.source is not framer:
            own = {"source_tokenizer": framer.source.tokenizer}
            generate = Generate(replace(generate.model, **own))
        compiled[:] = compiled or [generate.of(None)]  # which keeps no parameters alive
        return Responder(task=task, framer=framer, generate=compiled[0].of(generate))

    return responder


class Conversation:
    """Turns with a user, of which the oldest are forgotten where all have no room."""

    def __init__(self, responder: Responder, config: GenerateConfig, *, system: str | None = None):
        self._responder, self._config = responder, config
        self._first = [] if system is None else [Turn("system", system)]
        self._turns: list[Turn] = []  # in pairs

    def say(self, text: str) -> tuple[int, Iterator[str]]:
        """How many of the user's turns are forgotten for it, and the response in pieces.

        It is remembered when its last piece has been taken. Raises :class:`InputError` with the
        first where the text alone is too long, and forgets nothing.
        """
        turn, forgotten = Turn("user", text), 0
        if self._size([turn]) >= self._responder.generate.max_length:
            return 0, self._pieces([turn])
        turns = [*self._turns, turn]
        while len(turns) > 1 and not self._has_room(turns):
            turns, forgotten = turns[2:], forgotten + 1
        return forgotten, self._pieces(turns)

    def _has_room(self, turns: Sequence[Turn]) -> bool:
        size = self._size(turns) + self._config.max_new_tokens
        return size <= self._responder.generate.max_length

    def _size(self, turns: Sequence[Turn]) -> int:
        return len(self._responder.prompt(self._dialogue(turns)))

    def _dialogue(self, turns: Sequence[Turn]) -> Dialogue:
        return Dialogue(turns=(*self._first, *turns), origin="the conversation")

    def _pieces(self, turns: list[Turn]) -> Iterator[str]:
        pieces = []
        for piece in self._responder.stream(self._dialogue(turns), self._config):
            pieces.append(piece)
            yield piece
        self._turns = [*turns, Turn("assistant", "".join(pieces))]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a state writes at an evaluation."""

    written: list[Generation]
    """What is written for the first examples: nothing where several processes share the model."""
    lines: list[str]
    """Some of it, to be shown."""


def make_samples(
    config: FinetuneConfig,
    make: Callable[[Variables], Responder],
    examples: Sequence[Any],
    width: int,
) -> Callable[[TrainState], Samples]:
    """The greedy responses of a state to the first of the examples, in lines of at most ``width``.

    Those shown are written to the run folder, in place of those of this and of later steps. Of
    several processes none holds a whole model, and there are none.
    """
    task, path = config.task, config.directory / SAMPLES
    assert isinstance(task, Responsive)  # or there would be nothing to make
    wanted = task.num_scored if isinstance(task, Scored) else 0
    count = len(examples) if wanted is None else max(wanted, task.num_samples)
    chosen = [] if jax.process_count() > 1 else list(examples[:count])
    greedy = GenerateConfig(max_new_tokens=task.sample_tokens)

    def samples(state: TrainState) -> Samples:
        if not chosen:
            return Samples(written=[], lines=[])
        step, responder = int(state.step), make(state.variables)
        longest = responder.framer.max_length
        room = max(longest - task.sample_tokens, longest // 2)  # what is asked is cut at its left
        try:
            written = list(responder.respond(chosen, greedy, room=room))
        except InputError as error:  # such as of a model that has diverged: training goes on
            return Samples(written=[], lines=[f"  no samples: {error}"])
        pairs = zip(chosen[: task.num_samples], written, strict=False)
        news = [_sample(step, example, one) for example, one in pairs]
        kept = [one for one in _samples_in(path) if one["step"] < step]
        lines = [json_text(one) + "\n" for one in (*kept, *news)]
        write_whole(path, "".join(lines))
        shown = [line for one in news for line in _lines_of(one, width)]
        return Samples(written=written[:wanted], lines=shown)

    return samples


def _sample(step: int, example: Any, written: Generation) -> dict[str, Any]:
    return {
        "step": step,
        "origin": example.origin,
        "prompt": example.asked,
        "response": written.text,
        "stopped": written.stopped,
        "wanted": example.response,
    }


def _samples_in(path: StoragePath) -> list[dict[str, Any]]:
    # Not str.splitlines, which also splits at characters that JSON does not escape.
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line]


def _lines_of(sample: dict[str, Any], width: int) -> Iterator[str]:
    """What was asked and written; below it what was wanted, where that is known."""
    prompt, response = (" ".join(sample[name].split()) for name in ("prompt", "response"))
    yield _cut(f"  {_cut(prompt, max(width // 2 - 4, 8))} → {response or '(nothing)'}", width)
    if sample["wanted"] is not None:
        yield _cut(f"    wanted: {' '.join(sample['wanted'].split())}", width)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"
