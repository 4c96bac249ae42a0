"""The laws that can be read from the source: floors, names, sizes, signatures, imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from floors below its own, and from its own package.
FLOORS = [
    {"errors", "sums", "tree", "typing"},
    {"runtime"},
    {"sharding"},
    {"data", "nn", "optim"},
    {"models", "objectives", "peft"},
    {"decode", "evaluate", "interpret", "train"},
    {"convert", "tasks"},
    {"config"},
    {"runs"},
    {"compile_check", "sweep"},
]
# These take functions: a model or an objective of the floor below is none of their business.
BLIND = {"decode", "evaluate", "interpret", "train"}
# All that goes into another repository by itself, and what it may need.
ALONE = ("jaxlm.nn", "jaxlm.models", "jaxlm.peft", "jaxlm.optim", "jaxlm.sharding")
BARE = ("jax", "flax", "optax", "einops", "jaxtyping")
LIGHT = {*BARE, "jaxlib", "numpy", "wadler_lindig"}  # the last is a part of jaxtyping
PATHS = sorted(
    path
    for folder in ("jaxlm", "scripts", "configs", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
LIBRARY = [path for path in PATHS if path.is_relative_to(ROOT / "jaxlm")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), name_of(path))


def imported(source: ast.AST) -> set[str]:
    """Absolute names of everything a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def part_of(name: str) -> str | None:
    """``train`` for ``jaxlm.train.step.make_train_step``; None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "jaxlm" and len(parts) > 1 else None


def floor_of(part: str) -> int:
    floors = [floor for floor, parts in enumerate(FLOORS) if part in parts]
    assert floors, f"jaxlm.{part} stands on no floor: add it to FLOORS"
    return floors[0]


def floor_errors(part: str, source: ast.AST) -> list[str]:
    errors = [name for name in imported(source) if name.startswith(".")]  # relative imports
    for name in imported(source):
        other = part_of(name)
        if other in (None, part, "__version__"):
            continue
        if floor_of(other) == floor_of(part) == 0:  # errors, typing, tree: small, and close
            continue
        named = part in BLIND and other in ("models", "objectives")
        if named or floor_of(other) >= floor_of(part):
            errors.append(name)
    return errors


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_floors(path):
    part = path.relative_to(ROOT / "jaxlm").parts[0].removesuffix(".py")
    if part != "__init__":
        assert floor_errors(part, parse(path)) == []
    else:
        assert {part_of(name) for name in imported(parse(path))} <= {None}


def test_floors_can_fail():
    assert floor_errors("nn", ast.parse("from jaxlm.models.bert import Bert"))
    assert floor_errors("nn", ast.parse("def f():\n    import jaxlm.optim"))
    assert floor_errors("models", ast.parse("from jaxlm import objectives"))
    assert floor_errors("train", ast.parse("from jaxlm.models import heads"))
    assert floor_errors("train", ast.parse("from . import step"))
    assert floor_errors("errors", ast.parse("from jaxlm import sharding"))
    assert not floor_errors("train", ast.parse("from jaxlm.train import step\nimport optax"))


# Rules for each file: a function gives what is wrong, and a snippet shows that it can.


def long_file(source: ast.Module, text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{lines} lines"] if lines > 400 else []


def future_annotations(source: ast.Module, text: str) -> list[str]:
    return [name for name in imported(source) if name == "__future__.annotations"]


def global_statements(source: ast.Module, text: str) -> list[str]:
    return [ast.unparse(n) for n in ast.walk(source) if isinstance(n, ast.Global)]


def flags(source: ast.Module, text: str) -> list[str]:
    """Boolean fields of linen modules."""
    return [
        f"{node.name}.{ast.unparse(field)}"
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef)
        and any("Module" in ast.unparse(base) for base in node.bases)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and "bool" in ast.unparse(field.annotation)
        and ast.unparse(field.target) != "use_bias"
    ]


def public_functions(source: ast.AST) -> list[ast.FunctionDef]:
    """At the top of a module, and of its public classes."""
    found = []
    for node in ast.iter_child_nodes(source):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
            continue
        found += public_functions(node) if isinstance(node, ast.ClassDef) else [node]
    return found


def open_signatures(source: ast.Module, text: str) -> list[str]:
    return [f"{f.name}(**{f.args.kwarg.arg})" for f in public_functions(source) if f.args.kwarg]


def shapeless(source: ast.Module, text: str) -> list[str]:
    """Public arguments and results without annotation, or that are arrays of any shape."""
    errors = []
    for function in public_functions(source):
        args = function.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        every = [(arg.arg, arg.annotation) for arg in every if arg.arg not in ("self", "cls")]
        if function.name != "__init__":
            every.append(("return", function.returns))
        for name, annotation in every:
            hint = None if annotation is None else ast.unparse(annotation)
            bare = {"Array", "jax.Array", "jnp.ndarray", "np.ndarray"}
            if hint is None or bare & set(hint.replace(" ", "").split("|")):
                errors.append(f"{function.name}: {name}: {hint}")
    return errors


EVERYWHERE = [
    (future_annotations, "from __future__ import annotations", "from __future__ import division"),
]
IN_LIBRARY = [  # a test may be longer rather than cramped
    (long_file, "x = 1\n" * 401, "x = 1\n" * 400),
    (global_statements, "def f():\n    global x", "x = 1"),
    (
        flags,
        "class A(nn.Module):\n    pre_norm: bool = True",
        "class A(nn.Module):\n    use_bias: bool",
    ),
    (flags, "class A(nn.Module):\n    causal: bool | None = None", "class A:\n    causal: bool"),
    (open_signatures, "def f(**kwargs): ...", "def _f(**kwargs): ..."),
    (open_signatures, "class A:\n    def f(self, **kw): ...", "def f(*args): ..."),
    (shapeless, "def f(x) -> int: ...", "def f(x: int) -> int: ..."),
    (shapeless, "def f(x: Array) -> int: ...", "def f(x: Float[Array, 'a']) -> int: ..."),
    (shapeless, "def f(x: jax.Array | None) -> int: ...", "def _f(x: Array): ..."),
    (
        shapeless,
        "class A:\n    def __call__(self, x: int): ...",
        "class A:\n    def f(self) -> int: ...",
    ),
]


@pytest.mark.parametrize(("rule", "bad", "good"), [*EVERYWHERE, *IN_LIBRARY])
def test_rules_can_fail(rule, bad, good):
    assert rule(ast.parse(bad), bad)
    assert rule(ast.parse(good), good) == []


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_rules(path):
    source, text = parse(path), path.read_text()
    rules = [rule for rule, _, _ in EVERYWHERE]
    if path in LIBRARY:
        rules += [rule for rule, _, _ in IN_LIBRARY]
    assert [error for rule in dict.fromkeys(rules) for error in rule(source, text)] == []


def test_nothing_is_called_utils():
    names = {part for path in PATHS for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not {name for name in names if name.strip("_") in ("util", "utils", "helpers", "misc")}


PROBE = """
import sys
import jax, flax.linen, flax.struct, flax.traverse_util, optax, einops, jaxtyping, numpy
import jax.experimental.layout, jax.experimental.mesh_utils, optax.contrib
before = set(sys.modules)
import importlib, pkgutil
for name in {packages}:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(getattr(package, "__path__", ()), name + "."):
        importlib.import_module(module.name)
