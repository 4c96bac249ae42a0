"""Tokens with a meaning of their own: where texts begin and end, what is padding or hidden."""

from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer, models

from jaxlm.errors import InputError

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BEGINS = (CLS, "<cls>", "<s>", "<|begin_of_text|>", "<|endoftext|>", "<pad>")
_ENDS = (SEP, "<sep>", "</s>", "<|end_of_text|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own.

    The post-processor says what begins and ends a text. What it does not say has a name: BERT's,
    RoBERTa's, GPT-2's, Llama's, T5's or XLNet's.
    """

    pad: int
    unk: int | None
    """None: the tokenizer knows every character."""
    cls: int
    """Begins a text; in T5 padding does; XLNet's stands at its end."""
    sep: int
    """Ends a text."""
    mask: int | None
    """None: nothing is meant to be filled in."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Those of a tokenizer; :class:`InputError` names the one it lacks."""
        own = own_frame(tokenizer)
        sep = own.after[0] if own.after else _find(tokenizer, *_ENDS)
        first = own.after[-1:] if own.ends_with_cls else own.before[:1]
        pad = _look_up(tokenizer, PAD, "<pad>", "<|finetune_right_pad_id|>")
        return cls(
            pad=sep if pad is None else pad,  # what is padding, lengths say
            unk=_look_up(tokenizer, UNK, "<unk>"),
            cls=first[0] if first else _find(tokenizer, *_BEGINS),
            sep=sep,
            mask=_look_up(tokenizer, MASK, "<mask>"),
        )

    @property
    def ids(self) -> tuple[int, ...]:
        """Those there are."""
        named = (self.pad, self.unk, self.cls, self.sep, self.mask)
        return tuple(i for i in dict.fromkeys(named) if i is not None)


def sentinel(number: int) -> str:
    """The name of the token that stands for the hidden span of this number, from 0, as in T5."""
    return f"<extra_id_{number}>"


def sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of those that the tokenizer has, by their numbers."""
    ids: list[int] = []
    while (i := tokenizer.token_to_id(sentinel(len(ids)))) is not None:
        ids.append(i)
    return tuple(ids)


def _look_up(tokenizer: Tokenizer, *names: str) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((i for i in ids if i is not None), None)


def _find(tokenizer: Tokenizer, *names: str) -> int:
    found = _look_up(tokenizer, *names)
    if found is None:
        raise InputError(f"the tokenizer has no token {' or '.join(names)}; add it, or use another")
    return found


class Frame(NamedTuple):
    """Ids of the tokens around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def ends_with_cls(self) -> bool:
        """Whether it is as XLNet's, with the classifying token at the end."""
        return not self.before and len(self.after) > 1


def own_frame(tokenizer: Tokenizer) -> Frame:
    """What its post-processor puts around a text."""
    encoding = post_processed(tokenizer)
    place = encoding.sequence_ids.index(0)
    return Frame(tuple(encoding.ids[:place]), tuple(encoding.ids[place + 1 :]))


def frame(tokenizer: Tokenizer, special: SpecialTokens | None = None) -> Frame:
    """What stands around each text of pretraining, which has an end in any case.

    The post-processor's tokens, as around labelled texts; on a side where it has none, Llama's end
    or both of GPT-2's, the one that is found by name. ``special``: those that older data were
    framed by, which all had names.
    """
    found = SpecialTokens.of(tokenizer)
    special = special or found
    own = own_frame(tokenizer) if special == found else Frame((), ())
    only_written = special.cls == special.pad != special.sep  # in T5, texts that are read lack it
    lacks_cls = not own.before and not own.ends_with_cls and not only_written
    return Frame((special.cls,) if lacks_cls else own.before, own.after or (special.sep,))


def post_processed(tokenizer: Tokenizer, num_texts: int = 1) -> Encoding:
    """One or two texts of one token in their frame; no vocabulary has to have that token."""
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if tokenizer.post_processor is not None:
        bare.post_processor = tokenizer.post_processor
    return bare.encode("a", "a" if num_texts == 2 else None)
