"""What continuing a text needs: a model as functions, a tokenizer, and how texts begin and end."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Int, PyTree
from tokenizers import Tokenizer

from jaxlm import sharding
from jaxlm.data import tokenizers
from jaxlm.decode import decoding
from jaxlm.decode.decoding import MakeState, Read, Step, Take
from jaxlm.errors import InputError
from jaxlm.sharding import RULES, Rules
from jaxlm.typing import Variables

Written = TypeVar("Written")


@dataclass(frozen=True, kw_only=True)
class CausalModel:
    """A model that predicts the next token, as :mod:`jaxlm.decode.decoding` describes it."""

    step: Step
    """With the logits of all positions, or of the last alone, which is faster at prompts."""
    make_state: MakeState
    variables: Variables
    """Best with stacked parameters split into layers (``jaxlm.nn.stack``), or each step copies
    them."""
    tokenizer: Tokenizer
    max_length: int
    """The most tokens of a prompt and its continuation together."""
    start: Sequence[int] = ()
    """Tokens before every text, as in training."""
    end: Sequence[int] = ()
    """Tokens with which a text ends, as in training."""
    step_all: Step | None = None
    """The same with the logits of all positions, if ``step`` has only the last: for choices."""
    batch_size: int = 8
    """Texts that are continued together, if the caller does not say."""
    mesh: Mesh | None = None
    """Where the variables lie, if on several devices; rows are split over it as in training."""
    rules: Rules = RULES
    read: Read | None = None
    """How a model reads sources that writes targets: texts are then sources, and each target begins
    with ``start`` alone. ``make_state`` is not called."""
    source_tokenizer: Tokenizer | None = None
    """That of sources, if they have another than targets."""
    take: Take = decoding.take
    """Picks rows of a state, for beams; of a model that reads sources each has as many, and only
    rows of the same source take each other's places."""
    arrange: Callable[[Variables], Variables] | None = None
    """What the step takes instead of the variables, if something else is read faster."""

    @cached_property
    def arranged(self) -> Variables:
        """The variables as the step takes them."""
        return self.variables if self.arrange is None else self.arrange(self.variables)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id."""
        return tokenizers.vocab_size(self.tokenizer)

    @cached_property
    def ids(self) -> list[int]:
        """Those of tokens; there may be gaps between them."""
        return sorted(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def special_tokens(self) -> list[str]:
        """Names of tokens that texts do not show."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that the tokenizer puts around whole ones."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str | Sequence[int]) -> list[int]:
        """The tokens of a text to be continued, or these; at least one more fits behind them.

        Of a model that reads sources what it writes first, whatever the source.
        """
        if self.read is not None:
            return list(self.start)
        ids = self.encode(text) if isinstance(text, str) else list(text)
        if not ids:
            raise InputError(f"the prompt {text!r} holds no token: give at least one word")
        if isinstance(text, str):
            ids = [*self.start, *ids]
        else:
            text = self.decode(ids)
        if len(ids) >= self.max_length:
            raise InputError(
                f"the prompt {shortened(text)} has {len(ids)} tokens, and the model takes "
                f"{self.max_length} together with what it adds: leave out at least "
                f"{len(ids) - self.max_length + 1}"
            )
        return ids

    def source(self, text: str | Sequence[int]) -> list[int]:
        """The tokens of a source, framed as the tokenizer does, or these; as many as fit."""
        if isinstance(text, str):
            text = (self.source_tokenizer or self.tokenizer).encode(text).ids
        if not len(text):
            raise InputError("a source holds no token: give at least one word")
        return list(text)[: self.max_length]

    def source_arrays(
        self, sources: Sequence[Sequence[int]]
    ) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, "batch length"]]:
        """The tokens of sources and their segment ids."""
        sizes = np.array([len(source) for source in sources])
        length = bucket(int(sizes.max()))
        segment_ids = np.where(np.arange(length)[None, :] < sizes[:, None], 0, -1)
        return right_padded(sources, length), segment_ids.astype(np.int32)

    def stops(self, names: Iterable[str]) -> set[int]:
        """Tokens that end a text: as in training, and these."""
        return {*self.end, *map(self.token, names)}

    def banned(
        self, names: Iterable[str], stops: Iterable[int], min_new_tokens: int
    ) -> Bool[np.ndarray, " vocab"]:
        """These tokens, and ids of none; raises where no token could begin a continuation."""
        banned: Any = np.ones(self.vocab_size, bool)
        banned[self.ids] = False
        banned[[self.token(name) for name in names]] = True
        early = banned.copy()
        early[list(stops)] = True
        if (early if min_new_tokens else banned).all():
            raise InputError(
                f"all {len(self.ids)} tokens are banned"
                + (" or end a text before min_new_tokens" if min_new_tokens else "")
                + ": leave some"
            )
        return banned

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; special ones have none."""
        return self.tokenizer.decode(list(ids))

    def shown(self, text: str | Sequence[int]) -> str:
        """A text to be continued, or a source; that of its tokens, where these are given."""
        if isinstance(text, str):
            return text
        reads = None if self.read is None else self.source_tokenizer
        return (reads or self.tokenizer).decode(list(text))

    def token(self, name: str) -> int:
        """The id of a token, by its name in the vocabulary or by its text."""
        if (found := self.tokenizer.token_to_id(name)) is not None:
            return found
        ids = self.encode(name)
        if len(ids) != 1:
            pieces = " ".join(repr(self.tokenizer.id_to_token(i)) for i in ids) or "none"
            raise InputError(f"{name!r} is not one token but {len(ids)} ({pieces}): name one token")
        return ids[0]

    def num_rows(self, count: int, most: int) -> int:
        """So many rows that few sizes are compiled, and that devices hold equally many."""
        split = dict(self.rules)["batch"] or ()
        pieces = math.prod(self.mesh.shape[axis] for axis in split) if self.mesh else 1
        rows = min(1 << (count - 1).bit_length(), max(most, count))
        return -(-rows // pieces) * pieces

    def put(self, rows: PyTree) -> PyTree:
        """Arrays of the host, each [batch, …], on the device, or on those of the mesh."""
        if (mesh := self.mesh) is None:
            return jax.device_put(rows)

        def one(x: np.ndarray) -> jax.Array:
            names = ("batch", *(None,) * (x.ndim - 1))
            place = NamedSharding(mesh, sharding.spec(names, mesh, x.shape, self.rules))
            return jax.device_put(x, place)

        return jax.tree.map(one, rows)

    def traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, to be traced with the mesh in place."""

        def inside(*args: Any) -> Any:
            if self.mesh is None:
                return function(*args)
            with sharding.use_mesh(self.mesh, self.rules):
                return function(*args)

        return inside


def shortened(text: str) -> str:
    """A text as messages quote it."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"


def require_several(name: str, value: Iterable[Any]) -> None:
    """Raises for a string where several are meant: it would be taken for its characters."""
    if isinstance(value, str):
        raise InputError(f"{name}={shortened(value)} is one string: put it into a list")


def longest_first(
    sources: Sequence[Sequence[int]], write: Callable[[list[int]], Iterable[Written]]
) -> Iterator[Written]:
    """What is written for each, where that takes their numbers, those of like length together."""
    order = np.argsort([-len(source) for source in sources], kind="stable").tolist()
    yield from dict(sorted(zip(order, write(order), strict=True))).values()


def bucket(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, …: few lengths are compiled, and little is padding."""
    power = max(32, 1 << (length - 1).bit_length())
    return power * 3 // 4 if 32 < length <= power * 3 // 4 else power


def right_padded(rows: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "batch length"]:
    """Rows of tokens that all begin at the left."""
    tokens = np.zeros((len(rows), length), np.int32)
    for row, into in zip(rows, tokens, strict=True):
        into[: len(row)] = row
    return tokens


def left_padded(rows: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "batch length"]:
    """Rows of tokens that all end at the right."""
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
    return tokens
