"""A worker of ``benchmark.py``: jaxlm's own model, objective, optimizer and training step.

Masks are drawn afresh on the device within every step, which the torch workers leave to their
data loader, outside of what is timed. With bfloat16, frozen matrices are kept in it. LoRA trains
the adapters and the whole head.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark_protocol import Work, read_work, serve

from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import ClassificationHead, WithHead, WithLmHead
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.objectives import causal_lm, classification, masked_lm
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxlm.peft import tuning
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import attention
from jaxlm.runtime.allocator import one_step_at_a_time
from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.sums import Sums
from jaxlm.train.compile import compile_ahead
from jaxlm.train.placement import Init, jit_placement
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_eval_step, make_train_step
from jaxlm.typing import HostBatch, Loss, PRNGKey, Tokens

NUM_SPECIAL, START_ID, END_ID, MASK_ID = 1000, 101, 102, 103
"""Ids of BERT's vocabulary: those below 1000 are special and unused tokens."""


def dummy() -> Tokens:
    """What to initialise with. No constant, which would start JAX before main does."""
    return jnp.zeros((1, 8), jnp.int32)


def make_batch(work: Work) -> HostBatch:
    """Full rows of random tokens, one document each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(NUM_SPECIAL, work.vocab_size, (work.batch_size, work.row_length))
    batch = {
        "tokens": tokens.astype(np.int32),
        "lengths": np.full(work.batch_size, work.row_length, np.int32),
        "index": np.arange(work.batch_size, dtype=np.int32),
    }
    if work.pretrains:
        return batch
    return batch | {
        "token_type_ids": np.zeros_like(batch["tokens"]),
        "labels": batch["index"] % work.num_labels,
        "weights": np.ones(work.batch_size, np.float32),
    }


def make_vocabulary(work: Work) -> Vocabulary:
    """Every token from ``NUM_SPECIAL`` up is ordinary and a word of its own."""
    is_ordinary = np.arange(work.vocab_size) >= NUM_SPECIAL
    return Vocabulary(
        mask_id=MASK_ID,
        start_id=START_ID,
        end_id=END_ID,
        ordinary=jnp.arange(NUM_SPECIAL, work.vocab_size),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=jnp.asarray(is_ordinary),
    )


Model = BertConfig | ModernBertConfig | Gpt2Config


def make_config(work: Work) -> Model:
    """The model of the sizes asked for, which attends as a run on this device would."""
    return attention.settle_model(sizes(work), work.row_length, jax.devices()[0]).config


def sizes(work: Work) -> Model:
    """GPT-2 for causal pretraining, a ModernBERT where that is asked for, and else a BERT."""
    fields = "vocab_size", "num_layers", "hidden_dim", "num_heads", "mlp_dim", "dtype"
    common: Any = {name: getattr(work, name) for name in fields}
    if work.task in ("clm", "modern"):
        kind = Gpt2Config if work.task == "clm" else ModernBertConfig
        return kind(**common, max_length=max(1024, work.row_length)).with_dropout(work.dropout_rate)
    return BertConfig(
        **common,
        max_length=max(512, work.row_length),
        dropout_rate=work.dropout_rate,
        attention_dropout_rate=work.dropout_rate,
    )


def pretraining(work: Work, optimizer: optax.GradientTransformation) -> tuple[Loss, Init]:
    """BERT or ModernBERT with its masked-language-model head."""
    config: Any = make_config(work)
    model = WithLmHead(config.make(), config.make_lm_head())
    masking = MaskingConfig(rate=work.mask_rate, budget=work.num_masked)

    def init(key: PRNGKey) -> TrainState:
        return TrainState.create(model.init(key, dummy()), {}, optimizer)

    return masked_lm.make_loss(model.apply, make_vocabulary(work), masking), init


def causal_pretraining(work: Work, optimizer: optax.GradientTransformation) -> tuple[Loss, Init]:
    """GPT-2."""
    config: Any = make_config(work)
    model = WithLmHead(config.make(), config.make_lm_head())

    def init(key: PRNGKey) -> TrainState:
        return TrainState.create(model.init(key, dummy()), {}, optimizer)

    return causal_lm.make_loss(model.apply, make_vocabulary(work)), init


def fine_tuning(work: Work, optimizer: optax.GradientTransformation) -> tuple[Loss, Init]:
    """BERT with a classifier, whose parameters all learn, or only adapters and the head."""
    head = ClassificationHead(work.num_labels, work.dropout_rate)
    model = WithHead(make_config(work).make(), head)
    lora = LoraConfig(rank=work.rank, alpha=work.alpha)
    chosen = lora if work.task == "lora" else tuning.Full()

    def init(key: PRNGKey) -> TrainState:
        params = model.init(key, dummy())["params"]
        call = lambda variables: model.apply(variables, dummy())
        trainable, frozen = tuning.prepare(chosen, key, params, call, work.dtype, split_layers=True)
        return TrainState.create(trainable, frozen, optimizer)

    return classification.make_loss(tuning.adapt(chosen, model.apply)), init


MAKERS = {
    "mlm": pretraining,
    "modern": pretraining,
    "clm": causal_pretraining,
    "lora": fine_tuning,
    "full": fine_tuning,
}


def make_step(work: Work) -> Callable[[], tuple[TrainState, Sums]]:
    """A function that dispatches one training step and returns what it will give."""
    # As torch's AdamW: constant learning rate, its own constants, and no clipping.
    optimization = OptimizerConfig(
        peak_lr=work.peak_lr,
        schedule="constant",
        warmup_share=0.0,
        b2=0.999,
        epsilon=1e-8,
        weight_decay=work.weight_decay,
        clip_norm=None,
    )
    optimizer = make_optimizer(optimization)
    loss, init = MAKERS[work.task](work, optimizer)
    placement = jit_placement(
        init,
        make_train_step(loss, optimizer, make_schedule(optimization), seed=0),
        make_eval_step(loss, seed=0),
        make_mesh(MeshConfig(), jax.devices()[:1]),
    )
    batch, progress = placement.put_batch(make_batch(work)), jnp.zeros(())
    state = placement.init(jax.random.key(0))
    train_step = None

    def step() -> tuple[TrainState, Sums]:
        nonlocal state, train_step
        if train_step is None:
            train_step = compile_ahead(placement.train_step, state, batch, progress)
        state, sums = train_step(state, batch, progress)
        return state, sums

    return step


def main() -> None:
    """Build the step and serve it."""
    work = read_work()
    one_step_at_a_time()  # as the scripts do
    attends = make_config(work).attention

    def finish(handle: tuple[TrainState, Sums]) -> float:
        _, sums = jax.block_until_ready(handle)
        return sums.means()["loss"]

    serve(
        work,
        versions=f"jax {jax.__version__}, flax {flax.__version__}, attention {attends}",
        device_name=jax.devices()[0].device_kind if work.device == "cuda" else "",
        compiles=True,
        step=make_step(work),
        finish=finish,
        device_peak_bytes=lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"],
    )


if __name__ == "__main__":
    main()
