"""Optimizers and schedules on Optax.

A schedule is a function of *progress*, the share of the run that is done: steps over steps, or
minutes over minutes. So a run of any length, or one that must end at a given time, decays fully.
The optimizer leaves the learning rate out; the train step applies it. Signs are Optax's: updates
are added.
"""

import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.sharding import AXES, Axes, AxisTable, axes_of, has_row, require_rows
from jaxlm.typing import Scalar

Schedule = Callable[[Scalar], Scalar]  # progress in [0, 1] -> learning rate
Rows = Callable[[str, int], Axes]  # path and number of axes -> their names


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Defaults are those of encoder pretraining (RoBERTa's, with MosaicBERT's warm-up)."""

    name: Literal["adamw", "stable_adamw", "lamb", "adafactor", "muon"] = "adamw"
    """stable_adamw: AdamW whose updates are scaled down, each parameter's on its own, where the
    gradient is larger than its past says; with it, `clip_norm` can be None."""
    peak_lr: float = 5e-4
    schedule: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant"] = "linear"
    """After the warm-up: down to `final_lr_share` on a line or a cosine; wsd: constant, then
    1 - sqrt in the last `decay_share`; inverse_sqrt: 1 / sqrt(progress), never 0."""
    warmup_share: float = 0.06
    """Share of the run in which the learning rate grows from 0 on a line."""
    warmup_steps: int | None = None
    """The same in steps, in place of `warmup_share`; of a run that has steps or epochs."""
    decay_share: float = 0.2
    """Share of the run that decays under wsd."""
    final_lr_share: float = 0.0
    """The learning rate at the end, as a share of `peak_lr`."""
    b1: float = 0.9
    """Decay of the mean of gradients; Muon's momentum is `momentum`."""
    b2: float = 0.98
    """Decay of the mean of squares."""
    epsilon: float = 1e-6
    momentum: float = 0.95
    """Muon's."""
    weight_decay: float = 0.01
    """Decoupled, times the learning rate, on linear maps and embeddings; never on norms, biases."""
    clip_norm: float | None = 1.0
    """Global norm above which gradients are scaled down; None = no clipping."""
    layer_decay: float | None = None
    """Learning rate of each layer over that of the layer above, such as 0.9; None = 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_share <= 1 or not 0 < self.decay_share <= 1:
            raise InputError(
                f"warmup_share={self.warmup_share} and decay_share={self.decay_share} are shares "
                "of the run, between 0 and 1"
            )
        if self.warmup_steps is not None and self.warmup_steps < 1:
            raise InputError(
                f"optimizer.warmup_steps={self.warmup_steps} is not above 0; for none leave it "
                "out, and set warmup_share=0"
            )
        for name in ("peak_lr", "epsilon", "clip_norm"):
            value = vars(self)[name]
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"optimizer.{name}={value} is not a number above 0")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= vars(self)[name] < 1:
                raise InputError(f"optimizer.{name}={vars(self)[name]} is not inside [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"optimizer.weight_decay={self.weight_decay} is not 0 or above")
        if not 0 <= self.final_lr_share <= 1:
            raise InputError(
                f"optimizer.final_lr_share={self.final_lr_share} is a share, between 0 and 1"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay={self.layer_decay} is not inside (0, 1]; 0.9 is usual")


def make_schedule(config: OptimizerConfig, steps: int | None = None) -> Schedule:
    """The learning rate as a function of progress; ``steps`` of the run, for ``warmup_steps``."""
    warmup, decay, floor = config.warmup_share, config.decay_share, config.final_lr_share
    if config.warmup_steps is not None:
        if steps is None:
            raise InputError(
                f"optimizer.warmup_steps={config.warmup_steps} of a run whose number of steps is "
                "not known: set train.steps or train.epochs, or warmup_share instead"
            )
        warmup = min(config.warmup_steps / steps, 1.0)

    def shape(progress: Scalar) -> Scalar:
        since = jnp.clip((progress - warmup) / max(1 - warmup, 1e-9), 0, 1)
        if config.schedule == "linear":
            return 1 - (1 - floor) * since
        if config.schedule == "cosine":
            return floor + (1 - floor) * (1 + jnp.cos(jnp.pi * since)) / 2
        if config.schedule == "wsd":  # Hägele et al. 2024, arXiv:2405.18392, equation 1
            since = jnp.clip((progress - (1 - decay)) / decay, 0, 1)
            return 1 - (1 - floor) * jnp.sqrt(since)
        if config.schedule == "inverse_sqrt":  # Vaswani et al. 2017, equation 3
            start = max(warmup, 1e-3)
            return jnp.sqrt(start / jnp.maximum(progress, start))
        return jnp.ones_like(since)

    def schedule(progress: Scalar) -> Scalar:
        rise = jnp.minimum(1, progress / warmup) if warmup else 1.0
        return config.peak_lr * rise * shape(progress)

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    lr_factor: Callable[[str], float] | None = None,
    axes: AxisTable = AXES,
) -> optax.GradientTransformation:
    """Gradients to updates for a learning rate of 1, to be added, as Optax's are; decay included.

    A parameter's row in ``axes`` says whether it is a linear map, which is decayed. Without a row
    its name does: ``kernel``, ``embedding`` and adapters of two axes or more are; Muon takes those
    kernels and adapters that are matrices. ``layer_decay`` needs rows, for the stacks.

    Args:
        lr_factor: multiplies the learning rate of the parameter at a path, as in LoRA+.
        axes: rows as those of ``sharding.AXES``.
    """
    rows = partial(_axes_or_guess, axes)
    is_linear = _map_axes(rows, lambda found: found.inputs > 0)
    decay = optax.add_decayed_weights(config.weight_decay, mask=is_linear)
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    if config.name == "adamw":  # Loshchilov and Hutter 2019, algorithm 2
        parts = [adam, decay]
    elif config.name == "stable_adamw":
        parts = [_clipped_by_rms(config, rows, optax.chain(adam, decay))]
    elif config.name == "lamb":  # You et al. 2020, algorithm 2
        parts = [adam, decay, optax.stateless(partial(_scale_by_trust_ratio, rows))]
    elif config.name == "adafactor":  # Shazeer and Stern 2018, algorithm 4, with momentum
        parts = [
            optax.scale_by_factored_rms(),
            optax.stateless(partial(_clip_by_layer_rms, rows)),
            optax.ema(config.b1),
            decay,
        ]
    else:
        transforms: dict[Hashable, optax.GradientTransformation] = {
            "muon": _muon(config, rows),
            "adam": adam,
        }
        labels = _map_axes(rows, lambda found: "muon" if _is_hidden_matrix(found) else "adam")
        parts = [optax.partition(transforms, labels), decay]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay is not None:
        parts.append(optax.stateless(partial(_scale_by_depth, config.layer_decay, axes)))
    if lr_factor is not None:
        parts.append(optax.stateless(partial(_scale_by_path, lr_factor)))
    return _negated(optax.chain(*parts))


class UnitRate(optax.GradientTransformation):
    """Updates for a learning rate of 1, which a schedule has to multiply."""


def _negated(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    # Not optax.scale(-1) at the end of the chain: it would be one more state in old checkpoints.
    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> Any:
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(jnp.negative, updates), state

    return UnitRate(optimizer.init, update)


def _axes_or_guess(axes: AxisTable, path: str, ndim: int) -> Axes:
    """The row of a parameter; without one, what its name tells, which is no more than is needed."""
    if has_row(path, axes):
        return axes_of(path, ndim, axes)
    name = path.rpartition("/")[2]
    is_linear = name in ("kernel", "embedding") or (path.startswith("lora/") and name in ("a", "b"))
    if not is_linear or ndim < 2:
        return Axes(("",) * ndim, 0)
    # Only of a matrix is it known which axes are inputs: others are to look like tables.
    known = ndim == 2 and name != "embedding"
    return Axes(("inputs", "outputs") if known else ("table",) * ndim, 1)


def _map_axes(rows: Rows, function: Callable[[Axes], Any]) -> Callable[[PyTree], PyTree]:
    """A function of a parameter's axis names, as one of a tree of parameters."""
    return partial(tree.map_with_path, lambda path, leaf: function(rows(path, jnp.ndim(leaf))))


