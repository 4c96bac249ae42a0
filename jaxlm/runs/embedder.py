"""Vectors of texts from any encoder: published, pretrained here, or tuned for embeddings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxlm.config import FinetuneConfig
from jaxlm.convert.sentence_encoder import Dense
from jaxlm.data.labelled.dataset import Source
from jaxlm.data.labelled.records import Record, Table
from jaxlm.errors import InputError
from jaxlm.models.heads import EmbeddingHead, as_it_is, unit_length
from jaxlm.models.pooling import POOLS
from jaxlm.nn.choose import Wanted
from jaxlm.runs import base as bases
from jaxlm.runs import finetuned
from jaxlm.runs.answers import Answer, Answered, answered
from jaxlm.runs.attention import settle_model
from jaxlm.runs.base import Base
from jaxlm.runs.finite import require_finite
from jaxlm.runs.folder import is_run, read_any_config
from jaxlm.runtime.storage import locate
from jaxlm.tasks.embedding import Embed, Embedding, make_embed
from jaxlm.tasks.task import require_one_text
from jaxlm.train import restore
from jaxlm.train.stored import on_one_device

QUERIES, DOCUMENTS = ("query",), ("document", "passage", "corpus")
"""What the prompts of queries, and of what is searched, are called."""


@dataclass(frozen=True)
class Embedder:
    """``embedder(texts)``, and what is to be known of it."""

    embed: Embed
    about: str
    """How vectors are made, in one line."""
    column: str
    """The field of a record that it embeds."""
    source: Source = field(default_factory=lambda: Table(path="texts.csv"))
    """The form of files of texts."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What may stand before a text, by name."""
    prompt: str = ""
    """What is put before each text."""

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts embed"]:
        """A vector for each text, in their order."""
        return self.embed([self.prompt + text for text in texts])

    def with_prompt(self, name: str | None, *usual: str) -> "Embedder":
        """With the prompt of that name before each text; "" is none.

        None: the first of the ``usual`` names that there is, else the prompt that it has.
        """
        if name is None:
            found = [self.prompts[one] for one in usual if one in self.prompts]
            return replace(self, prompt=[*found, self.prompt][0])
        if name and name not in self.prompts:
            known = ", ".join(f"{key} ({text!r})" for key, text in self.prompts.items())
            raise InputError(
                f"there is no prompt {name!r}, but {known or 'none at all'}; '' puts nothing "
                "before texts"
            )
        return replace(self, prompt=self.prompts.get(name, ""))

    def stream(self, records: Iterable[Record]) -> Iterator[Answered]:
        """Each record with its text and, as ``embedding``, its vector, an array."""

        def answer(texts: list[str]) -> list[Answer]:
            vectors = self(texts)
            pairs = zip(texts, vectors, strict=True)
            return [{"text": text, "embedding": vector} for text, vector in pairs]

        return answered(records, lambda record: record.text(self.column), answer)


def open_embedder(
    name: str,
    *,
    step: int | None = None,
    base: Base | str | None = None,
    batch_size: int = 32,
    attention: Wanted = "auto",
    report: Callable[[str], None] = restore.warn,
) -> Embedder:
    """That of a fine-tuned run, of a pretraining run, of a folder in Hugging Face's layout, or of
    a name on the hub.

    ``report`` is told what is cut. Raises :class:`InputError` where a run was tuned for something
    else, or a folder says that it makes vectors in a way that is not supported.
    """
    directory = locate(name)
    if is_run(directory):
        config = read_any_config(directory)
        if isinstance(config, FinetuneConfig):
            return _of_run(name, config, step, base, attention)
    elif step is not None:
        raise InputError(
            f"step={step} names a checkpoint of a run, and {name} is none: leave it out"
        )
    if base is not None:
        raise InputError(f"base={base!r} is for adapters, and {name} has none: leave it out")
    return _of_base(bases.load(name, step=step), batch_size, report, attention)


