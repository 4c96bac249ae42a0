"""Sentence embeddings: texts of like meaning get vectors of like direction."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree
from tokenizers import Tokenizer

from jaxlm.data.labelled import classification as data
from jaxlm.data.labelled.batches import buckets_read_once, eval_batches
from jaxlm.data.labelled.classification import TextExample, TextFields
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.evaluate import baselines, metrics, retrieval
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.report import Prediction
from jaxlm.models.heads import EmbeddingHead, WithHead
from jaxlm.models.model import ModelConfig
from jaxlm.models.pooling import DENSE, POOLS, Pooling
from jaxlm.objectives import contrastive
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.task import (
    AbstractBatch,
    Labels,
    Outputs,
    Task,
    require_one_text,
    rows_of_tokens,
    shape,
)
from jaxlm.train.plots import Reference
from jaxlm.typing import Apply, Loss

Embed = Callable[[Sequence[str]], Float32[np.ndarray, "texts embed"]]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Learnt from pairs of texts that belong together (Gao et al. 2021, SimCSE)."""

    fields: TextFields = field(default_factory=lambda: TextFields(pair="pair", label=None))
    """Which columns hold the two texts, and, if they are given, similarities, which are numbers.
    The same column twice is SimCSE without supervision."""
    min_similarity: float | None = None
    """Where similarities are given: that of the least alike pairs that belong together. Others do
    not train."""
    temperature: float = 0.05
    """What cosines are divided by before the softmax."""
    pooling: Literal["cls", "last", "mean", "max"] | None = None
    """One vector of a row's hidden states: the first, the last, their mean, or their maximum; None:
    as a sentence encoder's folder says, else mean, or last of a model in which no position sees a
    later one."""
    prompt: str | None = None
    """What stands before each first text, and before what is embedded later, such as "query: ";
    None: the default prompt of a sentence encoder's folder, else nothing."""
    pair_prompt: str | None = None
    """What stands before each second text, such as "passage: "; None: as `prompt`."""

    def __post_init__(self) -> None:
        fields = self.fields
        if fields.pair is None:
            raise InputError("task.fields.pair is None: embeddings are learnt from pairs; name one")
        if fields.label is not None and fields.target != "number":
            raise InputError(
                f"task.fields.target={fields.target} is not a similarity: set it to number, or "
                "label to None"
            )
        if (fields.label is None) != (self.min_similarity is None):
            raise InputError(
                f"task.fields.label={fields.label} and task.min_similarity={self.min_similarity} "
                "go together: the column of similarities, and the least that makes a pair"
            )
        if self.temperature <= 0:
            raise InputError(f"task.temperature={self.temperature} is not above 0; 0.05 is usual")

    @property
    def verb(self) -> str:
        return "embed"

    @property
    def usage(self) -> str:
        """A text."""
        return "TEXT"

    @property
    def text_fields(self) -> tuple[str, ...]:
        return (self.fields.text,)

    @property
    def monitor(self) -> str:
        """Depends on what the pairs have: unsupervised, a text is always nearest to itself."""
        if self.fields.label is not None:
            return "spearman"
        return "loss" if self.fields.pair == self.fields.text else "recall@1"

    def for_evaluation(self) -> "Embedding":
        return self

    def with_pooling(self, pooling: Pooling | None) -> "Embedding":
        says = None if pooling in DENSE else pooling  # which have parameters of their own
        return replace(self, pooling=self.pooling or says or "mean")

    @property
    def prompts(self) -> dict[str, str]:
        """What stands before queries, the first texts of pairs, and documents, the second."""
        first = self.prompt or ""
        second = first if self.pair_prompt is None else self.pair_prompt
        return {"query": first, "document": second} if first or second else {}

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[TextExample]:
        """One pair a record; with ``labelled=False`` one text."""
        fields = self.fields if labelled else replace(self.fields, pair=None, label=None)
        return data.read(records, fields)

    def decided(self, records: Sequence[Record]) -> "Embedding":
        return replace(self, fields=data.decided(self.fields, records))

    def check(self, examples: Sequence[TextExample]) -> list[str]:
        return []

    def shown(self, examples: Sequence[TextExample]) -> "Embedding":
        return replace(self, fields=data.settled(self.fields, examples))

    def settled(self, examples: Sequence[TextExample], before: Task | None = None) -> "Embedding":
        """With how numbers are written."""
        was = before.fields if isinstance(before, Embedding) else None
        return replace(self, fields=data.settled(self.fields, examples, was))

    def labels(self, examples: Sequence[TextExample]) -> Labels:
        return ()

    def classes(self, examples: Sequence[TextExample]) -> list[str]:
        return []

    def encode(self, framer: Framer, examples: Sequence[TextExample], labels: Labels) -> Examples:
        """Rows of two token rows for pairs, and of one for single texts."""
        first, second = self.prompts.get("query", ""), self.prompts.get("document", "")
        prompted = [
            replace(e, text=first + e.text, pair=None if e.pair is None else second + e.pair)
            for e in examples
        ]
        if examples[0].pair is None:
            return data.encode(framer, prompted)
        encoded = data.encode_contrastive(framer, prompted)
        for row, example in zip(encoded.rows, examples, strict=True):
            row["weights"] = np.array(self._belongs_together(example), np.float32)
        return encoded

    def _belongs_together(self, example: TextExample) -> bool:
        if self.min_similarity is None:
            return True
        assert isinstance(example.label, float)
        return example.label >= self.min_similarity

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Pairs of token rows, which have one token type."""
        batch = rows_of_tokens(rows, length)
        del batch["token_type_ids"]
        tokens, lengths = shape(jnp.int32, rows, 2, length), shape(jnp.int32, rows, 2)
        return batch | {"tokens": tokens, "lengths": lengths}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """One vector of length 1 of hidden states; it has no parameters."""
        require_one_text(config, "Embedding")
        return WithHead(config.make(), EmbeddingHead(POOLS[self.pooling or "mean"]))

    def make_loss(self, apply: Apply) -> Loss:
        """Cross-entropy of finding the partner among those of the batch."""
        return contrastive.make_loss(apply, temperature=self.temperature)

    def make_predict(self, apply: Apply) -> Predict:
        """``embeddings`` [batch, embed] of single texts, [batch, 2, embed] of pairs."""
        single = contrastive.make_predict(apply)
        pairs = contrastive.make_predict(contrastive.of_pairs(apply))
        return lambda variables, batch: (
            single if batch["lengths"].size == batch["weights"].size else pairs
        )(variables, batch)

    def metric_names(self, examples: Sequence[TextExample], labels: Labels) -> tuple[str, ...]:
        """By what is known of the pairs."""
        return retrieval.NAMES if self.fields.label is None else metrics.CORRELATIONS

    def metrics(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """Correlations with given similarities; else how near the partner is among all."""
        first, second = outputs["embeddings"][:, 0], outputs["embeddings"][:, 1]
        if self.fields.label is not None:
            return metrics.embeddings(data.label_array(examples, labels), first, second)
        # A partner that is there several times is one candidate, and right each time.
        rows = {example.pair: row for row, example in enumerate(examples)}
        numbers = {pair: number for number, pair in enumerate(rows)}
        wanted = np.array([numbers[example.pair] for example in examples], np.int32)
        return retrieval.retrieval(first, second[list(rows.values())], wanted)

    def reference(
        self, train: Sequence[TextExample], validation: Sequence[TextExample]
    ) -> Reference:
        return Reference()

    def baselines(
        self, train: Sequence[TextExample], validation: Sequence[TextExample], labels: Labels
    ) -> Baselines:
        """Cosines of TF-IDF vectors, where they are few enough."""
        texts = [text for e in validation for text in (e.text, e.pair or "")]
        if len(texts) > 4096 or not baselines.takes_seconds(texts):
            return {}
        pairs = baselines.vectors(texts).reshape(len(validation), 2, -1)
        return {"TF-IDF": self.metrics(validation, labels, {"embeddings": pairs})}

    def predictions(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        return []

    def plots(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """None."""
        return {}

    def answers(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The text and its embedding."""
        return [
            {"text": example.text, "embedding": vector}
            for example, vector in zip(examples, outputs["embeddings"].tolist(), strict=True)
        ]


