"""A model to be served without jaxlm: a run, or a published encoder, as StableHLO.

What leads from tokens to an answer is inside of the function: pooling, softmax, the unit of
numbers, the search for the best span. Cutting and padding are left to the tokenizer's file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from tokenizers import Tokenizer

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import stablehlo
from jaxlm.data import tokenizers
from jaxlm.data.labelled import framing
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.models.heads import WithHead
from jaxlm.models.model import is_attentive
from jaxlm.objectives import supervised
from jaxlm.objectives.question_answering import FORBIDDEN
from jaxlm.runs import base as bases
from jaxlm.runs import embedder, finetuned, pretrained, published_task
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.folder import is_run, read_any_config
from jaxlm.runs.pretrained import Pretrained
from jaxlm.runtime.storage import locate
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.tasks.task import Labels
from jaxlm.train.stored import read
from jaxlm.typing import Apply, Scalar

Params = PyTree[Float[Array | np.ndarray, "..."]]
Ids = Int[Array | np.ndarray, "_ _"]
_ROWS = ("batch, length",) * 3  # ids, type ids and mask, as tokenizers gives them
_MORE_THAN = 512  # tokens of a row, where a model has no limit


@dataclass(frozen=True, kw_only=True)
class Served:
    """What an artefact computes, and how it is used."""

    verb: str
    apply: Callable[..., Any]
    """``apply(params, ids, type_ids, mask, ...)`` of arrays in ``shapes``."""
    params: Params
    tokenizer: Tokenizer
    max_length: int
    about: Mapping[str, Any]
    """What its user must know beside: labels, a prompt, thresholds."""
    texts: str
    """Two of them, as Python."""
    encode: str = "texts"
    """What of ``texts`` is tokenised, as Python."""
    more: str = ""
    """Further arrays, as Python."""
    answers: str
    """What is made of what the function gives, ``found``."""
    returns: str
    """The same in words."""
    shapes: Sequence[str] = _ROWS
    strategy: str = "longest_first"
    """Which of two texts is cut."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What is done otherwise than by scripts/predict.py."""


def export(name: str, path: str | Path, *, step: int | None = None, base: str | None = None) -> str:
    """Write the model of a run, a folder or a name on the hub; returns a line on it."""
    return write(name, path, open_served(name, step=step, base=base))


def write(name: str, path: str | Path, one: Served) -> str:
    """A new folder with it; returns a line on it, which calls it ``name``."""
    tokenizer = Tokenizer.from_str(one.tokenizer.to_str())
    pad = SpecialTokens.of(tokenizer).pad
    tokenizer.enable_truncation(one.max_length, strategy=one.strategy)
    tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad))
    about = {"task": one.verb, "max_length": one.max_length, **one.about}
    arguments = (one.apply, one.params, one.shapes, one.max_length)
    size = stablehlo.write(path, *arguments, tokenizer, about, _readme(name, one))
    kilobytes = f"{size / 1e3:,.0f} kB for {', '.join(stablehlo.PLATFORMS)}"
    return f"{name} is in {path}, to {one.verb}: a function of {kilobytes}, and its weights"


def open_served(name: str, *, step: int | None = None, base: str | None = None) -> Served:
    """What a run computes, or an encoder in Hugging Face's layout, which embeds."""
    directory = locate(name)
    config = read_any_config(directory) if is_run(directory) else None
    if isinstance(config, FinetuneConfig):
        return served(finetuned.open_finetuned(name, step=step, base=base))
    if config is None and published_task.find_task_model(name) is not None:
        return served(published_task.open_tuned(name, step=step, base=base))
    if base is not None:
        raise InputError(f"base={base!r} is for adapters, and {name} has none: leave it out")
    if isinstance(config, PretrainConfig):
        return served(pretrained.open_pretrained(name, step))
    if step is not None:
        raise InputError(f"step={step} names a checkpoint of a run, and {name} is none")
    return _encoder(bases.load(name))


def served(run: FinetunedRun | Pretrained) -> Served:
    """What a run computes."""
    return _finetuned(run) if isinstance(run, FinetunedRun) else _pretrained(run)


def _portable(config: Any) -> Any:
    """With attention as every device computes it, for any length."""
    return replace(config, attention=None) if is_attentive(config) else config  # pyright: ignore[reportArgumentType]


def _rows(apply: Apply) -> Callable[..., Array]:
    """A model's outputs for arrays as tokenizers gives them."""

    def call(params: Params, ids: Ids, types: Ids, mask: Ids) -> Array:
        batch = {"tokens": ids, "token_type_ids": types, "lengths": mask.sum(-1)}
        return supervised.call(apply, {"params": jax.tree.map(jnp.asarray, params)}, batch, None)

    return call


