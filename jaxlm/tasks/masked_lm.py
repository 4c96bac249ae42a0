"""Masked language modelling: what is hidden, what fills it in, and how it is used afterwards."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
from tokenizers import Tokenizer

from jaxlm.decode.fill_mask import MASK, FillMask
from jaxlm.errors import InputError
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import ModelConfig
from jaxlm.objectives import masked_lm
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
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
        return "fill-mask"

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return f'"A text with a {MASK}."'

    def for_evaluation(self) -> "MaskedLm":
        """The same with evaluation's masking."""
        return replace(self, masking=self.eval_masking)

    def num_predicted(self, length: int) -> int:
        """Positions of a row that reach the head in training."""
        return self.masking.num_predicted(length)

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The encoder with the head of its architecture."""
        return WithLmHead(config.make(), config.make_lm_head())

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """The cross-entropy of what is hidden."""
        return masked_lm.make_loss(
            apply, vocabulary, self.masking, isolate_documents=self.isolate_documents
        )

    def answers(
        self,
        apply: Apply,
        variables: Variables,
        tokenizer: Tokenizer,
        texts: Mapping[str, str],
        *,
        max_length: int,
        top_k: int,
    ) -> Iterator[dict[str, Any]]:
        """For each text the likeliest fillings of each blank, best first."""
        for origin, text in texts.items():
            if MASK not in text:
                raise InputError(f"{origin} has no blank: write {MASK} where a word is missing")
        fill = FillMask(apply, variables, tokenizer, max_length)
        for text, blanks in zip(texts.values(), fill(texts.values(), top_k=top_k), strict=True):
            yield {"text": text, "blanks": [[vars(one) for one in blank] for blank in blanks]}

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """An answer as a person reads it."""
        for blank in answer["blanks"]:
            for one in blank:
                yield f"{one['probability']:6.1%}  {one['token']:<15} {one['text']}"
