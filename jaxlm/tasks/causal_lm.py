"""Causal language modelling: each token from those before it, and how it is used afterwards."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.decode.beam import BeamConfig, BeamSearch, Writing, beyond_text
from jaxlm.decode.causal_model import CausalModel
from jaxlm.decode.generate import Generate
from jaxlm.errors import InputError
from jaxlm.evaluate.metrics import perplexity
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import CausalConfig, ModelConfig
from jaxlm.nn import stack
from jaxlm.objectives import causal_lm
from jaxlm.objectives.masking import Vocabulary
from jaxlm.peft import quantize
from jaxlm.tasks.task import Given, require_one_text
from jaxlm.typing import Apply, Loss, Variables

_MAX_LENGTH = 2048  # of models that have no limit


@dataclass(frozen=True, kw_only=True)
class CausalLm:
    """Predict each token from those before it (Radford et al. 2018, section 3.1)."""

    isolate_documents: bool = True
    """Documents that share a row do not attend to each other, and each counts positions from 0."""

    @property
    def verb(self) -> str:
        """What scripts/predict.py calls its use."""
        return "generate"

    @property
    def usage(self) -> str:
        """What follows the verb."""
        return '"How a text begins"'

    def for_evaluation(self) -> "CausalLm":
        """The same."""
        return self

    def num_predicted(self, length: int) -> int:
        """Positions of a row that reach the head in training: all."""
        return length

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """None: any text can be continued."""
        return ""

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The decoder with the head of its architecture."""
        require_one_text(config, "CausalLm", "SpanCorruption")
        if not config.is_causal:
            raise InputError(
                f"task=CausalLm predicts each token from those before it, and a model of "
                f"{type(config).__name__} sees all of them: use task=MaskedLm, or one that reads "
                "one way, such as a GPT-2"
            )
        if not isinstance(config, CausalConfig):
            raise InputError(
                f"task=CausalLm is for models that write, which {type(config).__name__} does not: "
                "use a GPT-2 or a Llama"
            )
        return WithLmHead(config.make(), config.make_lm_head())

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """Perplexity, and bits for each byte of the text (UTF-8), by which tokenizers compare.

        An isolated document has a token that is not predicted, its first.
        """
        if not all(split in info.bytes for info in infos):
            return {"perplexity": perplexity(loss)}
        firsts = sum(info.documents[split] for info in infos) if self.isolate_documents else 0
        predicted = sum(info.tokens[split] for info in infos) - firsts
        bits = loss / math.log(2) * predicted
        return {
            "perplexity": perplexity(loss),
            "bits_per_byte": bits / sum(info.bytes[split] for info in infos),
        }

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """The cross-entropy of every token but the first of a document."""
        return causal_lm.make_loss(apply, vocabulary, isolate_documents=self.isolate_documents)

    def make_generate(
        self, config: ModelConfig, variables: Variables, tokenizer: Tokenizer
    ) -> Generate:
        """Continues texts that begin as documents do in training."""
        return Generate(causal_model(self.make_model(config), config, variables, tokenizer))

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
        """How each text goes on; what is sampled depends on its own number alone."""
        write = self.make_generate(config, variables, tokenizer)

        def problem(given: Given) -> str:
            try:
                write.check(given.text)
            except InputError as error:
                return str(error)
            return ""

        for error, group in groupby(texts, problem):
            first, *others = group
            if error:
                yield from [{"error": error}] * (1 + len(others))
                continue
            numbers, _, chosen = zip(first, *others, strict=True)
            written = (
                BeamSearch(write.model)(chosen, generate)
                if isinstance(generate, BeamConfig)
                else write(chosen, generate, numbers=numbers)
            )
            for one in written:
                yield {
                    "text": one.prompt,
                    "continuation": one.text,
                    "stopped": one.stopped,
                    "tokens": one.tokens,
                    "log_probabilities": one.log_probabilities,
                    **beyond_text(one),
                }

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """The text and its continuation; or each of several, behind its score."""
        found = answer.get("n_best", [])
        if len(found) < 2:
            yield answer["text"] + answer["continuation"]
            return
        for one in found:
            yield f"{one['score']:8.4f}  {answer['text']}{one['text']}"


def causal_model(
    model: nn.Module, config: ModelConfig, variables: Variables, tokenizer: Tokenizer
) -> CausalModel:
    """A model with its head, as decoding takes it; texts begin and end as prepared ones do."""
    assert isinstance(config, CausalConfig)  # make_model has seen to it
    special = SpecialTokens.of(tokenizer)

    apply = quantize.adapt(model.apply)

    def last(module, tokens, cache, positions, segment_ids):
        logits, cache = module.extend(tokens, cache, positions=positions, segment_ids=segment_ids)
        return logits[:, None], cache

    def every(module, tokens, cache, positions, segment_ids):
        hidden, cache = module.encoder.extend(
            tokens, cache, positions=positions, segment_ids=segment_ids
        )
        return module.head(hidden, module.encoder.token_embed), cache

    def step(method, variables, cache, *inputs):
        tokens, positions, segment_ids = inputs
        variables = stack.join(variables)
        return apply(variables, tokens, cache, positions, segment_ids, method=method)

    return CausalModel(
        step=partial(step, last),
        step_all=partial(step, every),
        make_state=config.make_cache,
        variables=variables,
        arrange=by_layer,
        tokenizer=tokenizer,
        max_length=config.max_length or _MAX_LENGTH,
        start=(special.cls,),
        end=(special.sep,),
    )


def by_layer(variables: Variables, name: str = "layers") -> Variables:
    """With an array for each layer of the stack of that name in the encoder.

    XLA would copy a stack's slices for every token.
    """
    params: Any = variables["params"]
    layers = stack.split(params["encoder"][name])
    params = {**params, "encoder": {**params["encoder"], name: layers}}
    return {**variables, "params": params}
