"""On fake CPU devices: the step is traced and lowered, nothing is compiled."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import tree
from jaxlm.compile_check.step import Assumed, make_step
from jaxlm.config import FinetuneConfig
from jaxlm.convert import bert
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import TINY
from jaxlm.models.transformer import TransformerConfig
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import BitFit, Full, HeadOnly
from jaxlm.runs import pretrained
from jaxlm.runs.base import read_model
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.tagging import Tagging
from jaxlm.train.loop import TrainConfig

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL = Assumed(vocab_size=100, encoder=TINY)


def lowered(step):
    state = step.placement.abstract_state
    return step.placement.train_step.lower(state, step.batch, jax.ShapeDtypeStruct((), np.float32))


def test_pretraining_is_the_step_of_training(config):
    config = replace(config, model=TINY, mesh=MeshConfig(fsdp=2, tensor=2))
    step = make_step(config, replace(SMALL, length=32), jax.devices())
    tokens = step.batch["tokens"]
    assert (tokens.shape, step.row_length, step.num_tokens) == ((256, 32), 32, 256 * 32)
    assert tokens.sharding.shard_shape(tokens.shape) == (64, 32)
    table = step.placement.abstract_state.trainable["params"]["encoder"]["token_embed"]
    assert table["embedding"].shape == (128, 128)  # 100 tokens, padded
    model = replace(TINY, vocab_size=128)
    assert step.flops == pretrained.flops_per_token(replace(config, model=model), 32) * 256 * 32
    assert "bf16" in lowered(step).as_text()  # as on a TPU, not as on the CPUs here


def test_the_attention_of_long_rows(config):
    model = replace(TINY, max_length=2048)
    step = lambda **changes: make_step(
        replace(config, model=model, **changes), replace(SMALL, length=2048), jax.devices()
    )
    assert step().attention.startswith("attention: blockwise, ")
    assert step(attention="plain").attention == "attention: plain, as told"
    with pytest.raises(InputError, match="it is a kernel for TPUs"):
        step(attention="splash")


def test_the_length_of_rows(config):
    assert make_step(config, Assumed(), jax.devices()).row_length == 512
    quickstart = configs.read_file(CONFIGS / "quickstart.py")
    assert make_step(quickstart, Assumed(), jax.devices()).row_length == 64
    with pytest.raises(InputError, match="rows of 600 tokens are longer"):
        make_step(config, Assumed(length=600), jax.devices())


def test_pmap(config):
    config = replace(config, model=TINY, placement="pmap")
    step = make_step(config, replace(SMALL, length=16), jax.devices())
    assert step.batch["tokens"].shape == (8, 32, 16)
    lowered(step)
    with pytest.raises(InputError, match="256 is not divisible by 6 devices"):
        make_step(config, SMALL, jax.devices()[:6])


def finetuning(**changes) -> FinetuneConfig:
    config = configs.read_file(CONFIGS / "sst2_lora.py")
    assert isinstance(config, FinetuneConfig)
    return replace(config, base="nowhere", mesh=MeshConfig(fsdp=2), **changes)


@pytest.mark.parametrize(
    "task",
    [Classification(), Tagging(), QuestionAnswering(), MultipleChoice(), Embedding()],
    ids=lambda task: type(task).__name__,
)
def test_every_task_has_its_batch(task):
    lowered(make_step(finetuning(task=task), replace(SMALL, length=16), jax.devices()))


def test_pairs_have_as_many_rows_as_their_tokens_allow():
    model = TransformerConfig(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=16)
    config = finetuning(task=Seq2Seq(), model=model, tuning=Full())
    data = replace(config.data, batch_size=8, batch_tokens=1000, max_length=32)
    train = TrainConfig(epochs=2.0)  # of a warm-up in steps it must be known how many that are
    optimizer = replace(config.optimizer, warmup_steps=10)
    config = replace(config, base=None, data=data, train=train, optimizer=optimizer)
    config = replace(config, source_tokenizer=TokenizerConfig())
    step = make_step(config, SMALL, jax.devices())
    assert step.batch["tokens"].shape == step.batch["targets"].shape == (24, 32)
    encoder = step.placement.abstract_state.trainable["params"]["encoder"]
    assert encoder["source_embed"]["embedding"].shape == (128, 16)  # of their own tokenizer
    lowered(step)


@pytest.mark.parametrize(
    ("tuning", "passes"),
    [(Full(), 3), (HeadOnly(), 1), (BitFit(), 2), (Ia3Config(), 2), (LoraConfig(rank=4), 2)],
    ids=lambda value: type(value).__name__,
)
def test_flops_of_a_tuning(tuning, passes):
    step = make_step(finetuning(tuning=tuning), replace(SMALL, length=16), jax.devices())
    forward = replace(TINY, vocab_size=128).forward_flops(16, 0) / 16
    lora = step.placement.abstract_state.trainable.get("lora", {})
    # Two layers, queries and values, 128 to 4 and back, forward and twice backward.
    assert 6 * tree.num_params(lora) == (isinstance(tuning, LoraConfig) and 2 * 2 * 6 * 2 * 128 * 4)
    assert step.flops == (passes * forward + 6 * tree.num_params(lora)) * step.num_tokens


def test_products_of_a_lora_step_are_what_xla_counts():
    config = finetuning(tuning=LoraConfig(rank=8), dtype="float32")
    # Rows long enough that the pooler, which is not counted, is little.
    step = make_step(config, replace(SMALL, length=128), jax.devices())
    per_device = lowered(step).compile().cost_analysis()["flops"] * jax.device_count()
    assert step.flops is not None
    # XLA also counts what is not a product: softmax, GELU, norms, dropout.
    assert 0.8 * step.flops < per_device < 1.5 * step.flops


def test_a_published_vocabulary_is_filled_up_as_in_training():
    config = replace(finetuning(), mesh=MeshConfig(tensor=2))
    published = replace(SMALL, length=16, encoder=replace(TINY, vocab_size=101))
    state = make_step(config, published, jax.devices()).placement.abstract_state
    leaves = tree.leaves_with_path(state.frozen)
    assert [leaf.shape[0] for path, leaf in leaves if "token_embed" in path] == [128]


def test_a_bilstm_has_a_formula():
    """One layer, 128 channels each way, on embeddings of 128; backward costs two forwards."""
    config = configs.read_file(CONFIGS / "sst2_bilstm.py")
    step = make_step(config, replace(SMALL, length=16), jax.devices())
    cells = 2 * 2 * 4 * 128 * (128 + 128)
    assert step.flops == 3 * cells * step.num_tokens


def test_a_base_is_read_without_its_weights(tmp_path):
    assert read_model(str(tmp_path / "nowhere")) is None
    encoder = replace(TINY, vocab_size=128)
    (tmp_path / "config.json").write_text(json.dumps(bert.write_config(encoder)))
    read = read_model(str(tmp_path))
    assert read is not None
    assert (read.vocab_size, read.num_layers, read.hidden_dim) == (128, 2, 128)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    config = configs.read_file(CONFIGS / "quickstart.py")
    (run_folder / "config.json").write_text(configs.to_json(config))
    assert read_model(str(run_folder)) == config.model
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        read_model(str(tmp_path))
