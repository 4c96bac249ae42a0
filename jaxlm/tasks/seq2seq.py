"""From text to text: a source is read, and a target written, such as its translation."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxlm.data.labelled import seq2seq as data
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.seq2seq import Long, Pair, PairFields
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.data.tabular import json_text
from jaxlm.decode.beam import beyond_text
from jaxlm.decode.causal_model import CausalModel
from jaxlm.decode.generate import Generate
from jaxlm.errors import InputError
from jaxlm.evaluate import seq2seq as scoring
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.metrics import perplexity
from jaxlm.evaluate.report import Prediction
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.model import ModelConfig, is_two_sided
from jaxlm.models.pooling import Pooling
from jaxlm.nn import stack
from jaxlm.nn.cache import DecoderCache
from jaxlm.objectives import seq2seq
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.causal_lm import by_layer
from jaxlm.tasks.task import AbstractBatch, Labels, Outputs, Task, shape
from jaxlm.train.plots import Reference
from jaxlm.typing import Apply, Loss, Variables

TRANSLATIONS = "translations.jsonl"
_MAX_LENGTH = 1024  # of models that have no limit


@dataclass(frozen=True, kw_only=True)
class Seq2Seq:
    """Targets are learned from sources, token by token (Sutskever et al. 2014): translations,
    summaries, or any text from any other."""

    fields: PairFields = field(default_factory=PairFields)
    """Which fields hold sources and targets."""
    prefix: str = ""
    """What stands before each source, such as T5's 'translate English to German: '."""
    long: Long = "cut"
    """What becomes of pairs with a side of more than data.max_length tokens: it is cut at its end,
    they are skipped in training, or they raise."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over the vocabulary in training."""
    num_samples: int = 3
    """Validation examples whose outputs are shown at each evaluation; 0: none."""
    num_scored: int | None = 200
    """The first so many validation examples are written at each evaluation, for BLEU and chrF;
    0: none, None: all."""
    sample_tokens: int = 128
    """The most tokens of such an output."""

    def __post_init__(self) -> None:
        if self.fields.target is None:
            raise InputError("task.fields.target is None: name the field that holds targets")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"task.label_smoothing={self.label_smoothing} is not inside [0, 1); 0.1 is usual"
            )
        for name in ("num_samples", "num_scored"):
            if (vars(self)[name] or 0) < 0:
                raise InputError(f"task.{name}={vars(self)[name]} is below 0; 0 is none")
        if self.sample_tokens < 1:
            raise InputError(f"task.sample_tokens={self.sample_tokens} is not above 0")

    @property
    def verb(self) -> str:
        return "translate"

    @property
    def usage(self) -> str:
        """A source."""
        return '"A text to be translated"'

    @property
    def text_fields(self) -> tuple[str, ...]:
        return (self.fields.source,)

    @property
    def monitor(self) -> str:
        """The loss of a token of a target."""
        return "loss"

    def for_evaluation(self) -> "Seq2Seq":
        """Without label smoothing, and with all examples."""
        return replace(self, label_smoothing=0.0, long="cut")

    def with_pooling(self, pooling: Pooling | None) -> "Seq2Seq":
        return self

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Pair]:
        target = self.fields.target if labelled else None
        return data.read(records, replace(self.fields, target=target))

    def check(self, examples: Sequence[Pair]) -> list[str]:
        """A line on sources that are their own targets."""
        same = [example.origin for example in examples if example.source == example.target]
        return [
            f"{len(same):,} of {len(examples):,} sources, first that of {one}, are their own "
            "targets, and teach to copy"
            for one in same[:1]
        ]

    def settled(self, examples: Sequence[Pair], before: Task | None = None) -> "Seq2Seq":
        return self

    def labels(self, examples: Sequence[Pair]) -> Labels:
        return ()

    def classes(self, examples: Sequence[Pair]) -> list[str]:
        return []

    def encode(self, framer: Framer, examples: Sequence[Pair], labels: Labels) -> Examples:
        return data.encode(framer, examples, prefix=self.prefix, long=self.long)

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Targets are as long as their sources."""
        one, along = shape(jnp.int32, rows), shape(jnp.int32, rows, length)
        batch = dict.fromkeys(("tokens", "targets", "decoder_tokens"), along)
        batch |= dict.fromkeys(("lengths", "target_lengths", "index"), one)
        return batch | {"weights": shape(jnp.float32, rows)}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """The model with the head of its architecture, both the base's."""
        if not is_two_sided(config):
            raise InputError(
                f"task=Seq2Seq reads a source with an encoder and writes with a decoder, and "
                f"{type(config).__name__} is one of them alone: use --model TransformerConfig, or "
                "a base that has both, such as a T5"
            )
        return EncoderDecoderLm(config.make(), config.make_lm_head().clone(name="lm_head"))

    def make_loss(self, apply: Apply) -> Loss:
        """The cross-entropy of targets."""
        return seq2seq.make_loss(apply, label_smoothing=self.label_smoothing)

    def make_predict(self, apply: Apply) -> Predict:
        """``losses`` and ``correct`` of each token, and the ``weights`` of those that count."""
        return seq2seq.make_predict(apply)

    def metric_names(self, examples: Sequence[Pair], labels: Labels) -> tuple[str, ...]:
        """Those of tokens, and those of texts where they are written."""
        return "perplexity", "accuracy", *(scoring.NAMES if self.num_scored != 0 else ())

    def metrics(
        self, examples: Sequence[Pair], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """Perplexity of a token of a target, and the share that is likeliest of all tokens.

        And BLEU and chrF of what is ``written``, which is of the first examples.
        """
        weights = np.concatenate(outputs["weights"])
        mean = lambda name: float(np.average(np.concatenate(outputs[name]), weights=weights))
        found = {"perplexity": perplexity(mean("losses")), "accuracy": mean("correct")}
        if "written" not in outputs:
            return found
        written = [one.text for one in outputs["written"]]
        return found | scoring.scores(written, _targets(examples[: len(written)]))

    def signatures(self) -> dict[str, str]:
        return scoring.signatures()

    def reference(self, train: Sequence[Pair], validation: Sequence[Pair]) -> Reference:
        return Reference()

    def baselines(
        self, train: Sequence[Pair], validation: Sequence[Pair], labels: Labels
    ) -> Baselines:
        """What the sources themselves score as outputs, of the examples that are scored."""
        scored = validation[: self.num_scored]
        if not scored:
            return {}
        sources = [example.source for example in scored]
        return {"the source copied": scoring.scores(sources, _targets(scored))}

    def predictions(
        self, examples: Sequence[Pair], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """What was written, by the mean loss of the target's tokens."""
        if "written" not in outputs:
            return []
        rows = zip(examples, outputs["written"], outputs["losses"], outputs["weights"], strict=True)
        return [
            Prediction(
                loss=float(np.average(losses, weights=weights)),
                gold=example.target or "",
                predicted=written.text,
                probability=math.exp(sum(written.log_probabilities)),
                text=example.source,
                origin=example.origin,
                right=written.text == example.target,
            )
            for example, written, losses, weights in rows
        ]

    def plots(
        self, examples: Sequence[Pair], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """``translations.jsonl``: each source, what was written for it, and what was wanted."""
        if "written" not in outputs:
            return {}
        answers = self.answers(examples, labels, outputs)
        with (folder / TRANSLATIONS).open("w", encoding="utf-8") as file:
            for example, answer in zip(examples, answers, strict=True):
                row = {"origin": example.origin, **answer, "reference": example.target}
                file.write(json_text(row) + "\n")
        return {TRANSLATIONS: "sources, what was written for them, and references"}

    def make_generate(
        self, config: ModelConfig, variables: Variables, tokenizer: Tokenizer
    ) -> Generate:
        """Writes what follows sources, of which :meth:`prompt_ids` gives the tokens."""
        model = self.make_model(config, (), 0.0)
        return Generate(encoder_decoder(model, config, variables, tokenizer))

    def prompt_ids(self, framer: Framer, example: Pair, *, room: int | None = None) -> list[int]:
        """The tokens of a source; what is written has room of its own."""
        (ids,) = data.source_ids(framer, [example.source], self.prefix)
        return ids.tolist()

    def num_cut(self, framer: Framer, examples: Sequence[Pair]) -> int:
        """Sources that are longer than a row, of which :meth:`prompt_ids` gives the beginning."""
        return data.num_cut(framer, [example.source for example in examples], self.prefix)

    def answers(
        self, examples: Sequence[Pair], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The source, what was written, and how that ended: ``outputs["written"]``."""
        return [
            {
                "source": example.source,
                "translation": written.text,
                "log_probability": sum(written.log_probabilities),
                "stopped": written.stopped,
                "tokens": written.tokens,
                **beyond_text(written),
            }
            for example, written in zip(examples, outputs["written"], strict=True)
        ]


def _targets(examples: Sequence[Pair]) -> list[str]:
    return [example.target or "" for example in examples]


def encoder_decoder(
    model: nn.Module, config: ModelConfig, variables: Variables, tokenizer: Tokenizer
) -> CausalModel:
    """A model with its head, as decoding takes it; targets begin and end as in training."""
    assert is_two_sided(config)  # make_model has seen to it
    special = SpecialTokens.of(tokenizer)

    def step(variables, cache, tokens, positions, segment_ids):
        extend = partial(model.apply, method="extend")
        options = {"positions": positions, "segment_ids": segment_ids}
        logits, cache = extend(stack.join(variables), tokens, cache, **options)
        return logits[:, None], cache

    def read(variables, sources, segment_ids, kv_length):
        cache = config.make_cache(sources.shape[0], kv_length, sources.shape[1])
        start = partial(model.apply, method="start", segment_ids=segment_ids)
        return start(stack.join(variables), sources, cache)

    def none(batch, kv_length):
        raise AssertionError("a target begins with a source")

    return CausalModel(
        step=step,
        make_state=none,
        read=read,
        take=DecoderCache.take,
        variables=variables,
        arrange=partial(by_layer, name="decoder_layers"),
        tokenizer=tokenizer,
        max_length=config.max_length or _MAX_LENGTH,
        start=(special.cls,),
        end=(special.sep,),
        batch_size=64,
    )
