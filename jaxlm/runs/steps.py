"""A run's steps on its devices, and what its configuration leaves to data and platform."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm import optim, sharding
from jaxlm.config import Config, FinetuneConfig, PretrainConfig
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, has_source_vocab, is_attentive
from jaxlm.nn.choose import Wanted
from jaxlm.runs import attention
from jaxlm.runtime.storage import StoragePath
from jaxlm.sharding import MeshConfig
from jaxlm.train import restore
from jaxlm.train.placement import Init, Placement, jit_placement, pmap_placement
from jaxlm.train.restore import Monitor
from jaxlm.train.state import TrainState
from jaxlm.train.step import EvalStep, make_train_step
from jaxlm.train.stored import changed, lay_out
from jaxlm.typing import Loss

EVAL_SEED = 0  # of what evaluation hides: the same for every run, so that losses compare


def make_placement(
    config: Config,
    init: Init,
    loss: Loss,
    make_eval_step: Callable[[str | None], EvalStep],
    *,
    lr_factor: Callable[[str], float] | None = None,
    devices: Sequence[Any] | None = None,
) -> Placement:
    """The steps under jit or pmap on all devices, or on ``devices``.

    ``make_eval_step`` is given the name of pmap's axis, None under jit.
    """
    axis_name = "data" if config.placement == "pmap" else None
    train_step = make_train_step(
        loss,
        optim.make_optimizer(config.optimizer, lr_factor),
        optim.make_schedule(config.optimizer, config.train.steps),
        seed=config.train.seed,
        num_micro_batches=config.train.num_micro_batches,
        axis_name=axis_name,
    )
    mesh = sharding.make_mesh(config.mesh, devices)
    ramp = config.data.ramp_sizes if isinstance(config, PretrainConfig) else ()
    for name, size in (("batch_size", config.data.batch_size), *(("ramp_sizes", x) for x in ramp)):
        check_batch(size, config.train.num_micro_batches, mesh, name)
    if axis_name is None:
        return jit_placement(init, train_step, make_eval_step(None), mesh)
    if mesh.shape["data"] != mesh.size:
        raise InputError(
            "placement=pmap is data parallel only: leave the mesh as it is, or use jit"
        )
    return pmap_placement(init, train_step, make_eval_step(axis_name), axis_name, devices)


def check_batch(
    batch_size: int, num_micro_batches: int, mesh: Mesh, name: str = "batch_size"
) -> None:
    """The batch must split evenly over micro-batches, and each of those over devices."""
    parts = pieces(num_micro_batches, mesh)
    if batch_size % parts:
        raise InputError(
            f"data.{name}={batch_size} is not divisible by {parts // num_micro_batches} devices"
            f" (data * fsdp) times train.num_micro_batches={num_micro_batches}: the next that is, "
            f"is {(batch_size // parts + 1) * parts}; with --accept-changes where the run has begun"
        )


def pieces(num_micro_batches: int, mesh: Mesh) -> int:
    """What a batch is split into: a micro-batch's rows on a device each."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * num_micro_batches


def default_dtype(platform: str) -> Literal["float32", "bfloat16"]:
    """Dtype of matrix products and activations on a platform."""
    return "float32" if platform == "cpu" else "bfloat16"


def with_vocabulary(
    model: ModelConfig,
    tokenizer_size: int,
    mesh: MeshConfig,
    source_size: int | None = None,
    own: ModelConfig | None = None,
) -> Any:
    """A model with rows for all tokens; ``source_size`` of sources is that of their own tokenizer.

    ``own`` is the model of the run so far, whose numbers of rows it keeps. Raises where some token
    would have no row, or sources no table.
    """
    rows = vars(own) if own is not None else {}
    changes: dict[str, Any] = {
        "vocab_size": resolve_vocab_size(
            model.vocab_size, tokenizer_size, mesh, own=rows.get("vocab_size")
        )
    }
    given = model.source_vocab_size if has_source_vocab(model) else None
    if source_size is None and given is not None:
        raise InputError(
            f"model.source_vocab_size={given} is for sources with a tokenizer of their own, and "
            "there is one tokenizer: leave it out, or, to translate, give source_tokenizer"
        )
    if source_size is not None:
        if not has_source_vocab(model):
            raise InputError(
                f"source_tokenizer is given, and a {type(model).__name__} has one vocabulary for "
                "all it reads and writes: leave it out, or use --model TransformerConfig"
            )
        name = "source_vocab_size"
        changes[name] = resolve_vocab_size(given, source_size, mesh, name, rows.get(name))
    return dataclasses.replace(model, **changes)  # pyright: ignore[reportArgumentType]


