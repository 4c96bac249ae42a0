"""How a run computes attention: chosen by its devices and rows, or as told."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, is_attentive
from jaxlm.nn.choose import Setting, Wanted, choose


class Settled(NamedTuple):
    """A config whose model knows how it attends, and a line that says why; "" if there is none."""

    config: Any
    line: str


def settle(
    config: Config,
    length: int | None,
    devices: Sequence[Any],
    *,
    wanted: Wanted | None = None,
    present: bool = True,
    trains: bool = True,
) -> Settled:
    """For rows of up to ``length`` positions on these devices; ``wanted``: as the config says.

    Where nothing ``trains``, no attention weights are dropped.
    """
    if config.model is None:
        return Settled(config, "")
    model, line = settle_model(
        config.model,
        length,
        devices[0],
        wanted or config.attention,
        present=present,
        trains=trains,
        packs_rows=config.packs_rows,
        splits_rows=config.mesh.sequence > 1,
    )
    return Settled(replace(config, model=model), line)


def settle_model(
    model: ModelConfig,
    length: int | None,
    device: Any,
    wanted: Wanted = "auto",
    *,
    present: bool = True,
    trains: bool = True,
    packs_rows: bool = False,
    splits_rows: bool = False,
) -> Settled:
    """The same for a model by itself; raises where what is ``wanted`` cannot run."""
    if not is_attentive(model):
        if wanted not in ("auto", "plain"):
            raise InputError(
                f"attention={wanted}, but {type(model).__name__} has an attention of its own or "
                "none: leave it out"
            )
        return Settled(model, "")
    setting = Setting(
        platform="gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform,
        device=device.device_kind,
        capability=_capability(device),
        present=present,
        length=length or 2**30,
        dtype=str(model.dtype or "float32"),
        attends=model.attends if trains else model.attends._replace(dropout_rate=0.0),
        packs_rows=packs_rows,
        splits_rows=splits_rows,
    )
    choice, changed = choose(setting, wanted), cast(Any, model)
    changed = replace(changed, attention=choice.name)
    return Settled(changed, f"attention: {choice.name}, {choice.why}")


def _capability(device: Any) -> float | None:
    """CUDA's; AMD's GPUs give a name, such as gfx942, in its place."""
    try:
        return float(device.compute_capability)
    except (AttributeError, TypeError, ValueError):
        return None
