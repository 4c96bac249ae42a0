"""A toy objective: predict the next token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxlm.decode.generate import GenerateConfig
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import ModelConfig
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.masking import Vocabulary
from jaxlm.sums import Sums
from jaxlm.tasks.task import Given
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Variables


@dataclass(frozen=True, kw_only=True)
class NextToken:
    scale: float = 1.0

    @property
    def verb(self) -> str:
        return "continue"

    @property
    def usage(self) -> str:
        return "TEXT"

    def metrics(self, loss, infos, split) -> dict[str, float]:
        return {}

    def warning(self, tokens, vocabulary) -> str:
        return ""

    def for_evaluation(self) -> "NextToken":
        return self

    def num_predicted(self, length: int) -> int:
        return length

    def make_model(self, config: ModelConfig) -> nn.Module:
        return WithLmHead(config.make(), config.make_lm_head())

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        def loss(
            variables: Variables,
            batch: Batch,
            key: PRNGKey,
            *,
            progress: Scalar,
            deterministic: bool,
        ) -> tuple[Scalar, Sums]:
            tokens = jnp.asarray(batch["tokens"], jnp.int32)
            position, lengths = jnp.arange(tokens.shape[1])[None, :], batch["lengths"][:, None]
            logits = apply(
                variables,
                tokens,
                segment_ids=jnp.where(position < lengths, 0, -1),
                deterministic=deterministic,
                rngs=None if deterministic else {"dropout": key},
            )
            losses, hits = cross_entropy(logits[:, :-1], tokens[:, 1:])
            weights = (position < lengths - 1)[:, :-1].astype(jnp.float32)
            total = self.scale * (losses * weights).sum()
            totals = {"loss": total, "accuracy": (hits * weights).sum()}
            counts = {"tokens": weights.sum()}
            return total, Sums(totals=totals, weight=weights.sum(), counts=counts)

        return loss

    def answers(
        self,
        config: ModelConfig,
        variables: Variables,
        tokenizer: Tokenizer,
        texts: Sequence[Given],
        *,
        top_k: int,
        generate: GenerateConfig,
    ) -> Iterator[dict[str, Any]]:
        apply = self.make_model(config).apply
        for *_, text in texts:
            ids = tokenizer.encode(text).ids[:-1][: config.max_length]
            logits = apply(variables, jnp.asarray([ids]))[0, -1, : tokenizer.get_vocab_size()]
            best = jax.lax.top_k(logits, top_k)[1].tolist()
            yield {"text": text, "next": [tokenizer.id_to_token(token) for token in best]}

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        yield from answer["next"]
