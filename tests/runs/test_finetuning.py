"""Whole fine-tuning runs, tiny: from a CSV to a run folder, resumed, evaluated and used."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_runs import make_config

from jaxlm import tree
from jaxlm.config import FinetuneConfig, to_json
from jaxlm.convert import huggingface
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Record, Table
from jaxlm.data.prepare import TokenizerConfig
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.transformer import TransformerConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import BitFit, Full, HeadOnly
from jaxlm.runs import base, beginning, finetuned, pretrained
from jaxlm.runs.finetuning import finetune, resolve
from jaxlm.runs.folder import CHECKPOINTS, begun
from jaxlm.runs.pretraining import pretrain
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.train import restore
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import list_steps
from jaxlm.train.view import View

GOLDEN = Path(__file__).parents[1] / "golden" / "published_bert.safetensors"
WORDS = [*"abcdefghijklmnopqrs"]
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder, and two CSV files: the label says which words they are of."""
    folder = tmp_path_factory.mktemp("finetune")
    model = folder / "model"
    model.mkdir()
    with safe_open(GOLDEN, framework="np") as file:
        (model / "config.json").write_text(file.metadata()["config"])
    arrays = load_file(GOLDEN)
    prefix = "weights/"
    weights = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    save_file(weights, model / "model.safetensors")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (model / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    rng = np.random.default_rng(0)
    for name, rows in (("train", 96), ("dev", 32)):
        lines = ["text,label"]
        for row in range(rows):
            half = WORDS[:3] if row % 2 else WORDS[9:12]
            lines.append(f"{' '.join(rng.choice(half, rng.integers(3, 7)))},{row % 2}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        name="lora",
        runs=folder / "runs",
        base=str(folder / "model"),
        data=LabelledConfig(
            train=Table(path=str(folder / "train.csv")),
            validation=Table(path=str(folder / "dev.csv")),
            batch_size=16,
            max_length=8,
            num_buckets=1,
        ),
        dropout_rate=0.0,
        tuning=LoraConfig(targets=(r"(query|key|value|out|up|down)/kernel",), rank=4),
        optimizer=OptimizerConfig(peak_lr=3e-2),
        train=TrainConfig(steps=STEPS, num_evals=2, log_every=1),
    )


@pytest.fixture(scope="module")
def directory(config: FinetuneConfig) -> Path:
    """A run that nothing interrupted."""
    return finetune(config)


def learned(config: FinetuneConfig) -> dict[str, np.ndarray]:
    state = finetuned.open_finetuned(config.directory, step=STEPS).state
    return {path: np.asarray(leaf) for path, leaf in tree.leaves_with_path(state.trainable)}


def record(text: str) -> Record:
    return Record(fields={"text": text}, origin="here")


def test_learns_and_leaves_a_folder_that_answers(directory: Path, folder: Path) -> None:
    names = {path.name for path in directory.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "labels.json", "loss.png", "metrics.jsonl"}
    scores = [
        r["eval/accuracy"] for r in read_jsonl(directory / "metrics.jsonl") if "eval/loss" in r
    ]
    assert len(scores) == 3
    assert scores[-1] > 0.9
    loaded = finetuned.open_finetuned(directory)
    answers = loaded.answer(["j k l j", {"text": "a b", "id": 3}, record("l k l")])
    assert answers[1]["id"] == 3
    assert [answer["label"] for answer in answers] == ["0", "1", "0"]
    assert [answer["text"] for answer in answers] == ["j k l j", "a b", "l k l"]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_a_checkpoint_holds_adapters_and_head_alone(
    directory: Path, config: FinetuneConfig
) -> None:
    loaded = finetuned.open_finetuned(directory)
    paths = {path for path, _ in tree.leaves_with_path(loaded.state.trainable)}
    assert paths == {
        *(
            f"params/head/{name}/{leaf}"
            for name in ("pooler", "classifier")
            for leaf in ("kernel", "bias")
        ),
        *(
            f"lora/encoder/layers/{name}/{factor}"
            for name in (
                *("attention/query", "attention/key", "attention/value", "attention/out"),
                *("mlp/up", "mlp/down"),
            )
            for factor in "ab"
        ),
    }
    published = base.load(config.base)
    for path, leaf in tree.leaves_with_path(published.encoder):
        frozen = dict(tree.leaves_with_path(loaded.variables["params"]["encoder"]))[path]
        np.testing.assert_array_equal(frozen[: leaf.shape[0]], leaf)  # the vocabulary is filled up


def test_merged_parameters_compute_the_same(directory: Path, config: FinetuneConfig) -> None:
    loaded = finetuned.open_finetuned(directory)
    model = finetuned.make_model(loaded.config, loaded.labels)
    tokens = np.array([[2, 7, 8, 9, 3]], np.int32)
    plain = jax.jit(model.apply)({"params": loaded.merged()}, tokens)
    adapted = jax.jit(finetuned.adapted_apply(loaded.config, loaded.labels))(
        loaded.variables, tokens
    )
    np.testing.assert_allclose(plain, adapted, atol=1e-5)
    unadapted = jax.jit(model.apply)({"params": loaded.variables["params"]}, tokens)
    assert np.abs(np.asarray(unadapted) - np.asarray(adapted)).max() > 1e-3


def test_merged_and_saved_is_a_base(directory: Path, tmp_path: Path) -> None:
    loaded = finetuned.open_finetuned(directory)
    merged = jax.tree.map(np.asarray, loaded.merged())
    done = script("merge_lora.py", directory, str(tmp_path / "merged"))
    assert b", merged, is in " in done.stdout, done.stderr
    assert re.search(rb"rounded to bfloat16 its weights would differ by \d+\.\d% of", done.stdout)
    read = base.load(str(tmp_path / "merged"))
    assert read.config == replace(loaded.config.model, dtype=None, attention=None)
    for path, leaf in tree.leaves_with_path(read.encoder):
        expected = dict(tree.leaves_with_path(merged["encoder"]))[path]
        np.testing.assert_array_equal(leaf, expected)
    with pytest.raises(InputError, match="name a new folder"):
        huggingface.save(tmp_path, {}, loaded.config.model, loaded.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), pytest.param(MeshConfig(fsdp=2, tensor=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_interrupted_and_resumed_is_uninterrupted(
    config: FinetuneConfig,
    directory: Path,
    mesh: MeshConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = replace(config, runs=tmp_path)
    add = View.add

    def add_and_stop(view: View, now: int, *rest: object) -> None:
        add(view, now, *rest)
        if now == 9:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(View, "add", add_and_stop)
        finetune(broken)
    assert max(list_steps(broken.directory / CHECKPOINTS)) < STEPS
    finetune(replace(broken, mesh=mesh))
    whole, resumed = learned(config), learned(broken)
    for path in whole:
        if mesh == MeshConfig():
            np.testing.assert_array_equal(whole[path], resumed[path])
        else:
            np.testing.assert_allclose(whole[path], resumed[path], atol=2e-5)


@pytest.mark.parametrize(
    "tuning",
    [
        Ia3Config(),
        *(
            pytest.param(tuning, marks=pytest.mark.slow)
            for tuning in (LoraConfig(kind="dora"), HeadOnly(), BitFit(), Full())
        ),
    ],
    ids=str,
)
def test_every_tuning_trains_what_it_says(config: FinetuneConfig, tuning, tmp_path: Path) -> None:
    short = replace(config, runs=tmp_path, tuning=tuning, train=TrainConfig(steps=1, num_evals=1))
    loaded = finetuned.open_finetuned(finetune(short))
    paths = {path for path, _ in tree.leaves_with_path(loaded.state.trainable)}
    encoder = {path for path in paths if not path.startswith("params/head/")}
    match tuning:
        case HeadOnly():
            assert not encoder
        case BitFit():
            assert encoder
            assert all(path.endswith("/bias") for path in encoder)
        case Full():
            assert not loaded.state.frozen
        case _:
            assert encoder
            assert all(path.startswith(("lora/", "ia3/")) for path in encoder)


@pytest.mark.parametrize(
    ("kept", "dtype"),
    [("bfloat16", "bfloat16"), ("int8", None)],
)
@pytest.mark.slow
def test_a_frozen_base_may_be_small(config: FinetuneConfig, kept, dtype, tmp_path: Path) -> None:
    small = replace(config, runs=tmp_path, frozen_dtype=kept, dtype=dtype)
    loaded = finetuned.open_finetuned(finetune(small))
    assert loaded.config.model.dtype == (dtype or "float32")
    whole = 4 * tree.num_params(loaded.variables["params"]["encoder"])
    assert tree.num_bytes(loaded.state.frozen) < 0.7 * whole  # norms, and with int8 tables, stay
    (answer,) = loaded.answer([record("a b c")])
    assert answer["label"] == "1"


def test_a_vocabulary_grows_to_be_split(config: FinetuneConfig) -> None:
    published = base.load(config.base)
    split = replace(config, name="split", mesh=MeshConfig(tensor=5))
    resolved = resolve(split, published, published.tokenizer, "cpu")
    given = beginning.given(resolved, finetuned.make_model(resolved, ("0", "1")), published)
    table = np.asarray(given["encoder"]["token_embed"]["embedding"])
    assert (published.config.vocab_size, len(table)) == (24, 320)
    np.testing.assert_array_equal(table[:24], published.encoder["token_embed"]["embedding"])
    np.testing.assert_array_equal(table[24:], 0)


def test_a_run_keeps_its_vocabulary_on_another_mesh(config: FinetuneConfig, tmp_path: Path) -> None:
    published = base.load(config.base)
    task, model = Seq2Seq(), TransformerConfig(hidden_dim=8, num_heads=2, mlp_dim=8)
    own = TokenizerConfig(vocab_size=60)
    new = replace(config, base=None, tuning=Full(), task=task, model=model, source_tokenizer=own)
    cases = (config, published, None), (new, None, published.tokenizer)
    for number, (one, of, sources) in enumerate(cases):
        one = replace(one, runs=tmp_path, name=str(number), mesh=MeshConfig(tensor=5))
        first = resolve(one, of, published.tokenizer, "cpu", sources)
        (one.directory / CHECKPOINTS / "0").mkdir(parents=True)
        (one.directory / "config.json").write_text(to_json(first))
        for given in (one.model, first.model):
            moved = replace(one, mesh=MeshConfig(), model=given)
            own = begun(moved)
            assert own is not None
            resumed = resolve(moved, of, published.tokenizer, "cpu", sources, own.model)
            assert resumed.model == first.model
            assert vars(resumed.model).get("source_vocab_size", 320) == 320
            assert resumed.model.vocab_size == 320


def test_every_linear_map_below_the_head_can_be_adapted(config: FinetuneConfig) -> None:
    published = base.load(config.base)
    everywhere = replace(config, tuning=LoraConfig(targets=("kernel",), rank=2))
    resolved = resolve(everywhere, published, published.tokenizer, "cpu")
    state = jax.eval_shape(finetuned.make_init(resolved, ("0", "1")), jax.random.key(0))
    assert state.trainable["lora"].keys() == {"encoder"}


@pytest.mark.slow
def test_stops_when_nothing_gets_better(config: FinetuneConfig, tmp_path: Path) -> None:
    lazy = replace(
        config,
        runs=tmp_path,
        tuning=HeadOnly(),
        optimizer=OptimizerConfig(peak_lr=1e-30),
        train=TrainConfig(steps=100, num_evals=50, patience=2, log_every=1),
    )
    directory = finetune(lazy)
    # The first with a trained head is best, and the next two are no better.
    assert max(list_steps(directory / CHECKPOINTS)) == 6


@pytest.mark.slow
def test_a_bilstm_learns_from_the_same_data(config: FinetuneConfig, tmp_path: Path) -> None:
    scratch = replace(
        config,
        runs=tmp_path,
        base=None,
        model=BilstmConfig(embed_dim=8, hidden_dim=8),
        tokenizer=TokenizerConfig(vocab_size=60),
        task=Classification(pooling="mean"),
        tuning=Full(),
        train=TrainConfig(epochs=8.0, num_evals=1),
    )
    small = replace(scratch, model=replace(scratch.model, vocab_size=10))
    with pytest.raises(InputError, match=r"model\.vocab_size=10 is smaller than the tokenizer's"):
        finetune(small)
    loaded = finetuned.open_finetuned(finetune(scratch))
    assert [a["label"] for a in loaded.answer([record("a b"), record("k j")])] == ["1", "0"]


def test_more_devices_than_micro_batches_leave_rows_for(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "copy")
    saved = (directory / "config.json").read_text()
    micro = saved.replace('"num_micro_batches": 1', '"num_micro_batches": 16')
    assert micro != saved
    (tmp_path / "copy" / "config.json").write_text(micro)
    assert finetuned.open_finetuned(tmp_path / "copy").labels == ("0", "1")


def averaged(run: Path, copy: Path, count: int) -> Path:
    """The run with a configuration that asks for the mean of so many checkpoints."""
    shutil.copytree(run, copy)
    saved = (run / "config.json").read_text()
    (copy / "config.json").write_text(saved.replace('"average": null', f'"average": {count}'))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fine-tuned", "pretrained"])
def test_a_run_may_be_the_mean_of_its_last_checkpoints(
    kind: str, directory: Path, tmp_path: Path
) -> None:
    def opened(run: Path, step: int | None = None) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The steps that were read, and their parameters."""
        if kind == "fine-tuned":
            loaded = finetuned.open_finetuned(run, step=step)
            return loaded.averaged, loaded.state.trainable
        trained = pretrained.open_pretrained(run, step)
        return trained.averaged, trained.variables["params"]

    run = directory if kind == "fine-tuned" else pretrain(make_config(tmp_path, steps=4))
    steps = list_steps(run / CHECKPOINTS)[-2:]
    assert len(opened(run)[0]) == 1
    copy = averaged(run, tmp_path / "copy", 2)
    read, mean = opened(copy)
    assert list(read) == steps
    (_, one), (_, two) = (opened(copy, step) for step in steps)
    for found, a, b in zip(*map(jax.tree.leaves, (mean, one, two)), strict=True):
        np.testing.assert_allclose(found, (np.asarray(a) + np.asarray(b)) / 2, atol=1e-7)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True))
    assert opened(copy, steps[0])[0] == (steps[0],)  # --step names one alone


def test_baselines_are_compared_with_the_mean_where_that_is_the_run(
    config: FinetuneConfig, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = averaged(directory, tmp_path / "copy", 2)
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(restore, "measured", lambda *_: {"accuracy": 0.1234})  # of one checkpoint
    train = replace(config.train, average=2)
    finetune(
        replace(config, runs=tmp_path, name=copy.name, train=train, baseline=True), console=console
    )
    printed = console.file.getvalue()
    (of_mean,) = re.findall(r"the mean of the checkpoints .* accuracy (\S+?),? ", printed)
    assert f"validation accuracy: this run {of_mean}, always 0 0.5" in printed


# Bad input.


def test_data_that_have_changed_are_not_split_anew(directory: Path) -> None:
    loaded = finetuned.open_finetuned(directory)
    assert len(loaded.splits().validation) == 32
    other = replace(loaded.config.data, validation=None)
    changed = replace(loaded, config=replace(loaded.config, data=other))
    with pytest.raises(InputError, match=r"have changed since lora was trained, .* \(--data\)"):
        changed.splits()


def refused(config: FinetuneConfig, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        finetune(config)
    assert "\n" not in str(caught.value)
    assert not config.directory.exists()


def test_bad_configurations(config: FinetuneConfig, tmp_path: Path) -> None:
    new = replace(config, runs=tmp_path)
    refused(replace(new, tuning=LoraConfig(targets=("nothing/kernel",))), "nothing/kernel")
    refused(replace(new, tuning=LoraConfig(rank=100)), "rank 100")
    refused(replace(new, monitor="luck"), "luck")
    refused(replace(new, monitor="pearson"), "monitor=pearson is .* here; there are loss, accuracy")
    refused(replace(new, base=str(tmp_path / "none")), "none")
    refused(replace(new, task=Classification(fields=TextFields(label="topic"))), "topic")
    refused(replace(new, model=BilstmConfig()), "model is given")
    with pytest.raises(InputError, match="base and model are None"):
        replace(new, base=None)
    with pytest.raises(InputError, match="tokenizer is given, and also base="):
        replace(new, tokenizer=TokenizerConfig())
    with pytest.raises(InputError, match="frozen_dtype=int8 is for frozen parameters"):
        replace(new, tuning=Full(), frozen_dtype="int8")
    with pytest.raises(InputError, match=r"label_smoothing=1\.5 is not in"):
        Classification(label_smoothing=1.5, r_drop=1.0)


def test_an_unseen_label(config: FinetuneConfig, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text("text,label\na b,7\n")
    data = replace(config.data, validation=Table(path=str(tmp_path / "dev.csv")))
    refused(replace(config, runs=tmp_path / "runs", data=data), r"dev\.csv:2.*'7'")


def test_an_adapter_refuses_another_base(directory: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder / "model", other)
    weights = dict(load_file(other / "model.safetensors"))
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name] + 1
    save_file(weights, other / "model.safetensors")
    with pytest.raises(InputError, match="is not the encoder that"):
        finetuned.open_finetuned(directory, base=str(other))
    longer = json.loads((other / "config.json").read_text())  # of another shape
    name = next(name for name in weights if name.endswith("position_embeddings.weight"))
    weights[name] = np.concatenate([weights[name]] * 2)
    save_file(weights, other / "model.safetensors")
    longer["max_position_embeddings"] = len(weights[name])
    (other / "config.json").write_text(json.dumps(longer))
    with pytest.raises(InputError, match="is not the encoder that"):
        finetuned.open_finetuned(directory, base=str(other))
    moved = tmp_path / "moved"
    shutil.copytree(folder / "model", moved)
    assert finetuned.open_finetuned(directory, base=base.load(str(moved))).labels == ("0", "1")


def test_a_base_is_found_from_any_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name = base.lasting("model")
    assert base.lasting("bert-base-uncased") == "bert-base-uncased"  # a name on the hub
    monkeypatch.chdir(tmp_path)
    assert base.load(name).config == base.load(str(folder / "model")).config


def test_a_frequent_class_is_no_trained_model(config: FinetuneConfig, folder: Path) -> None:
    """Whatever is learned, 95 % of the examples are of one class: step 0 is not best by a tie."""
    rows = [f"{' '.join(WORDS[i % 7 : i % 7 + 3 + i % 5])},{int(i % 20 > 0)}" for i in range(120)]
    (folder / "rare.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    data = replace(config.data, train=Table(path=str(folder / "rare.csv")), validation=None)
    train = TrainConfig(steps=4, num_evals=2)
    directory = finetune(replace(config, name="rare", data=data, train=train))
    assert finetuned.open_finetuned(directory).state.step > 0


@pytest.mark.slow
def test_a_finished_run_is_compared_with_what_needs_no_network(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    printed = {}
    for baseline in (True, "again", False):
        console = Console(file=io.StringIO(), width=200)
        train = TrainConfig(steps=1, num_evals=1)
        name = str(bool(baseline))
        finetune(
            replace(config, runs=tmp_path, name=name, train=train, baseline=bool(baseline)),
            console=console,
        )
        printed[baseline] = console.file.getvalue()
    (line,) = [x for x in printed[True].splitlines() if x.startswith("validation accuracy: ")]
    assert line.endswith(", always 0 0.5, TF-IDF + logistic regression 1")
    assert ": this run 0." in line or ": this run 1" in line
    assert line in printed["again"].splitlines()  # where nothing was left to be trained
    assert "TF-IDF" not in printed[False]


def test_dropout_from_scratch_is_the_model_s_own(config: FinetuneConfig, folder: Path) -> None:
    """With a base it is that of fine-tuning, whatever pretraining used."""
    model = BilstmConfig(vocab_size=64, dropout_rate=0.4)
    scratch = replace(config, base=None, model=model, tuning=Full(), dropout_rate=None)
    resolved = finetuned.with_encoder(scratch, model, "cpu")
    assert (resolved.dropout_rate, resolved.model.dropout_rate) == (0.4, 0.4)
    published = base.load(str(folder / "model")).config
    tuned = finetuned.with_encoder(replace(config, dropout_rate=None), published, "cpu")
    assert (tuned.dropout_rate, tuned.model.dropout_rate) == (0.1, 0.1)
    given = finetuned.with_encoder(replace(scratch, dropout_rate=0.2), model, "cpu")
    assert (given.dropout_rate, given.model.dropout_rate) == (0.2, 0.2)


def test_labels_are_stored(directory: Path, tmp_path: Path) -> None:
    assert json.loads((directory / finetuned.LABELS).read_text()) == ["0", "1"]
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / finetuned.LABELS).write_text('["1", "0"]')
    with pytest.raises(InputError, match=r'trained with: write \["0", "1"\] there'):
        finetuned.open_finetuned(tmp_path / "copy")
    (tmp_path / "copy" / finetuned.LABELS).unlink()
    with pytest.raises(InputError, match=r"labels\.json cannot be read"):
        finetuned.open_finetuned(tmp_path / "copy")


def script(name: str, run: Path, *options: str, given: bytes = b"") -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "scripts" / name), str(run), *options]
    environment = os.environ | {"GLIBC_TUNABLES": "", "XLA_FLAGS": "", "PYTHONPATH": str(root)}
    return subprocess.run(command, env=environment, input=given, capture_output=True, check=False)


@pytest.mark.slow
def test_a_table_is_read_as_one(directory: Path, tmp_path: Path) -> None:
    table = tmp_path / "new.csv"  # the columns of training and more
    table.write_text("id,text,label\n7,a b c,x\n8,,\n9,j k l,\n")
    out = ["--out", str(tmp_path / "out")]
    same = script("predict.py", directory, "classify", "--file", str(table), "--out", str(table))
    assert b"is the file that is read" in same.stderr
    done = script("predict.py", directory, "classify", "--file", str(table), *out)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [answer.pop("label", None) for answer in answers] == ["1", None, "0"]
    assert [(answer["line"], answer["id"]) for answer in answers] == [(2, "7"), (3, "8"), (4, "9")]
    assert answers[0]["given_label"] == "x"
    assert "field 'text' is empty" in answers[1]["error"]
    assert b"1 of 3 have no answer" in done.stderr


@pytest.mark.slow
def test_standard_input_and_evaluation(directory: Path, folder: Path) -> None:
    used = ["--file", "-", "--out", str(folder / "dev.csv")]  # which stays as it is
    done = script("predict.py", directory, "classify", *used, given=b"a b c\n\xff\n")
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
    assert b"standard input:2: byte 0xff" in done.stderr
    done = script("evaluate.py", directory, "--data", str(folder / "dev.csv"))
    assert done.returncode == 0, done.stderr
    assert b"accuracy" in done.stdout
    written = directory / "eval" / "dev"
    assert json.loads((written / "eval.json").read_text())["accuracy"] > 0.9
    for name in ("confusion.png", "reliability.png"):
        assert (written / name).is_file()
