"""An adapter's folder as a run, and back."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import BERT

from jaxlm.config import FinetuneConfig
from jaxlm.convert import huggingface, peft_load, peft_save
from jaxlm.convert.peft_save import ROOT, WEIGHTS
from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.errors import InputError
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import HeadOnly
from jaxlm.runs import adapter, finetuned
from jaxlm.tasks.tagging import Tagging
from jaxlm.train.loop import TrainConfig

LAYER = "bert.encoder.layer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, an adapter of it as PEFT would save it, and a config."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = tokenizers.train("wordpiece", ["red green blue cat dog " * 4], 60)
    config = replace(BERT, vocab_size=tokenizers.vocab_size(tokenizer))  # no multiple of 64
    shapes = jax.eval_shape(config.make().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = jax.tree.map(lambda x: draw(*x.shape), shapes["params"])
    huggingface.save(root / "base", {"encoder": params}, config, tokenizer)
    tensors = {
        "bert.pooler.dense.weight": draw(16, 16),
        "bert.pooler.dense.bias": draw(16),
        "classifier.weight": draw(2, 16),
        "classifier.bias": draw(2),
        "bert.embeddings.word_embeddings.lora_embedding_A": draw(2, config.vocab_size),
        "bert.embeddings.word_embeddings.lora_embedding_B": draw(16, 2),
    }
    for i in (0, 1):
        tensors |= {
            f"{LAYER}.{i}.attention.self.{name}.lora_{x}.weight": draw(*shape)
            for name in ("query", "value")
            for x, shape in (("A", (2, 16)), ("B", (16, 2)))
        }
    folder = root / "adapter"
    folder.mkdir()
    save_file({ROOT + name: x for name, x in tensors.items()}, folder / WEIGHTS)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(root / "base"),
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["query", "value", "word_embeddings"],
        "modules_to_save": ["pooler", "classifier"],
    }
    (folder / peft_save.CONFIG).write_text(json.dumps(settings))
    rows = [
        f"{color} {animal},{animal}"
        for color in ("red", "green", "blue") * 6
        for animal in ("cat", "dog")
    ]
    (root / "data.csv").write_text("\n".join(["text,label", *rows]))
    wanted = FinetuneConfig(
        name="run",
        runs=root / "runs",
        base="unused",
        data=LabelledConfig(train=Table(path=str(root / "data.csv")), batch_size=8),
        tuning=HeadOnly(),
        optimizer=OptimizerConfig(warmup_steps=2),  # of epochs whose steps are not known
        train=TrainConfig(epochs=1.0, num_evals=1),
    )
    return folder, wanted


@pytest.fixture(scope="module")
def run(folders):
    folder, wanted = folders
    return adapter.load(folder, wanted)


def copied(folder, out, **changes):
    shutil.copytree(folder, out)
    settings = json.loads((out / peft_save.CONFIG).read_text())
    (out / peft_save.CONFIG).write_text(json.dumps(settings | changes))
    return out


def test_an_adapter_is_a_run(folders, run, tmp_path):
    folder, _ = folders
    loaded = finetuned.open_finetuned(run)
    assert loaded.labels == ("LABEL_0", "LABEL_1")
    assert isinstance(loaded.config.tuning, LoraConfig)
    assert (loaded.config.tuning.rank, loaded.config.tuning.alpha) == (2, 3.0)
    (answer,) = loaded.answer(["red cat"])
    assert set(answer["probabilities"]) == {"LABEL_0", "LABEL_1"}
    named = adapter.export(loaded, tmp_path / "again")
    before, after = (load_file(x / WEIGHTS) for x in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    settings = peft_load.read_settings(tmp_path / "again")
    assert (settings.base, settings.task_type) == (named, "SEQ_CLS")
    assert "num_labels=2" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(InputError, match="exists: name a new folder"):
        adapter.export(loaded, tmp_path / "again")


def test_what_is_refused_leaves_nothing(run, tmp_path, monkeypatch):
    """Nor a base, which is written first where it is a run."""
    loaded, written = finetuned.open_finetuned(run), []

    def refuse(path, model, name):
        written.append(path.is_dir())
        raise InputError("no")

    monkeypatch.setattr(adapter, "is_run", lambda directory: True)
    monkeypatch.setattr(adapter.task_model, "check_base", refuse)
    with pytest.raises(InputError, match="no"):
        adapter.export(loaded, tmp_path / "out")
    assert written == [True]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_adapter(run, tmp_path, monkeypatch, limit_file_size):
    loaded = finetuned.open_finetuned(run)
    cases = [
        (100, True, "/base"),  # its config.json
        (4000, True, "/base/model.safetensors"),
        (4000, False, "/adapter_model.safetensors"),
        (100_000, False, ""),  # only the card is longer
    ]
    monkeypatch.setattr(adapter, "_card", lambda *_: " " * 200_000)
    for limit, base_is_run, file in cases:
        monkeypatch.setattr(adapter, "is_run", lambda directory, found=base_is_run: found)
        limit_file_size(limit)
        with pytest.raises(InputError, match=r"cannot be written.*too large") as caught:
            adapter.export(loaded, tmp_path / "out")
        message = str(caught.value)
        assert f"{tmp_path}/out{file}" in message
        assert ".partial" not in message
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_run(folders, tmp_path, monkeypatch, limit_file_size):
    folder, wanted = folders
    write = adapter.write_folder

    def then_limit(*given):
        write(*given)
        limit_file_size(100)

    monkeypatch.setattr(adapter, "write_folder", then_limit)
    with pytest.raises(InputError, match="too large"):
        adapter.load(folder, replace(wanted, runs=tmp_path))
    assert not (tmp_path / "run").exists()


def test_names_of_labels_stand_beside_it(folders, tmp_path):
    folder, wanted = folders
    named = copied(folder, tmp_path / "named")
    (named / "labels.json").write_text('["cat", "dog"]')
    config = replace(wanted, runs=tmp_path)
    assert finetuned.open_finetuned(adapter.load(named, config)).labels == ("cat", "dog")
    (named / "labels.json").write_text('["cat", "cat"]')
    with pytest.raises(InputError, match=r"labels\.json names 2 classes 'cat': give each a name"):
        adapter.load(named, replace(config, name="other"))
    (named / "labels.json").write_text('["cat"]')
    with pytest.raises(InputError, match="does not hold a list of the 2 labels"):
        adapter.load(named, replace(config, name="other"))


def test_what_cannot_be_a_run(folders, run, tmp_path):
    folder, wanted = folders
    other = replace(wanted, name="other")
    with pytest.raises(InputError, match="run exists: give another --name"):
        adapter.load(folder, wanted)
    with pytest.raises(InputError, match="task_type='SEQ_CLS' is not what task=Tagging trains"):
        adapter.load(folder, replace(other, task=Tagging()))
    with pytest.raises(InputError, match="holds no adapter in PEFT's format"):
        adapter.load(tmp_path, other)
    with pytest.raises(InputError, match="holds an adapter in PEFT's format, not a run: make one"):
        finetuned.open_finetuned(folder)
    lost = copied(folder, tmp_path / "lost", modules_to_save=["classifier"])
    tensors = {n: x for n, x in load_file(lost / WEIGHTS).items() if "pooler" not in n}
    save_file(tensors, lost / WEIGHTS)
    with pytest.raises(InputError, match=r"lacks bert\.pooler\.dense\..*drawn at random"):
        adapter.load(lost, other)
    away = copied(folder, tmp_path / "away", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="there is no folder"):
        adapter.load(away, other)
    base = peft_load.read_settings(folder).base
    assert adapter.load(away, replace(other, runs=tmp_path), base=base).exists()


@pytest.mark.slow
def test_it_is_trained_further(folders, tmp_path):
    from jaxlm.config import read_file
    from jaxlm.runs.finetuning import finetune

    folder, wanted = folders
    named = copied(folder, tmp_path / "named")
    (named / "labels.json").write_text('["cat", "dog"]')
    directory = adapter.load(named, replace(wanted, runs=tmp_path, name="further"))
    before = finetuned.open_finetuned(directory)
    assert finetune(read_file(directory / "config.json")) == directory
    after = finetuned.open_finetuned(directory)
    assert int(after.state.step) > 0
    moved = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(),
        before.state.trainable,
        after.state.trainable,
    )
    assert max(jax.tree.leaves(moved)) > 0
