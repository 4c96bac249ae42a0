"""A loop of one's own: LoRA on a linen module that jaxlm does not know, on all devices, in seconds.

Put your module in place of ``Classifier``, its sums of losses in ``loss``, your data in place of
``make_batch``. Where there are several devices, ``AXES`` needs a row for each kind of parameter;
what is missing is named. Any optimizer of Optax will do: with ``optax.adam(1e-3)``, which has a
rate of its own, leave ``make_schedule`` out. Under pmap: ``axis_name="d"`` in both steps, and
``pmap_placement(init, train_step, eval_step, "d")``, with no mesh and no rows. jaxlm/README.md says
how to save and restore.
"""

import flax.linen as nn
import jax
import numpy as np
import optax

from jaxlm import sharding, tree
from jaxlm.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxlm.peft import lora
from jaxlm.sums import Sums
from jaxlm.train.placement import jit_placement
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_eval_step, make_train_step

STEPS, ROWS = 100, 64
LORA = lora.LoraConfig(targets=(r"(query|value)/kernel", r"up/kernel"), rank=4, alpha=8.0)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2)
AXES = (  # how a parameter's path ends, and its axes, by the names of sharding.RULES
    *sharding.AXES,  # attention, feed-forward
    (r"words/embedding", "vocab -> embed"),
    (r"last/kernel", "embed -> labels"),
    (r"(last|LayerNorm_\d+)/(bias|scale)", "norm"),
)
optimizer = make_optimizer(OPTIMIZER, axes=AXES)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 64, name="words")(tokens)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(2, name="last")(nn.gelu(nn.Dense(64, name="up")(nn.LayerNorm()(x))).mean(1))


def make_batch(step):  # are more of the words of a row in the upper half of the vocabulary?
    tokens = np.random.default_rng(step).integers(0, 32, (ROWS, 15), np.int32)
    return {"tokens": tokens, "labels": ((tokens >= 16).sum(1) > 7).astype(np.int32)}


def loss(variables, batch, key, *, progress, deterministic):  # sums over the rows that are here
    logits = lora.adapt(Classifier().apply, LORA)(variables, batch["tokens"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.sum(), Sums({"loss": losses.sum()}, jax.numpy.float32(len(losses)))


def init(key):  # pretrained parameters would be read here
    call = lambda variables: Classifier().apply(variables, make_batch(0)["tokens"])
    base = Classifier().init(key, make_batch(0)["tokens"])
    variables = {**base, "lora": lora.init(key, base, LORA, call)}
    learned, frozen = tree.partition(variables, lambda p: p.startswith(("lora/", "params/last/")))
    return TrainState.create(learned, frozen, optimizer)


train_step = make_train_step(loss, optimizer, make_schedule(OPTIMIZER))
mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=jax.device_count()))
placement = jit_placement(init, train_step, make_eval_step(loss, seed=0), mesh, AXES)
state = placement.init(jax.random.key(0))
for step in range(STEPS):
    batch = placement.put_batch(make_batch(step))
    state, sums = placement.train_step(state, batch, (step + 1) / STEPS)
    if step % 11 == 0:
        print(f"step {step}: loss {sums.means()['loss']:.3f}")
merged = lora.merge(state.variables["params"], state.variables["lora"], LORA)  # a plain Classifier
held_out = make_batch(STEPS)
logits = np.asarray(Classifier().apply({"params": merged}, held_out["tokens"]))
right = logits.argmax(-1) == held_out["labels"]
print(f"{tree.num_params(state.trainable):,} of {tree.num_params(state.variables):,} learned")
print(f"accuracy on other rows: {right.mean():.0%}")
