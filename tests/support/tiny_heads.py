"""The BERT of tests with the head of a task, drawn, and a tokenizer of letters."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import BERT
from tokenizers import Tokenizer, models

from jaxlm.convert.architecture import TaskHead
from jaxlm.data import tokenizers
from jaxlm.data.tokenizer_training import bert, with_specials
from jaxlm.models.heads import ClassificationHead, TokenHead, WithHead
from jaxlm.models.pooling import POOLS

LABELS = ("O", "B-X", "I-X")
LETTERS = [*tokenizers.SPECIALS, *"abcdefgh"]
SIZES = {"MultipleChoice": 1, "QuestionAnswering": 2}
POOLED = ("SequenceClassification", "MultipleChoice")


def tokenizer() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(LETTERS)}
    return with_specials(bert(models.WordPiece(vocab, unk_token="[UNK]")))


def model_of(config, task, size=3, pooling="bert"):
    size = SIZES.get(task, size)
    head = ClassificationHead(size, pool=POOLS[pooling]) if task in POOLED else TokenHead(size)
    return WithHead(config.make(), head)


def drawn(task, size=3, config=BERT, pooling="bert"):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    model = model_of(config, task, size, pooling)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def said(task, **more):
    labels = LABELS if task in ("SequenceClassification", "TokenClassification") else ()
    pooling = "bert" if task in POOLED else None
    kind = "single_label_classification" if task == "SequenceClassification" else None
    return TaskHead(
        **{"task": task, "labels": labels, "pooling": pooling, "problem_type": kind} | more
    )