def _is_hidden_matrix(axes: Axes) -> bool:
    return axes.inputs > 0 and not {"vocab", "table"} & set(axes.names)


def _muon(config: OptimizerConfig, rows: Rows) -> optax.GradientTransformation:
    """Orthogonalised momentum (Jordan et al. 2024), a stack's layers each on their own.

    Updates get the root mean square of Adam's, 0.2 (Liu et al. 2025, arXiv:2502.16982, equation
    4), so that AdamW's learning rate and decay carry over.
    """

    def dimension_numbers(axes: Axes) -> optax.contrib.MuonDimensionNumbers:
        first = int(axes.names[0] == "layers")
        split, end = first + axes.inputs, len(axes.names)
        return optax.contrib.MuonDimensionNumbers(range(first, split), range(split, end))

    def rescale(updates: PyTree, _: PyTree) -> PyTree:
        def one(path: str, update: Array) -> Array:
            axes = rows(path, update.ndim)
            first = int(axes.names[0] == "layers")
            split = first + axes.inputs
            sides = math.prod(update.shape[first:split]), math.prod(update.shape[split:])
            return update * (0.2 * max(sides) ** 0.5)

        return tree.map_with_path(one, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum, weight_dimension_numbers=_map_axes(rows, dimension_numbers)
        ),
        optax.stateless(rescale),
    )


