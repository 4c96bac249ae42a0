"""The documentation that comes with Python and its packages, as small corpora of English prose."""

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jaxlm.data import files
from jaxlm.data.files import OnRead, ignore
from jaxlm.errors import InputError

_NOT_LIBRARY = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "_bundled"}
_INSTALLED = {"site-packages", "dist-packages"}
_HEADING = re.compile(r"^\S.*\n([=*\-~^\"'#])\1{2,}$", re.MULTILINE)
_QUOTED = re.compile(r"`([^`'\s]+)'")  # old docstrings quote `so'
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+)[^`]*`")  # :class:`list` reads as list
_MARKUP = re.compile(r"[`*|]+|\[\d+\]_?|(?<=:):")
_WORD = re.compile(r"[\"'(]*[A-Za-z]+(['’-][A-Za-z]+)*[\"')]*[.,;:!?]*[\"')]*")


@dataclass(frozen=True, kw_only=True)
class PyDocs:
    """The running interpreter's own documentation: the language reference and all docstrings.

    About 2 MB of English, with nothing to download. It differs between versions of Python.
    """

    package: str | None = None
    """An installed package, such as scipy, whose docstrings are read instead; None = Python's."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """Sections of the reference, then docstrings module by module; prose only, unwrapped."""
        for path, texts in _collect(self.package):
            yield from texts
            on_read(path.stat().st_size)

    def size(self) -> int:
        """Bytes of the modules read."""
        return files.size(modules(self.package))

    def fingerprint(self) -> str:
        """A sha256 of the modules' contents."""
        return files.sha256(modules(self.package), "pydocs")


def by_module(package: str | None = None) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The texts of each module, whose path is relative to the library or the package."""
    for path, texts in _collect(package):
        yield path.relative_to(_root(package)), texts


@cache  # parsing takes seconds, the result two megabytes
def _collect(package: str | None) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    found = []
    for path in modules(package):
        texts = _topics(path) if path.parent.name == "pydoc_data" else _docstrings(path)
        found.append((path, tuple(text for text in map(_prose, texts) if text)))
    return tuple(found)


def _root(package: str | None) -> Path:
    if package is None:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"package={package!r} is no installed package with modules: pip install it, or name "
            "another, such as scipy"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def modules(package: str | None = None) -> list[Path]:
    """The files read: of the library or the package, without tests and what was installed later."""
    root = _root(package)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    modules = [
        root / name
        for name in names
        if (_NOT_LIBRARY | _INSTALLED).isdisjoint(name.split("/"))
        and not name.startswith(("config-", "_sysconfigdata", "pydoc_data/__init__"))
    ]
    if not modules:
        raise InputError(f"{root} holds no Python source to read")
    return sorted(modules, key=lambda path: path.parent.name != "pydoc_data")


def _topics(path: Path) -> Iterator[str]:
    (topics,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.Assign)
    )
    for _, text in sorted(topics.items()):
        starts = [match.start() for match in _HEADING.finditer(text)]
        for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
            yield text[start:end]


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings(action="ignore"):  # old modules hold invalid escapes
        tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def _prose(text: str) -> str:
    """The paragraphs that read as sentences, without markup: no code, doctests, tables, titles."""
    text = _QUOTED.sub(r"'\1'", _ROLE.sub(r"\1", _HEADING.sub("", text)))
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n".join(_MARKUP.sub("", paragraph) for paragraph in paragraphs if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    words = _MARKUP.sub("", paragraph).split()
    plain = sum(_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= 4 and plain >= 0.75 * len(words) and not paragraph.startswith(">>>")
