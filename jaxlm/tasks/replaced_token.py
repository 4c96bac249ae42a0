"""Replaced-token detection: what is hidden and sampled, by which models, and their use."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jaxlm.data.prepared import PreparedInfo
from jaxlm.decode.beam import Writing
from jaxlm.errors import InputError
from jaxlm.models import electra
from jaxlm.models.model import ModelConfig
from jaxlm.objectives import replaced_token
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.tasks import blanks
from jaxlm.tasks.task import Given, require_one_text
from jaxlm.typing import Apply, Loss, Variables

_BUCKET = 32  # tokens: texts are padded to a multiple, so that few shapes are compiled


def _published() -> MaskingConfig:
    return MaskingConfig(mask_share=0.85, random_share=0.0)


@dataclass(frozen=True, kw_only=True)
class ReplacedToken:
    """Tell tokens that a generator sampled from those that stood there (Clark et al. 2020)."""

    masking: MaskingConfig = field(default_factory=_published)
    """What is hidden from the generator in training."""
    eval_masking: MaskingConfig = field(default_factory=_published)
    """What is hidden in evaluation."""
    generator_share: float = 0.25
    """Layers of the generator over those of the discriminator, inside (0, 1]; at least one."""
    detection_weight: float = 50.0
    """What the discriminator's loss is multiplied by before it is added to the generator's."""
    isolate_documents: bool = False
    """Documents that share a row do not attend to each other, and each counts positions from 0."""

    def __post_init__(self) -> None:
        if self.eval_masking.final_rate is not None:
            raise InputError(
                f"task.eval_masking.final_rate={self.eval_masking.final_rate}, but evaluation "
                "hides the same all the run: set task.eval_masking.rate alone"
            )
        if not 0 < self.generator_share <= 1:
            raise InputError(
                f"task.generator_share={self.generator_share} is not inside (0, 1]; 0.25 is usual"
            )
        if not 0 < self.detection_weight < float("inf"):
            raise InputError(
                f"task.detection_weight={self.detection_weight} is not a number above 0"
            )

    @property
    def verb(self) -> str:
        """What scripts/predict.py calls its use."""
        return "detect"

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return '"She drank a cup of tables."'

    def for_evaluation(self) -> "ReplacedToken":
        """The same with evaluation's masking."""
        return replace(self, masking=self.eval_masking)

    def num_predicted(self, length: int) -> int:
        """Positions of a row that reach the generator's head in training."""
        return self.masking.num_predicted(length)

    def more_flops(self, config: ModelConfig, length: int) -> float:
        """Those of the generator's encoder."""
        return self.generator(config).forward_flops(length, 0)

    def generator(self, config: ModelConfig) -> ModelConfig:
        """That of a discriminator of this configuration."""
        model: Any = config  # a dataclass, which its protocol cannot say
        if "num_layers" not in {field.name for field in fields(model)}:
            raise InputError(
                f"task=ReplacedToken makes a generator of fewer layers, and {type(model).__name__} "
                "has no num_layers: use task=MaskedLm"
            )
        return replace(model, num_layers=max(1, round(self.generator_share * model.num_layers)))

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """Where whole words are hidden: words that are lines, of text without spaces."""
        return blanks.long_words(tokens, vocabulary, self.masking, "task.masking.unit")

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The discriminator, with the parameters of its generator."""
        require_one_text(config, "ReplacedToken", "SpanCorruption")
        if config.is_causal:
            raise InputError(
                f"task=ReplacedToken looks at both sides of a token, and {type(config).__name__} "
                "reads one way: use one that reads both, as a BERT"
            )
        return electra.make(config, self.generator(config))

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """None: the loss is of two kinds."""
        return {}

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """The generator's and the discriminator's."""
        return replaced_token.make_loss(
            apply,
            vocabulary,
            self.masking,
            detection_weight=self.detection_weight,
            isolate_documents=self.isolate_documents,
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
        """For each text its tokens, each with the probability that another stood there."""
        apply = jax.jit(self.make_model(config).apply)
        limit = config.max_length or float("inf")
        for _, origin, text in texts:
            encoding = tokenizer.encode(text)
            size = len(encoding.ids)
            if size > limit:
                yield {"error": f"{origin} has {size} tokens, more than the model's {limit}"}
                continue
            length = min(-(-size // _BUCKET) * _BUCKET, limit)
            row = np.zeros((1, int(length)), np.int32)
            row[0, :size] = encoding.ids
            segments = jnp.asarray(np.arange(row.size)[None] < size, jnp.int32) - 1
            scores = apply(variables, jnp.asarray(row), segment_ids=segments)
            probabilities = jax.nn.sigmoid(scores[0, :size]).tolist()
            found = zip(encoding.tokens, encoding.special_tokens_mask, probabilities, strict=True)
            yield {
                "text": text,
                "tokens": [
                    {"token": token, "probability": probability}
                    for token, special, probability in found
                    if not special
                ],
            }

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """An answer as a person reads it."""
        for one in answer["tokens"]:
            yield f"{one['probability']:6.1%}  {one['token']}"
