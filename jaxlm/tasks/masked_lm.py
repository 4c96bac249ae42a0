"""Masked language modelling: what is hidden, what fills it in, and how it is used afterwards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jaxlm.data.prepared import PreparedInfo
from jaxlm.decode.beam import Writing
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import perplexity
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import CausalConfig, ModelConfig
from jaxlm.objectives import masked_lm
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.tasks import blanks
from jaxlm.tasks.task import Given, require_one_text
from jaxlm.typing import Apply, Loss, Variables


@dataclass(frozen=True, kw_only=True)
class MaskedLm:
    """Predict the tokens that are hidden (Devlin et al. 2018, section 3.1)."""

    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """What is hidden in training."""
    eval_masking: MaskingConfig = field(default_factory=MaskingConfig)
    """What is hidden in evaluation: at a rate of 0.15 unless told otherwise, so that the losses of
    different runs compare."""
    isolate_documents: bool = False
    """Documents that share a row do not attend to each other, and each counts positions from 0."""

    def __post_init__(self) -> None:
        if self.eval_masking.final_rate is not None:
            raise InputError(
                f"task.eval_masking.final_rate={self.eval_masking.final_rate}, but evaluation "
                "hides the same all the run: set task.eval_masking.rate alone"
            )

    @property
    def verb(self) -> str:
        """What scripts/predict.py calls its use."""
        return blanks.VERB

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return blanks.USAGE

    def for_evaluation(self) -> "MaskedLm":
        """The same with evaluation's masking."""
        return replace(self, masking=self.eval_masking)

    def num_predicted(self, length: int) -> int:
        """Positions of a row that reach the head in training."""
        return self.masking.num_predicted(length)

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """Where whole words are hidden: words that are lines, of text without spaces."""
        return blanks.long_words(tokens, vocabulary, self.masking, "task.masking.unit")

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The encoder with the head of its architecture."""
        require_one_text(config, "MaskedLm", "SpanCorruption")
        if config.is_causal:
            writes = isinstance(config, CausalConfig)
            raise InputError(
                f"task=MaskedLm fills in blanks from both sides, and {type(config).__name__} reads "
                f"one way: use {'task=CausalLm' if writes else 'one that reads both, as a BERT'}"
            )
        return WithLmHead(config.make(), config.make_lm_head())

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """Perplexity of a hidden token; of a byte nothing is known, as others count nothing."""
        return {"perplexity": perplexity(loss)}

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """The cross-entropy of what is hidden."""
        return masked_lm.make_loss(
            apply, vocabulary, self.masking, isolate_documents=self.isolate_documents
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
        """For each text the likeliest fillings of each blank, best first, or what is wrong."""
        apply = self.make_model(config).apply
        return blanks.answers(apply, config, variables, tokenizer, texts, top_k)

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """An answer as a person reads it."""
        return blanks.lines(answer)
