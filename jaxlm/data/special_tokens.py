"""Tokens with a meaning of their own: where texts begin and end, what is padding or hidden."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from jaxlm.errors import InputError

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own, found by name: BERT's, RoBERTa's, GPT-2's,
    Llama's, T5's or XLNet's, which has <s> and </s> besides, and does not use them."""

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
        sep = _find(tokenizer, SEP, "<sep>", "</s>", "<|end_of_text|>", "<|endoftext|>")
        pad = _look_up(tokenizer, PAD, "<pad>", "<|finetune_right_pad_id|>")
        return cls(
            pad=sep if pad is None else pad,  # what is padding, lengths say
            unk=_look_up(tokenizer, UNK, "<unk>"),
            cls=_find(
                tokenizer, CLS, "<cls>", "<s>", "<|begin_of_text|>", "<|endoftext|>", "<pad>"
            ),
            sep=sep,
            mask=_look_up(tokenizer, MASK, "<mask>"),
        )

    @property
    def begins_texts(self) -> bool:
        """Whether ``cls`` stands before what is read; in T5 it only begins what is written."""
        return not self.cls == self.pad != self.sep

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


def ends_with_cls(tokenizer: Tokenizer) -> bool:
    """Whether it frames a text as XLNet's does, with the classifying token at the end."""
    ids, cls = tokenizer.encode("a").ids, SpecialTokens.of(tokenizer).cls
    return ids[-1:] == [cls] != ids[:1]
