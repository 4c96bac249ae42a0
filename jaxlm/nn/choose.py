"""Which implementation of attention suits a machine, a model and its rows.

All equal the plain definition to the precision's tolerance. On CPUs it was measured which is
faster (configs/README.md); on GPUs and TPUs it was not: there the choice follows memory, which the
plain definition takes by the square of the length, and what kernels can do.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Array, Float

from jaxlm.errors import InputError
from jaxlm.nn.attention import dot_product_attention
from jaxlm.nn.blockwise import blockwise_attention

Attention = Literal["plain", "blockwise", "splash", "tokamax", "cudnn"]
Wanted = Literal["auto", "plain", "blockwise", "splash", "tokamax", "cudnn"]
LONG = 512
"""Rows from which something else than the plain definition pays."""


def named(name: Attention | None) -> Callable[..., Float[Array, "..."]]:
    """The function, for ``MultiHeadAttention(attend=...)``; plain for None."""
    match name:
        case "blockwise":
            return blockwise_attention
        case "splash":
            from jaxlm.nn.splash import splash_attention  # a third of a second of imports

            return splash_attention
        case "tokamax" | "cudnn":
            from jaxlm.nn import hopper

            return hopper.tokamax_attention if name == "tokamax" else hopper.cudnn_attention
    return dot_product_attention


class Attends(NamedTuple):
    """What a model's attention is like."""

    head_dim: int
    dropout_rate: float = 0.0
    has_window: bool = False
    """Some layer sees the positions nearby alone."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where attention is computed, and over what."""

    platform: str
    """``cpu``, ``tpu`` or ``gpu``."""
    device: str
    """Its name, for messages."""
    capability: float | None = None
    """The CUDA compute capability; None: unknown, or no GPU of NVIDIA."""
    present: bool = True
    """False where one compiles for a device that is not there."""
    length: int
    """Positions of the longest row."""
    dtype: str
    attends: Attends
    packs_rows: bool
    """Rows may hold several segments."""
    splits_rows: bool = False
    """The mesh splits the positions of a row."""


class Choice(NamedTuple):
    """An implementation, and why it is that one."""

    name: Attention
    why: str


def choose(setting: Setting, wanted: Wanted = "auto") -> Choice:
    """What is wanted, or what suits; raises where what is wanted cannot run."""
    if wanted != "auto":
        if reason := obstacle(wanted, setting):
            raise InputError(
                f"attention={wanted} cannot run here: {reason}; use --attention auto, which takes "
                f"{choose(setting).name} here"
            )
        return Choice(wanted, "as told")
    length, rows = setting.length, f"rows of up to {setting.length:,} tokens"
    if length < LONG:
        return Choice("plain", f"{rows} have small squares of scores")
    reasons = []
    kernels: tuple[Attention, ...] = ("splash",)
    if setting.platform == "gpu":
        kernels = ("tokamax", "cudnn")
    for name in kernels if setting.platform != "cpu" else ():
        reason = obstacle(name, setting)
        if reason is None:
            return Choice(name, f"{setting.device} has a kernel for it, for {rows}")
        reasons.append(f"not {name}: {reason}")
    if setting.platform == "cpu":
        return Choice("blockwise", f"faster than plain on a CPU for {rows}")
    because = f"; {'; '.join(reasons)}"
    if length < 2 * LONG:
        return Choice("plain", f"{rows} fit as squares{because}")
    return Choice("blockwise", f"memory linear in the length for {rows}{because}")


def obstacle(name: Attention, setting: Setting) -> str | None:
    """Why this one cannot run there; None where it can."""
    if name in ("plain", "blockwise"):
        return None
    wanted = "tpu" if name == "splash" else "gpu"
    if setting.platform != wanted:
        return f"it is a kernel for {wanted.upper()}s, and this is a {setting.platform.upper()}"
    if (rate := setting.attends.dropout_rate) > 0:
        return (
            f"it drops no weights, and the attention dropout rate is {rate} (set "
            "model.attention_dropout_rate to 0, or in fine-tuning dropout_rate)"
        )
    if setting.splits_rows:
        return "it needs whole rows, which mesh.sequence splits"
    if name == "splash":
        return None
    if not setting.present:
        return "it compiles on a GPU alone"
    if setting.dtype != "bfloat16":
        return f"it computes in bfloat16, and dtype is {setting.dtype}"
    if name == "tokamax":
        return _tokamax_obstacle(setting)
    if setting.capability is None or setting.capability < 8:
        return f"it is for NVIDIA's GPUs from A100 on, and this is {setting.device}"
    limit = 256 if setting.capability >= 9 else 128
    head_dim = setting.attends.head_dim
    if head_dim % 8 or head_dim > limit:
        return f"heads have {head_dim} channels, no multiple of 8 up to {limit}"
    if setting.packs_rows:
        return "rows hold several documents that do not see each other"
    return "some layers see a window alone" if setting.attends.has_window else None


def _tokamax_obstacle(setting: Setting) -> str | None:
    if setting.capability is None or int(setting.capability) not in (9, 10):
        return f"its gradient is for GPUs like H100 and B200, and this is {setting.device}"
    if importlib.util.find_spec("tokamax") is None:
        return "it is not installed (pip install tokamax, from Python 3.12 on)"
    return None
