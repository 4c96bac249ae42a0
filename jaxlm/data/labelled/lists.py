"""Lists that stand as text in a cell of a table."""

import ast
import io
import json
import re
import tokenize
from itertools import pairwise
from typing import Any

from jaxlm.data import tabular
from jaxlm.errors import InputError


def parse(text: str) -> list[Any]:
    """The items of a list as JSON writes it, or Python, whose lists pandas writes.

    Raises ``ValueError`` where it is none.
    """
    try:
        return tabular.parse_json(text)
    except json.JSONDecodeError as error:
        message = error.msg
    try:
        items = None if _joins_strings(text) else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        items = None
    if not isinstance(items, list):
        raise ValueError(message)
    return items


def _joins_strings(text: str) -> bool:
    """Whether strings stand side by side, as numpy prints them, which Python would join."""
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    return (tokenize.STRING, tokenize.STRING) in pairwise(kinds)


def read(text: str, where: str, *, kind: type = str) -> list[Any] | None:
    """The items of a list of strings, or of that kind; None where the text is no such list.

    One that numpy printed raises: its items cannot be told apart.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    is_quoted = re.match(r"""\[\s*['"]""", text) is not None
    try:
        items = parse(text)
    except ValueError:
        if is_quoted or (kind is int and re.fullmatch(r"\[\s*\d+(\s+\d+)*\s*\]", text)):
            raise InputError(
                f"{where} is {text!r:.40}, which is not a list of JSON or Python, but may be what "
                """numpy prints: write it as ["a", "b"], or the data as JSON lines"""
            ) from None
        return None
    return items if is_quoted or all(type(item) in (str, kind) for item in items) else None


def split(text: str, where: str) -> list[Any]:
    """The items of a list of strings, or else the words, between white space."""
    items = read(text, where)
    return text.split() if items is None else items
