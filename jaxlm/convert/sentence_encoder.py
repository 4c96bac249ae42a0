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
from jaxlm.data.tokenizers import LENGTHS, MODULES, SETTINGS
from jaxlm.errors import InputError
from jaxlm.models.pooling import Pooling

PROMPTS = "config_sentence_transformers.json"
_SCALE = "Normalize"
_VECTOR = "sentence_embedding"  # what modules after the pooling read and give
_NO_LIMIT = 1e20  # transformers writes 1e30 for none
_ENCODER = {
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
    "transformer_task": "feature-extraction",
}
"""What ``sentence_bert_config.json`` may say of the encoder, as it is usual."""
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
    default_prompt_name: str | None = None
    """The prompt that stands before a text where nothing else is asked for; None: none does."""
    truncate_dim: int | None = None
    """How many numbers of a vector are kept, the first, after it is scaled; None: all."""
    problem: str = ""

    @property
    def default_prompt(self) -> str:
        """The text of the default prompt."""
        name = self.default_prompt_name
        return "" if name is None else self.prompts[name]

    @property
    def beyond_pooling(self) -> str:
        """What a task that pools cannot take over; empty: nothing."""
        return self.problem or ("a Dense layer" if self.dense else "")

    @property
    def cut(self) -> str:
        """What it leaves out of vectors that are answers; empty: nothing."""
        number = self.truncate_dim
        return "" if number is None else f"a cut to the first {number} numbers"


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
    known = ("Transformer", "Pooling", "Dense", _SCALE)
    problem = next((f"a {kind} layer" for kind, _ in kinds if kind not in known), "")
    order = [known.index(kind) for kind, _ in kinds if kind in known]
    if order != sorted(order):
        problem = problem or "layers in the order " + ", ".join(kind for kind, _ in kinds)
    dense = [_dense(path / where) for kind, where in kinds if kind == "Dense"]
    scales = [_settings(path / where / folder.CONFIG) for kind, where in kinds if kind == _SCALE]
    found = [*dense, *(_other_names(_SCALE, one) for one in scales)]
    problem = problem or next((one for one in found if one and isinstance(one, str)), "")
    pools = [path / where for kind, where in kinds if kind == "Pooling"]
    settings = [folder.read_json(pool / folder.CONFIG) for pool in pools]
    modes = [mode for one in settings for mode in _modes(one)]
    if len(modes) != 1 or modes[0] not in _MODES:
        problem = problem or f"pooling by {' and '.join(modes) or 'nothing'}"
    lengths, said = _settings(path / LENGTHS), _settings(path / PROMPTS)
    told = [f"{key}={lengths[key]!r}" for key, x in _ENCODER.items() if lengths.get(key, x) != x]
    problem = problem or next(iter(told), "")
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
        normalized=bool(scales),
        dense=tuple(one for one in dense if isinstance(one, Dense)),
        max_length=_count(path / LENGTHS, "max_seq_length")
        or _count(path / SETTINGS, "model_max_length"),
        prompts=prompts,
        default_prompt_name=default,
        truncate_dim=_count(path / PROMPTS, "truncate_dim"),
        problem=problem,
    )


def _dense(path: Path) -> Dense | str:
    """The layer in a folder, or why it cannot be computed."""
    if not folder.has_weights(path):
        return f"a Dense layer without {folder.WEIGHTS}"
    said, tensors = _settings(path / folder.CONFIG), folder.open_tensors(path)
    activation = str(said.get("activation_function", "Tanh")).rpartition(".")[2]
    if other := _other_names("Dense", said):
        return other
    if said.get("use_residual"):
        return "a Dense layer with a residual"
    if activation not in _ACTIVATIONS:
        return f"a Dense layer with {activation}"
    if "linear.weight" not in tensors or not set(tensors) <= {"linear.weight", "linear.bias"}:
        return f"a Dense layer of {', '.join(sorted(tensors))}"
    kernel = tensors["linear.weight"].astype(np.float32).T
    zeros = np.zeros(kernel.shape[1], np.float32)
    bias = tensors["linear.bias"].astype(np.float32) if "linear.bias" in tensors else zeros
    return Dense(kernel=kernel, bias=bias, activation=activation)


def _other_names(kind: str, said: dict[str, Any]) -> str:
    """What a module reads or gives beside the vector of the text; empty: nothing."""
    read = said.get("module_input_name") or _VECTOR
    given = said.get("module_output_name") or read
    if read != _VECTOR:
        return f"a {kind} layer of {read}"
    return "" if given == _VECTOR else f"a {kind} layer that gives {given}"


def _count(path: Path, key: str) -> int | None:
    """A number that a file may say; None also where it stands for no limit."""
    value = _settings(path).get(key)
    if value is None:
        return None
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not is_whole or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{path}: {key}={value!r} is not a whole number above 0; correct it, or leave it out"
        )
    return int(value) if value < _NO_LIMIT else None


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
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
) -> None:
    """Make a model's folder that of a sentence encoder, with vectors of length 1 before any cut."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": _SCALE}
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
        PROMPTS: {
            "prompts": prompts or {},
            "default_prompt_name": default_prompt_name,
            "truncate_dim": truncate_dim,
        },
    }
    for where in kinds:
        (path / where).mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
