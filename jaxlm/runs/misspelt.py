"""What a misspelt or former name of jaxlm's may have meant, for the error of a config file."""

import ast
import difflib
import re
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[1]


class _Class(NamedTuple):
    bases: list[str]
    fields: list[str]


def hint(error: BaseException) -> str:
    """What to append to an import, or an argument, that does not exist; '' for other errors."""
    message = str(error)
    if found := re.search(r"No module named '(jaxlm\.[\w.]+)'", message):
        return _meant(_near_modules(found[1]))
    if found := re.search(r"cannot import name '(\w+)' from '(jaxlm[\w.]*)'", message):
        return _meant(_near_names(found[1]))
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword .* '(\w+)'", message):
        fields = _fields(found[1], _classes())
        near = difflib.get_close_matches(found[2], fields)
        others = f"; there are {', '.join(fields)}" if fields else ""
        return _meant(near) if near else others
    return ""


def _meant(names: list[str]) -> str:
    if not names:
        return "; jaxlm/CHANGELOG.md lists names that have changed"
    return f"; did you mean {' or '.join(names)}?"


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(_ROOT.parent).with_suffix("").parts): path
        for path in sorted(_ROOT.rglob("*.py"))
        if path.stem != "__init__"
    }


def _near_modules(wanted: str) -> list[str]:
    known = {name.removeprefix("jaxlm."): name for name in _modules()}
    wanted = wanted.removeprefix("jaxlm.")
    last = wanted.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(wanted, known, 2)
    return [known[name] for name in near]


def _near_names(wanted: str) -> list[str]:
    """Such as ``jaxlm.peft.lora.LoraConfig``: those of other modules, or those spelled alike."""
    known: dict[str, str] = {}
    for module, path in _modules().items():
        for name in re.findall(r"^(?:class|def) ([A-Za-z]\w*)", path.read_text("utf-8"), re.M):
            known.setdefault(name, f"{module}.{name}")
    near = [wanted] if wanted in known else difflib.get_close_matches(wanted, known)
    return [known[name] for name in near]


def _classes() -> dict[str, _Class]:
    trees = (ast.parse(path.read_text("utf-8")) for path in _modules().values())
    return {
        node.name: _Class(
            [base.id for base in node.bases if isinstance(base, ast.Name)],
            [
                one.target.id
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            ],
        )
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _fields(name: str, classes: dict[str, _Class]) -> list[str]:
    """Those of a class and its bases."""
    if name not in classes:
        return []
    own = classes[name]
    return [*own.fields, *(field for base in own.bases for field in _fields(base, classes))]
