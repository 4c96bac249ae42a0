"""Span corruption: what is hidden, what writes it, and how it is used afterwards."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.special_tokens import sentinel, sentinels
from jaxlm.decode.beam import BeamConfig, BeamSearch, Hypothesis, Writing
from jaxlm.decode.fill_mask import MASK
from jaxlm.decode.generate import Generate, Generation
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import perplexity
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.model import ModelConfig, is_two_sided
from jaxlm.objectives import span_corruption
from jaxlm.objectives.masking import Vocabulary
from jaxlm.objectives.span_corruption import SpanConfig
from jaxlm.tasks.seq2seq import encoder_decoder
from jaxlm.tasks.task import Given
from jaxlm.typing import Apply, Loss, Variables

_BLANK = re.compile(rf"{re.escape(MASK)}|<extra_id_\d+>")


@dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Write the spans that are hidden in a text (T5; Raffel et al. 2020, section 3.1.4)."""

    spans: SpanConfig = field(default_factory=SpanConfig)
    """What is hidden."""
    isolate_documents: bool = False
    """Documents that share a row do not attend to each other, on either side, and each counts
    positions from 0; sentinels are numbered along the row all the same."""

    @property
    def verb(self) -> str:
        """What scripts/predict.py calls its use."""
        return "fill-spans"

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return f'"A text with {sentinel(0)} and {sentinel(1)}."'

    def for_evaluation(self) -> "SpanCorruption":
        """The same."""
        return self

    def num_predicted(self, length: int) -> int:
        """Tokens of the target of a row."""
        return self.spans.targets_length(length)

    def more_flops(self, config: ModelConfig, length: int) -> float:
        """Fewer than of a source as long as the row: spans are a sentinel each."""
        target = self.num_predicted(length)
        source = self.spans.inputs_length(length)
        return config.forward_flops(source, target) - config.forward_flops(length, target)

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """None; raises where such rows have too few tokens, or the tokenizer sentinels."""
        self.spans.check(tokens.shape[1], vocabulary)
        return ""

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The encoder and the decoder with the head of their architecture."""
        if not is_two_sided(config):
            other = "CausalLm" if config.is_causal else "MaskedLm"
            raise InputError(
                f"task=SpanCorruption reads a text with an encoder and writes what is hidden in it "
                f"with a decoder, and {type(config).__name__} is one of them alone: use "
                f"task={other}, or a T5"
            )
        return EncoderDecoderLm(config.make(), config.make_lm_head())

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """Perplexity of a token of a target, sentinels and ends among them."""
        return {"perplexity": perplexity(loss)}

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """The cross-entropy of targets."""
        return span_corruption.make_loss(
            apply, vocabulary, self.spans, isolate_documents=self.isolate_documents
        )

    def answers(
        self,
        config: ModelConfig,
        variables: Variables,
        tokenizer: Tokenizer,
        texts: Sequence[Given],
        *,
        top_k: int,
        generate: Writing,
    ) -> Iterator[dict[str, Any]]:
        """For each text what is written for its blanks, or what is wrong.

        Blanks are [MASK] or sentinels, and are numbered as they come.
        """
        model = encoder_decoder(self.make_model(config), config, variables, tokenizer)
        names = {i: number for number, i in enumerate(sentinels(tokenizer))}

        def problem(origin: str, text: str) -> str:
            blanks, size = len(_BLANK.findall(text)), len(tokenizer.encode(_numbered(text)).ids)
            if not blanks:
                return (
                    f"{origin} has no blank: write {MASK} or {sentinel(0)} where words are missing"
                )
            if blanks >= len(names):
                return f"{origin} has {blanks} blanks, and the tokenizer is for {len(names) - 1}"
            if size > model.max_length:
                return f"{origin} has {size} tokens, more than the model's {model.max_length}"
            return ""

        problems = [problem(origin, text) for _, origin, text in texts]
        pairs = list(zip(texts, problems, strict=True))
        right = [given for given, error in pairs if not error]
        sources = [_numbered(given.text) for given in right]
        written: Iterator[Generation] = (
            BeamSearch(model)(sources, generate)
            if isinstance(generate, BeamConfig)
            else Generate(model)(sources, generate, numbers=[given.number for given in right])
        )
        for given, error in pairs:
            if error:
                yield {"error": error}
                continue
            one, ids = next(written), tokenizer.encode(_numbered(given.text)).ids

            def filled(one: Generation, ids: list[int] = ids) -> dict[str, Any]:
                found = _spans(one.tokens, names)
                whole = [found.get(names[i], []) if i in names else [i] for i in ids]
                text = tokenizer.decode(list(chain.from_iterable(whole)))
                spans = [found.get(names[i]) for i in ids if i in names]
                shown = [None if span is None else tokenizer.decode(span).strip() for span in spans]
                return {"filled": text, "spans": shown}

            answer = {"text": given.text, **filled(one), "stopped": one.stopped}
            if isinstance(one, Hypothesis):
                every = [{"score": each.score} | filled(each) for each in (one, *one.others)]
                answer |= {"score": one.score, "n_best": every}
            yield answer

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """The text with its blanks filled in; or several, behind their scores."""
        found = answer.get("n_best", [])
        if len(found) < 2:
            yield answer["filled"]
            return
        for one in found:
            yield f"{one['score']:8.4f}  {one['filled']}"


def _numbered(text: str) -> str:
    """The text with the first sentinels as its blanks."""
    first, *others = _BLANK.split(text)
    return first + "".join(f"{sentinel(i)}{other}" for i, other in enumerate(others))


def _spans(tokens: Sequence[int], names: Mapping[int, int]) -> dict[int, list[int]]:
    """What stands behind each sentinel, by its number."""
    found: dict[int, list[int]] = {}
    current: list[int] = []  # what stands before the first belongs nowhere
    for token in tokens:
        if token in names:
            current = found.setdefault(names[token], [])
        else:
            current.append(token)
    return found