new = {{name for name in set(sys.modules) - before}}
print(*sorted(new))
"""


def loaded_by(*packages: str) -> set[str]:
    """Modules that importing all of these packages adds to those of ``BARE``."""
    command = [sys.executable, "-c", PROBE.format(packages=packages)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_stands_alone_needs_nothing_else():
    new = loaded_by(*ALONE)
    assert {"jaxlm.nn.attention", "jaxlm.models.bert", "jaxlm.peft.tuning", "jaxlm.optim"} <= new
    assert strangers(new) == set()
    allowed = {"nn", "models", "peft", "optim", *set.union(*FLOORS[:3])}
    assert {part_of(name) for name in new} - {None} <= allowed
    assert "jaxlm.runtime.storage" not in new


def test_the_probe_can_fail():
    assert "tokenizers" in strangers(loaded_by("jaxlm.data.tokenizers"))


ADAPT_A_DENSE = """
import importlib, pkgutil
import flax.linen as nn, jax, jax.numpy as jnp, optax
for name in {packages}:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(getattr(package, "__path__", ()), name + "."):
        importlib.import_module(module.name)
from jaxlm.optim import OptimizerConfig, make_optimizer
from jaxlm.peft import lora
model, x = nn.Dense(4), jnp.ones((2, 8))
config = lora.LoraConfig(targets=("kernel",), rank=2)
base = model.init(jax.random.key(0), x)
learned = lora.init(jax.random.key(1), base, config, lambda variables: model.apply(variables, x))
loss = lambda learned: lora.adapt(model.apply, config)({{**base, "lora": learned}}, x).sum()
optimizer = make_optimizer(OptimizerConfig())
updates, _ = optimizer.update(jax.grad(loss)(learned), optimizer.init(learned), learned)
assert loss(optax.apply_updates(learned, updates)) < loss(learned)
print("adapted")
"""


@pytest.mark.slow
def test_what_stands_alone_in_a_bare_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    for what in (BARE, ("--no-deps", str(ROOT))):
        subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)
    script = ADAPT_A_DENSE.format(packages=ALONE)
    command = [python, "-c", script]
    env = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}  # and no PYTHONPATH
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "adapted\n"), done.stderr
    # The control: what prepares text needs more.
    command = [python, "-c", "import jaxlm.data.tokenizers"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "No module named 'tokenizers'" in done.stderr


def strangers(modules: set[str]) -> set[str]:
    """Packages that are neither ours, nor among the few, nor Python's own."""
    tops = {name.partition(".")[0] for name in modules}
    return tops - {"jaxlm"} - LIGHT - sys.stdlib_module_names


def test_training_needs_neither_tensorflow_nor_torch():
    new = loaded_by("jaxlm.train", "jaxlm.data", "jaxlm.runs")
    assert "jaxlm.train.loop" in new
    assert not strangers(new) & {"tensorflow", "torch", "transformers", "keras"}