def _of_run(
    name: str,
    config: FinetuneConfig,
    step: int | None,
    base: Base | str | None,
    attention: Wanted,
) -> Embedder:
    task = config.task
    if not isinstance(task, Embedding):
        instead = "" if config.base is None else f", or its base, {config.base}"
        raise InputError(
            f"{name} was trained for {type(task).__name__}, whose head cannot embed: use "
            f"{task.verb}{instead}"
        )
    loaded = finetuned.open_finetuned(name, step=step, base=base, attention=attention)
    bare = replace(task, prompt="", pair_prompt=None)  # which is put before texts here
    loaded = replace(loaded, config=replace(loaded.config, task=bare))
    (column,) = task.text_fields

    def embed(texts: Sequence[str]) -> Float32[np.ndarray, "texts embed"]:
        records = (Record(fields={column: text}, origin="the texts given") for text in texts)
        _, outputs = loaded.outputs(bare.read(records, labelled=False), labelled=False)
        return outputs["embeddings"]

    about = f"pooling: {task.pooling or 'mean'}, as it was tuned; vectors of length 1"
    about += loaded.attends and f"; {loaded.attends}"
    source, prompts = loaded.config.data.train, task.prompts
    return Embedder(embed, about, column, source, prompts, prompts.get("query", ""))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an encoder makes a vector of a text."""

    head: EmbeddingHead
    max_length: int
    about: str
    """The head in one line."""
    prompts: Mapping[str, str]
    prompt: str
    """The default of the ``prompts``."""


def settings(base: Base) -> Settings:
    """As its folder says, else as is usual; raises where the folder says what is not supported."""
    require_one_text(base.config, "Embedding")
    says, prompts, prompt = base.sentence_encoder, {}, ""
    if says is None:
        pooling, scale, longest = "mean", unit_length, None
        about = (
            "pooling: mean, scaled to length 1 (nothing says how, for it is no sentence encoder)"
        )
    elif says.pooling is None:
        raise InputError(
            f"{base.name} makes one vector of a text with {says.problem}, which is not supported: "
            "take another encoder, or tune it with task=Embedding and a pooling of its own"
        )
    else:
        pooling, longest = says.pooling, says.max_length
        own = unit_length if says.normalized else as_it_is
        kept = slice(says.truncate_dim)
        scale = lambda vectors: own(_through(says.dense, vectors))[..., kept]
        length = "scaled to length 1" if says.normalized else "not scaled"
        if says.truncate_dim is not None:
            length += f", cut to the first {says.truncate_dim} numbers"
        maps = "".join(f", {one.kernel.shape[1]} by a Dense layer" for one in says.dense)
        about = f"pooling: {pooling}{maps}, {length}, as the folder of {base.name} says"
        prompts, prompt = says.prompts, says.default_prompt
    lengths = [length for length in (longest, base.config.max_length) if length is not None]
    return Settings(
        head=EmbeddingHead(POOLS[pooling], scale),
        max_length=min(lengths, default=512),
        about=about,
        prompts=prompts,
        prompt=prompt,
    )


def _through(
    layers: Sequence[Dense], vectors: Float[Array, "batch embed"]
) -> Float[Array, "batch features"]:
    for layer in layers:
        vectors = layer(vectors)
    return vectors


def _of_base(
    base: Base, batch_size: int, report: Callable[[str], None], wanted: Wanted
) -> Embedder:
    found, device = settings(base), jax.devices()[0]
    config, line = settle_model(base.config, found.max_length, device, wanted, trains=False)
    about = found.about + (line and f"; {line}")
    embed = make_embed(
        config.make(),
        on_one_device(base.encoder),
        base.tokenizer,
        max_length=found.max_length,
        batch_size=batch_size,
        head=found.head,
        report=report,
    )

    def checked(texts: Sequence[str]) -> Float32[np.ndarray, "texts embed"]:
        vectors = embed(texts)
        require_finite({"embeddings": vectors}, base.encoder)
        return vectors

    return Embedder(checked, about, "text", prompts=found.prompts, prompt=found.prompt)