def _finetuned(loaded: FinetunedRun) -> Served:
    task, labels = loaded.task, loaded.labels
    config = replace(loaded.config, model=_portable(loaded.config.model))
    call = _rows(finetuned.make_model(config, labels).apply)
    common: dict[str, Any] = {
        "verb": task.verb,
        "params": loaded.merged(),
        "tokenizer": loaded.tokenizer,
        "max_length": loaded.framer.max_length,
    }
    match task:
        case Classification():
            pair = len(task.text_fields) > 1
            texts = {"texts": '[("A text.", "Its pair."), ("One.", "Another.")]', "notes": _PAIRS}
            texts = texts if pair else {}
            return _classifier(call, task, labels, {"texts": _TEXTS, **common, **texts})
        case Tagging():
            tags = '{w: about["labels"][p[row.word_ids.index(w)]] for w in sorted({*row.word_ids}'
            return Served(
                **common,
                apply=lambda *given: jax.nn.softmax(call(*given)),
                about={"labels": labels, "space": framing.space_before(loaded.tokenizer)},
                texts='["A text of words .".split(), "Another".split()]',
                encode='[[about["space"] + word for word in words] for words in texts], '
                "is_pretokenized=True",
                answers=f"[{tags} - {{None}})}} for row, p in zip(rows, found.argmax(-1))]",
                returns="the tag of each word by its number; `found` has the probabilities of all "
                "labels at each token",
                notes=("a sentence that is too long is cut, and not read in windows",),
            )
        case QuestionAnswering():
            return Served(
                **common,
                apply=lambda params, ids, types, mask, context: _best_span(
                    call(params, ids, types, mask), context > 0, task
                ),
                shapes=(*_ROWS, "batch, length"),
                about={},
                texts='[("Who wrote it?", "Ada wrote it."), ("Where?", "In a small house.")]',
                more="[[i == 1 for i in row.sequence_ids] for row in rows]",
                answers="[context[row.offsets[i][0] : row.offsets[j][1]].strip() "
                'if row.sequence_ids[i] == 1 else "" '
                "for (_, context), row, (i, j) in zip(texts, rows, found)]",
                returns="the answer in each context, empty where there is none; `found` has its "
                "first and last token",
                strategy="only_second",
                notes=("a context that is too long is cut, and not read in windows",),
            )
        case Embedding():
            return _embedder(call, task.prompts.get("query", ""), task.prompts, common)
    raise _refusal(loaded.config.name, task.verb)


_TEXTS = '["A text.", "Another one, which is longer."]'


_PAIRS = ("where both texts of a pair are cut, the second may keep a token of the first's",)


def _classifier(
    call: Callable[..., Array], task: Classification, labels: Labels, common: dict[str, Any]
) -> Served:
    match task.fields.target:
        case "number":
            mean, deviation = task.scale or (0.0, 1.0)
            return Served(
                **common,
                apply=lambda *given: call(*given)[:, 0] * deviation + mean,
                about={},
                answers="found.tolist()",
                returns="the number of each text",
            )
        case "class":
            activation, labelled = jax.nn.softmax, {"labels": labels}
            answers, returns = _NAMED, "the probability of each label"
        case "labels":
            thresholds = task.thresholds_of(tuple(labels)).tolist()
            named = dict(zip(labels, thresholds, strict=True))
            activation, labelled = jax.nn.sigmoid, {"labels": labels, "thresholds": named}
            answers = _NAMED
            returns = (
                "the probability of each label, which is chosen where that is above its threshold, "
                '`about["thresholds"]`'
            )
    apply = lambda *given: activation(call(*given))
    return Served(**common, apply=apply, about=labelled, answers=answers, returns=returns)


_NAMED = '[dict(zip(about["labels"], row.tolist())) for row in found]'


def _embedder(
    call: Callable[..., Array], prompt: str, prompts: Mapping[str, str], common: dict[str, Any]
) -> Served:
    return Served(
        **common,
        apply=call,
        about={"prompt": prompt, "prompts": dict(prompts)},
        texts=_TEXTS,
        encode='[about["prompt"] + text for text in texts]',
        answers="found",
        returns="a vector for each text",
    )


def _encoder(base: bases.Base) -> Served:
    said = embedder.settings(base)
    call = _rows(WithHead(_portable(base.config).make(), said.head).apply)
    common = {
        "verb": "embed",
        "params": {"encoder": read(base.encoder)},
        "tokenizer": base.tokenizer,
        "max_length": said.max_length,
    }
    return _embedder(call, said.prompt, said.prompts, common)