def resolve_vocab_size(
    given: int | None,
    tokenizer_size: int,
    mesh: MeshConfig,
    name: str = "vocab_size",
    own: int | None = None,
) -> int:
    """The model's: as given, else padded. Raises where some token would have no row."""
    vocab_size = given or padded_vocab_size(tokenizer_size, mesh, own)
    if vocab_size < tokenizer_size:  # lookups would clip ids, without a word
        raise InputError(
            f"model.{name}={vocab_size} is smaller than the tokenizer's vocabulary of "
            f"{tokenizer_size}: leave it None, or set it to that or more"
        )
    return vocab_size


def padded_vocab_size(size: int, mesh: MeshConfig, own: int | None = None) -> int:
    """Rounded up to a multiple of 64, for speed, and of the shards that the mesh makes of it.

    A run that resumes, maybe on another mesh, keeps its ``own`` number of rows, if it suffices.
    """
    if own is not None and own >= size:
        return own
    multiple = math.lcm(64, max(mesh.tensor, 1))
    return math.ceil(size / multiple) * multiple


def base_model(published: ModelConfig, mesh: MeshConfig, own: ModelConfig | None = None) -> Any:
    """A base's encoder for this mesh: its token table is filled up as pretraining would.

    ``own`` is the model of the run so far, whose number of rows it keeps.
    """
    assert published.vocab_size is not None
    before = None if own is None else own.vocab_size
    rows = padded_vocab_size(published.vocab_size, mesh, before)
    model: Any = published.with_vocab_size(rows)  # a dataclass, which its protocol cannot say
    free = {"attention": None} if is_attentive(published) else {}
    return dataclasses.replace(model, dtype=None, **free)


def with_rows(encoder: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """A base's parameters with the token table filled up with zeros to the model's vocabulary."""
    table = encoder["token_embed"]["embedding"]
    if table.shape[0] == model.vocab_size:
        return encoder
    return encoder | {"token_embed": {"embedding": _padded(table, 0, model)}}


def with_bias(head: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """A base's head for that many rows; those that stand for no token are never likely."""
    if "unembed" in head:  # such a head knows the number of tokens
        return head | {"unembed": {"kernel": _padded(head["unembed"]["kernel"], 1, model)}}
    bias = head.get("bias")
    return head if bias is None else head | {"bias": _padded(bias, 0, model, -100.0)}


def _padded(leaf: Any, axis: int, model: ModelConfig, value: float = 0.0) -> Any:
    """With as many entries along an axis as the model has tokens."""
    assert model.vocab_size is not None  # resolved
    more = [(0, 0)] * leaf.ndim
    more[axis] = (0, model.vocab_size - leaf.shape[axis])
    shape = tuple(n + end for n, (_, end) in zip(leaf.shape, more, strict=True))
    pad = lambda x: np.pad(x, more, constant_values=value)
    return leaf if shape == leaf.shape else changed(leaf, pad, shape)


def chosen(
    config: Config, checkpoints: StoragePath, monitor: Monitor, step: int | None
) -> list[int]:
    """The steps whose mean is the model to be read: that of ``step``, or what the config says."""
    if step is not None:
        return [step]
    average = config.train.average
    return restore.chosen_steps(checkpoints, monitor, average, report=restore.warn)


def put_state(state: TrainState, placement: Placement) -> TrainState:
    """A state that every process has whole, on the devices of its placement."""
    return lay_out(state, jax.tree.map(lambda x: x.sharding, placement.abstract_state))


def for_evaluation(
    config: Config, wanted: Wanted | None = None, longest: int | None = None
) -> attention.Settled:
    """On all devices that are here, whatever the run was trained on.

    ``wanted``: how attention is computed, if not as suits them and rows of up to ``longest``
    positions; None: as long as the config allows.
    """
    devices = jax.device_count()
    changes: dict[str, Any] = {"batch_size": math.ceil(config.data.batch_size / devices) * devices}
    if isinstance(config, PretrainConfig):
        changes |= {"ramp_sizes": (), "ramp_steps": ()}
    # Of a run that has trained nothing epochs may not be steps yet.
    train = config.train.with_epochs(lambda epochs: 10**6)
    here = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        placement="jit",
        data=dataclasses.replace(config.data, **changes),
        train=dataclasses.replace(train, num_micro_batches=1),
    )
    assert config.model is not None  # resolved
    limits = [longest or config.model.max_length]
    if isinstance(config, FinetuneConfig) and not config.data.pack:  # as long as a text is
        limits += [config.data.max_length]
    length = min((limit for limit in limits if limit is not None), default=None)
    return attention.settle(here, length, jax.devices(), wanted=wanted or "auto", trains=False)
