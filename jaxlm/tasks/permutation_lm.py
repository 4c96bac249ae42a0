"""Permutation language modelling: what is predicted, by which models, and their use afterwards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Int, Integer
from tokenizers import Tokenizer

from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.decode.beam import Writing
from jaxlm.decode.fill_mask import MASK
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import perplexity
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import ModelConfig, is_two_stream
from jaxlm.objectives import permutation_lm
from jaxlm.objectives.masking import ChoiceConfig, Vocabulary
from jaxlm.tasks import blanks
from jaxlm.tasks.task import Given, require_one_text
from jaxlm.typing import Apply, Loss, Variables


def _published() -> ChoiceConfig:
    # K = 6 (section 2.3). There, spans of n = 1 to 5 tokens are drawn in proportion to 1 / n: 2.2.
    return ChoiceConfig(rate=1 / 6, unit="span", mean_span=2.2)


@dataclass(frozen=True, kw_only=True)
class PermutationLm:
    """Predict tokens in random order, by those before them in it (Yang et al. 2019, section 2)."""

    choice: ChoiceConfig = field(default_factory=_published)
    """Which tokens come last in the order and are predicted: by default a sixth, in short spans."""
    isolate_documents: bool = False
    """Documents that share a row do not attend to each other."""
    memory: int = 0
    """Tokens of the row before, in the text, that are read first and attended to (section 2.3); no
    gradient passes. They are read anew, with the parameters of the step, and all at once."""

    def __post_init__(self) -> None:
        if self.memory < 0:
            raise InputError(f"task.memory={self.memory} is below 0; 0 is none")
        if self.memory and self.isolate_documents:
            raise InputError(
                f"task.memory={self.memory} is of the row before, whose documents are others, and "
                "isolate_documents hides others: leave out either"
            )

    @property
    def verb(self) -> str:
        """What scripts/predict.py calls its use."""
        return blanks.VERB

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return blanks.USAGE

    def for_evaluation(self) -> "PermutationLm":
        """The same at one rate all the run, so that its losses compare."""
        return replace(self, choice=replace(self.choice, final_rate=None))

    def num_predicted(self, length: int) -> int:
        """Positions of a row that reach the head in training."""
        return self.choice.num_predicted(length)

    def more_flops(self, config: ModelConfig, length: int) -> float:
        """Those of the query stream, and of reading the memory and attending to it."""
        assert is_two_stream(config)  # make_model has seen to it
        predicted = self.num_predicted(length)
        return config.query_flops(length, predicted) + config.memory_flops(
            self.memory, length + predicted
        )

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """Where whole words are predicted: words that are lines, of text without spaces."""
        return blanks.long_words(tokens, vocabulary, self.choice, "task.choice.unit")

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The encoder with the head of its architecture."""
        require_one_text(config, "PermutationLm", "SpanCorruption")
        name = type(config).__name__
        if not is_two_stream(config):
            other = "CausalLm" if config.is_causal else "MaskedLm"
            raise InputError(
                f"task=PermutationLm predicts by a query stream, which a model of {name} has not: "
                f"use task={other}, or an XLNet"
            )
        if config.is_causal:
            raise InputError(
                f"task=PermutationLm predicts in any order, and this {name} reads one way: use "
                "attention=bi"
            )
        return WithLmHead(config.make(), config.make_lm_head())

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """Perplexity of a predicted token; of a byte nothing is known, as others count nothing."""
        return {"perplexity": perplexity(loss)}

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """The cross-entropy of what comes last."""
        return permutation_lm.make_loss(
            apply, vocabulary, self.choice, isolate_documents=self.isolate_documents
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
        """For each text the likeliest fillings of each blank, best first, or what is wrong.

        Blanks come last in the order, each as the first of them: it sees all but the blanks.
        """
        model, mask_id = self.make_model(config), SpecialTokens.of(tokenizer).mask
        if mask_id is None:
            raise InputError(
                f"the tokenizer has no token {MASK} or <mask>, so that no text can have a blank: "
                "use a run of another tokenizer"
            )

        def apply(
            variables: Variables,
            tokens: Int[Array, "batch length"],
            predicted: Int[Array, "batch masked"],
            segment_ids: Int[Array, "batch length"],
        ) -> Any:
            seen = (tokens != mask_id)[:, None, None, :]
            return model.apply(
                variables, tokens, predicted, mask=seen, segment_ids=segment_ids, method="predict"
            )

        return blanks.answers(apply, config, variables, tokenizer, texts, top_k)

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """An answer as a person reads it."""
        return blanks.lines(answer)
