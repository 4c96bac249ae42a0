"""What a fine-tuned model writes: for a user, in conversation, and as samples while it learns."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.instruction import Dialogue, Turn
from jaxlm.decode.generate import Generate, GenerateConfig, Generation
from jaxlm.errors import InputError
from jaxlm.peft import tuning
from jaxlm.runtime.storage import StoragePath, write_whole
from jaxlm.tasks.task import Responsive
from jaxlm.train.state import TrainState
from jaxlm.typing import Variables

SAMPLES = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Responder:
    """A model that responds.

    A space at the beginning of a response is dropped: decoders of whole words write one there.
    """

    task: Responsive
    framer: Framer
    generate: Generate

    def prompt(self, turns: Sequence[Turn], room: int | None = None) -> list[int]:
        """The tokens behind which a response to turns begins, or the last ``room`` of them."""
        return self.task.prompt_ids(self.framer, turns, room=room)

    def respond(
        self, dialogues: Sequence[Dialogue], config: GenerateConfig, *, room: int | None = None
    ) -> Iterator[Generation]:
        """The response to each."""
        prompts = (self.prompt(one.prompt, room) for one in dialogues)
        for written in self.generate(prompts, config):
            yield replace(written, text=written.text.removeprefix(" "))

    def stream(self, dialogue: Dialogue, config: GenerateConfig) -> Iterator[str]:
        """The response to one, in pieces."""
        pieces = self.generate.stream(self.prompt(dialogue.prompt), config)
        yield next(pieces, "").removeprefix(" ")
        yield from pieces


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
    call = lambda variables: model.apply(variables, jnp.zeros((1, 8), jnp.int32))
    # Adapters would be computed for each token.
    merge = jax.jit(lambda variables: tuning.merge(config.tuning, variables, call))
    compiled: list[Generate] = []

    def responder(variables: Variables) -> Responder:
        params = {"params": merge(variables)}
        generate = task.make_generate(decoder, params, tokenizer)
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
        if len(self._responder.prompt([*self._first, turn])) >= self._responder.generate.max_length:
            return 0, self._pieces([turn])
        turns = [*self._turns, turn]
        while len(turns) > 1 and not self._has_room(turns):
            turns, forgotten = turns[2:], forgotten + 1
        return forgotten, self._pieces(turns)

    def _has_room(self, turns: Sequence[Turn]) -> bool:
        size = len(self._responder.prompt([*self._first, *turns]))
        return size + self._config.max_new_tokens <= self._responder.generate.max_length

    def _pieces(self, turns: list[Turn]) -> Iterator[str]:
        dialogue = Dialogue(turns=(*self._first, *turns), origin="the conversation")
        pieces = []
        for piece in self._responder.stream(dialogue, self._config):
            pieces.append(piece)
            yield piece
        self._turns = [*turns, Turn("assistant", "".join(pieces))]


def make_samples(
    config: FinetuneConfig,
    make: Callable[[Variables], Responder],
    examples: Sequence[Dialogue],
    width: int,
) -> Callable[[TrainState], list[str]]:
    """The greedy responses of a state to the first of the examples, in lines of at most ``width``.

    They are written to the run folder, in place of those of this and of later steps. Of several
    processes none holds a whole model, and there are none.
    """
    task, path = config.task, config.directory / SAMPLES
    assert isinstance(task, Responsive)  # or there would be nothing to make
    chosen = [] if jax.process_count() > 1 else list(examples[: task.num_samples])
    greedy = GenerateConfig(max_new_tokens=task.sample_tokens)

    def samples(state: TrainState) -> list[str]:
        if not chosen:
            return []
        step, responder = int(state.step), make(state.variables)
        longest = responder.framer.max_length
        room = max(longest - task.sample_tokens, longest // 2)  # what is asked is cut at its left
        try:
            written = list(responder.respond(chosen, greedy, room=room))
        except InputError as error:  # such as of a model that has diverged: training goes on
            return [f"  no samples: {error}"]
        pairs = zip(chosen, written, strict=True)
        news = [_sample(step, dialogue, one) for dialogue, one in pairs]
        before = [json.loads(line) for line in _lines(path)]
        kept = [one for one in before if one["step"] < step]
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in (*kept, *news)]
        write_whole(path, "".join(lines))
        return [_line(one["prompt"], one["response"], width) for one in news]

    return samples


def _sample(step: int, dialogue: Dialogue, written: Generation) -> dict[str, Any]:
    return {
        "step": step,
        "origin": dialogue.origin,
        "prompt": dialogue.asked,
        "response": written.text,
        "stopped": written.stopped,
        "wanted": dialogue.response,
    }


def _lines(path: StoragePath) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _line(prompt: str, response: str, width: int) -> str:
    prompt, response = (" ".join(text.split()) for text in (prompt, response))
    half = max(width // 2 - 4, 8)
    if len(prompt) > half:
        prompt = f"{prompt[: half - 1]}…"
    line = f"  {prompt} → {response or '(nothing)'}"
    return line if len(line) <= width else f"{line[: width - 1]}…"
