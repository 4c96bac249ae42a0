"""The one train step: pure, and the same under jit, pmap and on one device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, PyTree

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.optim import UnitRate
from jaxlm.sums import Sums
from jaxlm.train.state import TrainState
from jaxlm.typing import Batch, Loss, Params, Scalar

TrainStep = Callable[[TrainState, Batch, Scalar], tuple[TrainState, Sums]]
EvalStep = Callable[[TrainState, Batch], Any]  # -> Sums, and what is predicted


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Scalar], Scalar | float] | None = None,
    *,
    seed: int = 0,
    num_micro_batches: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """``(state, batch, progress) -> (state, sums)``.

    Sums of losses and gradients are added over micro-batches and devices and divided once, by the
    number of predicted tokens in the whole batch. Gradients that are not finite, and a batch that
    predicts nothing, leave parameters and moments as they are; ``skipped`` counts the former.

    Args:
        loss: ``(variables, batch, key, *, progress, deterministic) -> (sum, Sums)``.
        optimizer: of :func:`jaxlm.optim.make_optimizer`, or any of Optax but those that evaluate
            the loss again (``lbfgs``): updates are added.
        schedule: what multiplies the updates, as a function of progress, the share of the run that
            is done: the learning rate, if the optimizer has none. None = the optimizer has it.
        num_micro_batches: parts of the batch whose gradients are computed one after the other.
        axis_name: of the devices under ``pmap``, which hold parts of the batch.
    """

    if isinstance(optimizer, UnitRate) and schedule is None:
        raise InputError(
            "this optimizer's updates are for a learning rate of 1: pass "
            "schedule=jaxlm.optim.make_schedule(config) as well"
        )

    def train_step(state: TrainState, batch: Batch, progress: Scalar) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def summed(trainable: Params, batch: Batch) -> tuple[Scalar, Sums]:
            variables = tree.combine(trainable, state.frozen)
            return loss(variables, batch, key, progress=progress, deterministic=False)

        def gradients(batch: Batch) -> tuple[tuple[Scalar, Sums], Params]:
            totals, grads = jax.value_and_grad(summed, has_aux=True)(state.trainable, batch)
            # Those of bfloat16 parameters, too, are added up in float32, wherever they are added.
            wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return totals, jax.tree.map(wide, grads)

        totals = _accumulate(gradients, batch, num_micro_batches)
        if axis_name is not None:
            totals = jax.lax.psum(totals, axis_name)
        (value, sums), grads = totals
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.trainable, value=value / weight
        )
        counts = {"steps": jnp.ones(()), "skipped": 1.0 - finite, "grad_norm": norm}
        if schedule is not None:
            lr = counts["lr"] = jnp.asarray(schedule(progress), jnp.float32)
            updates = jax.tree.map(lambda u: lr * u, updates)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite & (sums.weight > 0), new, old),
            (trainable, opt_state),
            (state.trainable, state.opt_state),
        )
        return (
            replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state),
            replace(sums, counts=sums.counts | counts),
        )

    return train_step


def make_eval_step(loss: Loss, *, seed: int, axis_name: str | None = None) -> EvalStep:
    """``(state, batch) -> sums``; what is hidden depends on seed and row alone, not on the step."""

    def eval_step(state: TrainState, batch: Batch) -> Sums:
        key = jax.random.key(seed)
        _, sums = loss(state.variables, batch, key, progress=jnp.ones(()), deterministic=True)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step


def make_predict_step(
    loss: Loss | None, predict: Callable[..., Any], *, seed: int, axis_name: str | None = None
) -> Callable[[TrainState, Batch], tuple[Sums | None, Any]]:
    """``(state, batch) -> (sums, outputs)``: what ``predict(variables, batch)`` gives, as well.

    Without a loss, for batches without labels, there are no sums.
    """
    eval_step = None if loss is None else make_eval_step(loss, seed=seed, axis_name=axis_name)

    def predict_step(state: TrainState, batch: Batch) -> tuple[Sums | None, Any]:
        outputs = predict(state.variables, batch)
        if axis_name is not None:
            outputs = jax.lax.all_gather(outputs, axis_name, tiled=True)
        return eval_step and eval_step(state, batch), outputs

    return predict_step


def _accumulate(
    gradients: Callable[[Batch], PyTree], batch: Batch, num_micro_batches: int
) -> PyTree:
    if num_micro_batches == 1:
        return gradients(batch)

    # Neighbouring rows go to different micro-batches, so that each device's rows stay with it.
    def split(x: Array) -> Array:
        return rearrange(x, "(batch micro) ... -> micro batch ...", micro=num_micro_batches)

    micro_batches = jax.tree.map(split, dict(batch))
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, first))

    def body(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradients(batch)), None

    return jax.lax.scan(body, zeros, micro_batches)[0]