def make_embed(
    encoder: nn.Module,
    params: PyTree[Float[Array | np.ndarray, "..."]],
    tokenizer: Tokenizer,
    *,
    max_length: int = 128,
    batch_size: int = 32,
    head: EmbeddingHead | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Embed:
    """``embed(texts)`` with an encoder as it is: a vector for each text, in their order.

    ``params`` are the encoder's, such as those of a :class:`jaxlm.runs.base.Base`; ``head`` makes
    a vector of hidden states (None: their mean, of length 1). ``report`` is told how many texts
    were cut.
    """
    framer = Framer(tokenizer, max_length)
    apply = WithHead(encoder, head or EmbeddingHead()).apply
    variables = {"params": {"encoder": jax.tree.map(jnp.asarray, params)}}
    predict = jax.jit(contrastive.make_predict(apply))

    def embed(texts: Sequence[str]) -> Float32[np.ndarray, "texts embed"]:
        if not texts:
            raise InputError("there are no texts to embed")
        examples = [
            TextExample(text=text, pair=None, label=None, origin=f"text {number}")
            for number, text in enumerate(texts, start=1)
        ]
        encoded = data.encode(framer, examples)
        cut = int((encoded.untruncated > max_length).sum())
        if cut:
            report(f"{cut:,} of {len(texts):,} texts are cut at {max_length} tokens")
        buckets = buckets_read_once(encoded.lengths, multiple=16, max_length=max_length)
        vectors = {}
        for batch in eval_batches(encoded, batch_size, buckets):
            outputs = jax.device_get(predict(variables, batch))["embeddings"]
            vectors |= dict(zip(batch["example"].tolist(), outputs, strict=True))
        return np.stack([vectors[i] for i in range(len(texts))])

    return embed
