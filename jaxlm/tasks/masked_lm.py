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
from jaxlm.decode.fill_mask import MASK, FillMask
from jaxlm.errors import InputError
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import ModelConfig
from jaxlm.objectives import masked_lm
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.tasks.task import Given, require_one_text
from jaxlm.typing import Apply, Loss, Variables

_LONG_WORD, _MOST_IN_LONG_WORDS = 16, 0.05  # tokens; share of all


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

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """Where whole words are hidden: words that are lines, of text without spaces."""
        if self.masking.unit != "word" or vocabulary.word_starts is None:
            return ""
        ordinary = np.asarray(vocabulary.is_ordinary)[tokens]
        begins = np.asarray(vocabulary.word_starts)[tokens] | ~ordinary
        begins[:, 0] = True
        words = np.cumsum(begins) - 1
        sizes = np.bincount(words, ordinary.ravel())
        share = sizes[sizes > _LONG_WORD].sum() / max(ordinary.sum(), 1)
        if share <= _MOST_IN_LONG_WORDS:
            return ""
        return (
            f"{share:.0%} of the tokens are in words of more than {_LONG_WORD} tokens, as in text "
            "without spaces, and are hidden together: --task.masking.unit token or span hides parts"
        )

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The encoder with the head of its architecture."""
        require_one_text(config, "MaskedLm")
        if config.is_causal:
            raise InputError(
                f"task=MaskedLm fills in blanks from both sides, and {type(config).__name__} reads "
                "one way: use task=CausalLm"
            )
        return WithLmHead(config.make(), config.make_lm_head())

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """None: what is not hidden counts nothing."""
        return {}

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
        fill = FillMask(apply, variables, tokenizer, config.max_length or 512)
        blanks = fill((text for *_, text in texts if MASK in text), top_k=top_k)
        for _, origin, text in texts:
            if MASK in text:
                yield {
                    "text": text,
                    "blanks": [[vars(one) for one in each] for each in next(blanks)],
                }
            else:
                yield {"error": f"{origin} has no blank: write {MASK} where a word is missing"}

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """An answer as a person reads it."""
        for blank in answer["blanks"]:
            for one in blank:
                yield f"{one['probability']:6.1%}  {one['token']:<15} {one['text']}"
