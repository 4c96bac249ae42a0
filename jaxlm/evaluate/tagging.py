"""From one tag for each word to entities, whatever sequence of tags a model comes up with."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlm.errors import InputError

OUTSIDE = "O"
OTHER_LETTERS = {"L": "E", "U": "S", "M": "I", "W": "S"}  # of BILUO, BMES and BMEWO


@dataclass(frozen=True, order=True)
class Entity:
    """Words ``start`` to ``end`` (past the last) are one entity."""

    start: int
    end: int
    type: str


@dataclass(frozen=True, kw_only=True)
class Mention:
    """An entity and where it stands in its text: ``text[start:end]``, in characters."""

    type: str
    text: str
    start: int
    end: int
    probability: float | None
    """The least of its words' probabilities: an entity is right only if all its words are."""


def read_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence in IOB1, BIO (IOB2), IOBES or BILUO; the first hyphen ends the
    prefix.

    Ill-formed sequences are read as by conlleval (Tjong Kim Sang and Buchholz, 2000): a word inside
    an entity, with no entity of its type before it, begins one.
    """
    entities = []
    start, open_type = 0, None
    for word, tag in enumerate([*tags, OUTSIDE]):
        prefix, type = _split(tag)
        begins = prefix in "BS" or (prefix in "IE" and type != open_type)
        if open_type is not None and (begins or prefix == OUTSIDE):
            entities.append(Entity(start, word, open_type))
            open_type = None
        if begins:
            start, open_type = word, type
        if prefix in "ES":
            entities.append(Entity(start, word + 1, type))
            open_type = None
    return entities


def find_mentions(
    tags: Sequence[str],
    words: Sequence[tuple[int, int]],
    text: str,
    probabilities: Sequence[float] | None = None,
) -> list[Mention]:
    """The entities of a text as pieces of it.

    Args:
        tags: one for each word.
        words: where each word stands in ``text``: its first character, and past its last.
        probabilities: of each word's tag.
    """
    if len(words) != len(tags) or len(probabilities or tags) != len(tags):
        raise InputError(
            f"{len(tags)} tags, {len(words)} words and {len(probabilities or tags)} probabilities "
            "are not of one sentence: each word has one of each"
        )
    return [
        Mention(
            type=entity.type,
            text=text[words[entity.start][0] : words[entity.end - 1][1]],
            start=words[entity.start][0],
            end=words[entity.end - 1][1],
            probability=min(probabilities[entity.start : entity.end]) if probabilities else None,
        )
        for entity in read_entities(tags)
    ]


def _split(tag: str) -> tuple[str, str]:
    prefix, _, type = tag.partition("-")
    prefix = OTHER_LETTERS.get(prefix, prefix)
    if tag != OUTSIDE and not (prefix in ("B", "I", "E", "S") and type):
        raise InputError(
            f"tag {tag!r} is neither O nor one of B-, I-, E- and S- (BILUO: B-, I-, L-, U-) before "
            "a type"
        )
    return prefix, type
