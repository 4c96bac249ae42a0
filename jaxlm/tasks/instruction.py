"""Instruction tuning: a model that continues texts learns to respond."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxlm.data.labelled import instruction as data
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.instruction import Dialogue, DialogueFields, Template
from jaxlm.data.labelled.records import Record
from jaxlm.decode.beam import beyond_text
from jaxlm.decode.generate import Generate
from jaxlm.errors import InputError
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.metrics import perplexity
from jaxlm.evaluate.report import Prediction
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import CausalConfig, ModelConfig
from jaxlm.models.pooling import Pooling
from jaxlm.objectives import instruction
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.causal_lm import causal_model
from jaxlm.tasks.task import AbstractBatch, Labels, Outputs, Task, require_one_text, shape
from jaxlm.train.plots import Reference
from jaxlm.typing import Apply, Loss, Variables


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """Responses to prompts, or the assistant's turns of dialogues, are learned; what is asked is
    read (Ouyang et al. 2022, section 3.5: supervised fine-tuning)."""

    fields: DialogueFields = field(default_factory=DialogueFields)
    """Which fields hold prompts and responses, or messages."""
    template: Template = field(default_factory=Template)
    """What a dialogue looks like as one text."""
    pack: bool = True
    """Dialogues share rows of up to data.max_length tokens, and do not see each other;
    data.batch_size counts rows."""
    num_samples: int = 3
    """Validation prompts whose responses are shown at each evaluation; 0: none."""
    sample_tokens: int = 48
    """The most tokens of such a response."""

    def __post_init__(self) -> None:
        if self.fields.response is None:
            raise InputError("task.fields.response is None: name the field that holds responses")
        if self.num_samples < 0:
            raise InputError(f"task.num_samples={self.num_samples} is below 0; 0 is none")
        if self.sample_tokens < 1:
            raise InputError(f"task.sample_tokens={self.sample_tokens} is not above 0")

    @property
    def verb(self) -> str:
        return "generate"

    @property
    def usage(self) -> str:
        """What is asked."""
        return '"What is asked"'

    @property
    def text_fields(self) -> tuple[str, ...]:
        return (self.fields.prompt,)

    @property
    def monitor(self) -> str:
        """The loss of a token of a response."""
        return "loss"

    def for_evaluation(self) -> "Instruction":
        return self

    def with_pooling(self, pooling: Pooling | None) -> "Instruction":
        return self

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Dialogue]:
        """With ``labelled=False`` up to the turn that is to be answered."""
        response = self.fields.response if labelled else None
        return data.read(records, replace(self.fields, response=response))

    def check(self, examples: Sequence[Dialogue]) -> list[str]:
        """A line on turns that nobody answers."""
        ends = [example.origin for example in examples if example.unanswered]
        return [
            f"{len(ends):,} of {len(examples):,} dialogues, first that of {one}, end in turns that "
            "nobody answers, which are left out"
            for one in ends[:1]
        ]

    def settled(self, examples: Sequence[Dialogue], before: Task | None = None) -> "Instruction":
        return self

    def labels(self, examples: Sequence[Dialogue]) -> Labels:
        return ()

    def classes(self, examples: Sequence[Dialogue]) -> list[str]:
        return []

    def encode(self, framer: Framer, examples: Sequence[Dialogue], labels: Labels) -> Examples:
        return data.encode(framer, examples, self.template, pack=self.pack)

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Whose each token is, and whether it is learned."""
        one, along = shape(jnp.int32, rows), shape(jnp.int32, rows, length)
        weights = shape(jnp.float32, rows, length)
        batch = {"tokens": along, "dialogues": along, "weights": weights}
        return batch | {"lengths": one, "index": one}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """The decoder with the head of its architecture, both the base's."""
        require_one_text(config, "Instruction")
        if not isinstance(config, CausalConfig) or not config.is_causal:
            raise InputError(
                f"task=Instruction writes responses token by token, and a model of "
                f"{type(config).__name__} sees all of a text: name a base that reads one way, "
                "such as a run of configs/gpt_quickstart.py, or gpt2"
            )
        return WithLmHead(config.make(), config.make_lm_head().clone(name="lm_head"))

    def make_loss(self, apply: Apply) -> Loss:
        """The cross-entropy of responses."""
        return instruction.make_loss(apply)

    def make_predict(self, apply: Apply) -> Predict:
        """``losses`` and ``correct`` of each token, and the ``weights`` of those that count."""
        return instruction.make_predict(apply)

    def metric_names(self, examples: Sequence[Dialogue], labels: Labels) -> tuple[str, ...]:
        """Two."""
        return "perplexity", "accuracy"

    def metrics(
        self, examples: Sequence[Dialogue], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """Perplexity of a token of a response, and the share that is likeliest of all tokens."""
        weights = np.concatenate(outputs["weights"])
        mean = lambda name: float(np.average(np.concatenate(outputs[name]), weights=weights))
        return {"perplexity": perplexity(mean("losses")), "accuracy": mean("correct")}

    def reference(self, train: Sequence[Dialogue], validation: Sequence[Dialogue]) -> Reference:
        return Reference()

    def baselines(
        self, train: Sequence[Dialogue], validation: Sequence[Dialogue], labels: Labels
    ) -> Baselines:
        return {}

    def predictions(
        self, examples: Sequence[Dialogue], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        return []

    def plots(
        self, examples: Sequence[Dialogue], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """None."""
        return {}

    def make_generate(
        self, config: ModelConfig, variables: Variables, tokenizer: Tokenizer
    ) -> Generate:
        """Continues what :meth:`prompt_ids` gives, up to the end of the response."""
        model = self.make_model(config, (), 0.0)
        return Generate(causal_model(model, config, variables, tokenizer))

    def prompt_ids(
        self, framer: Framer, example: Dialogue, *, room: int | None = None
    ) -> list[int]:
        """The tokens behind which a response to turns begins, or the last ``room`` of them."""
        return data.prompt_ids(framer, example.prompt, self.template, room)

    def answers(
        self, examples: Sequence[Dialogue], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """What was asked last, the response, and how that ended: ``outputs["written"]``."""
        return [
            {
                "prompt": example.asked,
                "response": written.text,
                "stopped": written.stopped,
                "tokens": written.tokens,
                "log_probabilities": written.log_probabilities,
                **beyond_text(written),
            }
            for example, written in zip(examples, outputs["written"], strict=True)
        ]