def _pretrained(loaded: Pretrained) -> Served:
    config = _portable(loaded.config.model)
    if not isinstance(loaded.task, MaskedLm):
        raise _refusal(loaded.config.name, loaded.task.verb)
    model = loaded.task.make_model(config)
    tokens, special = tokenizers.vocab_size(loaded.tokenizer), SpecialTokens.of(loaded.tokenizer)

    def apply(params: Params, ids: Ids, types: Ids, mask: Ids, blanks: Ids) -> Array:
        logits: Any = model.apply({"params": params}, ids, blanks, segment_ids=mask - 1)
        return jax.nn.softmax(logits[..., :tokens])

    mask = loaded.tokenizer.id_to_token(special.mask or 0)
    return Served(
        verb=loaded.task.verb,
        apply=apply,
        params=loaded.variables["params"],
        tokenizer=loaded.tokenizer,
        max_length=config.max_length or _MORE_THAN,
        shapes=(*_ROWS, "batch, blanks"),
        about={"mask": special.mask},
        texts=f'["A {mask} of strings.", "The {mask}."]',
        more='[[row.ids.index(about["mask"])] for row in rows]',
        answers="[[tokenizer.decode([i]).strip() for i in row[0].argsort()[:-6:-1].tolist()] "
        "for row in found]",
        returns="the five likeliest tokens for the first blank of each text; `found` has the "
        "probabilities of all tokens at the positions that are given, of any number in each row",
    )


def _best_span(
    logits: Float[Array, "batch length 2"],
    context: Bool[Array, "batch length"],
    task: QuestionAnswering,
) -> Int[Array, "batch 2"]:
    """First and last token of the best answer; the first token of the row twice where none is."""
    starts = jnp.where(context, logits[..., 0], FORBIDDEN)
    ends = jnp.where(context, logits[..., 1], FORBIDDEN)
    place = jnp.arange(logits.shape[1])
    further = place[None, :] - place[:, None]
    is_span = (further >= 0) & (further < task.max_answer_length)
    sums = jnp.where(is_span[None], starts[:, :, None] + ends[:, None, :], 2 * FORBIDDEN)
    first = sums.max(2).argmax(1)
    last = jnp.take_along_axis(sums.argmax(2), first[:, None], axis=1)[:, 0]
    none = logits[:, 0].sum(-1) - sums.max((1, 2))
    is_there = none <= _threshold(task)
    return jnp.where(is_there[:, None], jnp.stack([first, last], axis=1), 0)


def _threshold(task: QuestionAnswering) -> Scalar:
    return jnp.asarray(jnp.inf if task.null_threshold is None else task.null_threshold)


def _refusal(name: str, verb: str) -> InputError:
    return InputError(
        f"{name} is to {verb}, which is no function of one batch: what classifies, tags, answers, "
        "embeds or fills in blanks can be exported"
    )


def _readme(name: str, one: Served) -> str:
    more = f", np.int32({one.more})" if one.more else ""
    notes = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in one.notes)
    return f"""# {name}

A model to {one.verb}, as StableHLO. After `pip install jax flatbuffers tokenizers`, in this folder,

```python
import json
from pathlib import Path

import numpy as np
from jax import export
from tokenizers import Tokenizer

texts = {one.texts}
about, weights = json.loads(Path("model.json").read_text("utf-8")), dict(np.load("weights.npz"))
function, tokenizer = Path("model.stablehlo").read_bytes(), Tokenizer.from_file("tokenizer.json")
rows = tokenizer.encode_batch({one.encode})
batch = [[getattr(row, name) for row in rows] for name in ("ids", "type_ids", "attention_mask")]
found = np.asarray(export.deserialize(bytearray(function)).call(weights, *np.int32(batch){more}))
print({one.answers})
```

prints {one.returns}.

- Any number of texts, of any length up to {one.max_length} tokens (`max_length`), at which the
  tokenizer cuts; it pads on the right. To compile each pair of batch size and length once, keep
  `call = jax.jit(export.deserialize(...).call)`, and the weights as `jax.device_put(weights)`.
- `[SEP]` and the like in a text are text after `tokenizer.encode_special_tokens = True`.
- It runs on {", ".join(stablehlo.PLATFORMS)}, with JAX from 0.10 on, which promises to read it
  for half a year at least; JAX {jax.__version__} wrote it.
{notes}"""