def _clipped_by_rms(
    config: OptimizerConfig, rows: Rows, adamw: optax.GradientTransformation
) -> optax.GradientTransformation:
    """StableAdamW (Wortsman et al. 2023, arXiv:2304.13013) around Adam and decay.

    A parameter's update is divided by ``max(1, RMS)``, where RMS is the root of the mean over it of
    ``g² / max(v, epsilon²)``, with the unbiased mean of squares v; of a stack, each layer's is. As
    in optimi, which ModernBERT was trained with, that divides the decay, too; the authors' own
    code decays by the rate as it is. Here the decay is times the learning rate, as everywhere:
    ModernBERT's 1e-5, which is not, is ``1e-5 / peak_lr`` here.
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        grads = updates
        updates, state = adamw.update(grads, state, params)
        adam: optax.ScaleByAdamState = state[0]

        def one(path: str, update: Array, grad: Array, square: Array) -> Array:
            square = jnp.maximum(square / (1 - config.b2**adam.count), config.epsilon**2)
            within = _within_layer(rows(path, grad.ndim))
            mean = jnp.mean(jnp.square(grad) / square, within, keepdims=True)
            return update / jnp.maximum(1, jnp.sqrt(mean))

        return tree.map_with_path(one, updates, grads, adam.nu), state

    return optax.GradientTransformation(adamw.init, update)


def _within_layer(axes: Axes) -> tuple[int, ...]:
    """All axes but that of a stack's layers."""
    return tuple(range(int(axes.names[:1] == ("layers",)), len(axes.names)))


def _clip_by_layer_rms(rows: Rows, updates: PyTree, _: PyTree) -> PyTree:
    """Scale each layer's update down to a root mean square of 1."""

    def one(path: str, update: Array) -> Array:
        within = _within_layer(rows(path, update.ndim))
        mean = jnp.mean(jnp.square(update), within, keepdims=True)
        return update / jnp.maximum(1, jnp.sqrt(mean))

    return tree.map_with_path(one, updates)


def _scale_by_trust_ratio(rows: Rows, updates: PyTree, params: PyTree) -> PyTree:
    """Scale each layer's update to the norm of its weights; not norms and biases."""

    def one(path: str, update: Array, param: Array) -> Array:
        axes = rows(path, param.ndim)
        if not axes.inputs:
            return update
        within = _within_layer(axes)
        norms = [jnp.sqrt(jnp.square(x).sum(within, keepdims=True)) for x in (param, update)]
        return update * jnp.where(norms[0] * norms[1] > 0, norms[0] / norms[1], 1.0)

    return tree.map_with_path(one, updates, params)


def _scale_by_path(factor: Callable[[str], float], updates: PyTree, _: PyTree) -> PyTree:
    return tree.map_with_path(lambda path, update: update * factor(path), updates)


def _scale_by_depth(decay: float, table: AxisTable, updates: PyTree, _: PyTree) -> PyTree:
    """Times ``decay ** distance`` from the top (Howard and Ruder 2018, section 3.2).

    Layer l of L, from 0, is ``L - l`` away, the embeddings ``L + 1``, and all above the layers 0;
    in ELECTRA's published code those below the head are one further away.
    """

    def depth(path: str, update: Array) -> np.ndarray | int | None:
        """The layers of a stack, or the layer, that a leaf belongs to."""
        if axes_of(path, update.ndim, table).names[0] == "layers":
            return np.arange(update.shape[0])
        number = re.search(r"(?:^|/)layers_(\d+)/", path)
        return int(number[1]) if number else None

    require_rows(table, updates)
    depths = [depth(path, update) for path, update in tree.leaves_with_path(updates)]
    top = 1 + max((int(np.max(layer)) for layer in depths if layer is not None), default=-1)

    def one(path: str, update: Array) -> Array:
        layer = depth(path, update)
        if layer is None:
            return update * decay ** (top + 1 if re.search(r"embed(_norm)?/", path) else 0)
        factor = np.float32(decay) ** np.float32(top - layer)
        return update * np.reshape(factor, (-1, *[1] * (update.ndim - 1)))

    return tree.map_with_path(one, updates)
