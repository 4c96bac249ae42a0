"""How a published sentence encoder makes one vector of a text, as its folder says.

The layout is that of sentence-transformers (Reimers and Gurevych 2019): ``modules.json`` lists what
follows the encoder, each module with a folder for its settings.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxlm.convert import folder
from jaxlm.data.tabular import parse_json
from jaxlm.data.tokenizers import LENGTHS, MODULES
from jaxlm.errors import InputError
from jaxlm.models.pooling import Pooling

PROMPTS = "config_sentence_transformers.json"
_MODES: dict[str, Pooling] = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
    "max": "max",
}


_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """``activation(x W + b)`` of a vector, in float32."""

    kernel: Float32[np.ndarray, "embed features"]
    bias: Float32[np.ndarray, "features"]
    activation: str

    def __call__(self, vectors: Float[Array, "batch embed"]) -> Float[Array, "batch features"]:
        """For each vector."""
        product = jnp.matmul(vectors, self.kernel, precision="highest")
        return _ACTIVATIONS[self.activation](product + self.bias[None])


@dataclass(frozen=True, kw_only=True)
class SentenceEncoder:
    """What follows the hidden states."""

    pooling: Pooling | None
    """None: in a way that is not known here, which ``problem`` names."""
    normalized: bool
    """Vectors have length 1."""
    dense: tuple[Dense, ...] = ()
    """What a pooled vector goes through before it is scaled."""
    max_length: int | None = None
    """Tokens of a text that are read, special ones among them; None: as many as the encoder can."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What may stand before a text, such as "query: ", by name."""
    default_prompt: str = ""
    """What stands before a text where nothing else is asked for."""
    problem: str = ""

    @property
    def beyond_pooling(self) -> str:
        """What a task that pools cannot take over; empty: nothing."""
        return self.problem or ("a Dense layer" if self.dense else "")


def read(path: Path) -> SentenceEncoder | None:
    """What a model's folder says; None where it is no sentence encoder's."""
    if not (path / MODULES).is_file():
        return None
    try:
        modules = parse_json((path / MODULES).read_text(encoding="utf-8-sig"))
        kinds = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path / MODULES} is not a list of modules with a type and a path: download it again"
        ) from error
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    problem = next((f"a {kind} layer" for kind, _ in kinds if kind not in known), "")
    order = [known.index(kind) for kind, _ in kinds if kind in known]
    if order != sorted(order):
        problem = problem or "layers in the order " + ", ".join(kind for kind, _ in kinds)
    dense = [_dense(path / where) for kind, where in kinds if kind == "Dense"]
    problem = problem or next((one for one in dense if isinstance(one, str)), "")
    pools = [path / where for kind, where in kinds if kind == "Pooling"]
    settings = [folder.read_json(pool / folder.CONFIG) for pool in pools]
    modes = [mode for one in settings for mode in _modes(one)]
    if len(modes) != 1 or modes[0] not in _MODES:
        problem = problem or f"pooling by {' and '.join(modes) or 'nothing'}"
    lengths = _settings(path / LENGTHS)
    said = _settings(path / PROMPTS)
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise InputError(
            f"{path / PROMPTS}: default_prompt_name={default!r} is none of the prompts "
            f"{', '.join(map(repr, prompts)) or '(there are none)'}; correct it"
        )
    if any(prompts.values()) and not all(one.get("include_prompt", True) for one in settings):
        problem = problem or "pooling that leaves out the prompt's tokens"
    return SentenceEncoder(
        pooling=None if problem else _MODES[modes[0]],
        normalized=any(kind == "Normalize" for kind, _ in kinds),
        dense=tuple(one for one in dense if isinstance(one, Dense)),
        max_length=lengths.get("max_seq_length"),
        prompts=prompts,
        default_prompt=prompts.get(default, ""),
        problem=problem,
    )


def _dense(path: Path) -> Dense | str:
    """The layer in a folder, or why it cannot be computed."""
    if not folder.has_weights(path):
        return f"a Dense layer without {folder.WEIGHTS}"
    said, tensors = _settings(path / folder.CONFIG), folder.open_tensors(path)
    activation = str(said.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        return f"a Dense layer with {activation}"
    if "linear.weight" not in tensors or not set(tensors) <= {"linear.weight", "linear.bias"}:
        return f"a Dense layer of {', '.join(sorted(tensors))}"
    kernel = tensors["linear.weight"].astype(np.float32).T
    zeros = np.zeros(kernel.shape[1], np.float32)
    bias = tensors["linear.bias"].astype(np.float32) if "linear.bias" in tensors else zeros
    return Dense(kernel=kernel, bias=bias, activation=activation)


def _settings(path: Path) -> dict[str, Any]:
    return folder.read_json(path) if path.is_file() else {}


def _modes(config: dict[str, Any]) -> list[str]:
    """The pooling of one flag for each, the mean's being the default, or of newer files' list."""
    given = config.get("pooling_mode")
    if given:
        return [given] if isinstance(given, str) else list(given)
    prefix = "pooling_mode_"
    flags = {f"{prefix}mean_tokens": True} | config
    return [name.removeprefix(prefix) for name in flags if name.startswith(prefix) and flags[name]]


def write(
    path: Path,
    pooling: Pooling,
    width: int,
    max_length: int | None,
    prompts: Mapping[str, str] | None = None,
) -> None:
    """Make a model's folder that of a sentence encoder, with vectors of length 1.

    The first of ``prompts`` is the default.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": where,
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, (where, kind) in enumerate(kinds.items())
    ]
    modes = {f"pooling_mode_{name}_tokens": name == pooling for name in ("mean", "max")}
    config = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_lasttoken": pooling == "last",
        **modes,
    }
    files = {
        MODULES: modules,
        f"1_Pooling/{folder.CONFIG}": config,
        LENGTHS: {"max_seq_length": max_length, "do_lower_case": False},
        PROMPTS: {"prompts": prompts or {}, "default_prompt_name": next(iter(prompts or {}), None)},
    }
    for where in kinds:
        (path / where).mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
