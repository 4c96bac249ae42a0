"""Encoders as they are published, and what the scripts make of them."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_xlnet
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny_models import BERT

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig
from jaxlm.convert import huggingface, sentence_encoder
from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Record, Table
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.runs import base, finetuning, resume
from jaxlm.runs.embedder import open_embedder
from jaxlm.runs.finetuning import resolve
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.tagging import Tagging
from jaxlm.train.loop import TrainConfig

ROOT = Path(__file__).parents[2]
TEXTS = ["a b c", "d", "a b c d a b c d a b c d a b", "b a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder that reads eight tokens of a text, special ones among them."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "vocab.txt").write_text("\n".join([*tokenizers.SPECIALS, *"abcd"]) + "\n")
    tokenizer = tokenizers.load(folder / "vocab.txt")
    config = replace(BERT, vocab_size=16, num_layers=1, max_length=32)
    params = config.make().init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    huggingface.save(folder / "model", {"encoder": params}, config, tokenizer)
    return folder / "model"


@pytest.fixture
def pooled(folder: Path, tmp_path: Path):
    """The folder, as that of a sentence encoder."""

    def pooled(pooling: str, *, normalized: bool = True, **prompts: str) -> Path:
        path = tmp_path / f"{pooling}{normalized}"
        path.mkdir()
        for file in folder.iterdir():
            (path / file.name).symlink_to(file)
        sentence_encoder.write(path, pooling, 16, 8, prompts, next(iter(prompts), None))
        if not normalized:
            modules = json.loads((path / "modules.json").read_text())
            (path / "modules.json").write_text(json.dumps(modules[:2]))
        return path

    return pooled


def hidden(folder: Path, text: str, length: int) -> np.ndarray:
    """Of one text alone, without padding."""
    published = huggingface.load(folder)
    ids = published.tokenizer.encode(text, add_special_tokens=False).ids[: length - 2]
    special = SpecialTokens.of(published.tokenizer)
    tokens = jnp.array([[special.cls, *ids, special.sep]])
    params = jax.tree.map(jnp.asarray, published.params["encoder"])
    return np.asarray(published.config.make().apply({"params": params}, tokens))[0]


POOLED = {
    "cls": lambda x: x[0],
    "last": lambda x: x[-1],
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0),
}


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pooling", POOLED)
def test_vectors_are_as_the_folder_says(pooling, normalized, pooled):
    folder, said = pooled(pooling, normalized=normalized), []
    embedder = open_embedder(str(folder), report=said.append)
    vectors = embedder(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        expected = POOLED[pooling](hidden(folder, text, 8))
        expected = expected / np.linalg.norm(expected) if normalized else expected
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert embedder.about.startswith(f"pooling: {pooling}, {'' if normalized else 'not '}scaled")
    assert said == ["1 of 4 texts are cut at 8 tokens"]


def test_vectors_that_are_not_finite_are_none(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name].copy()
    weights[name][tokenizers.load(folder).token_to_id("d")] = np.nan
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    embedder = open_embedder(str(tmp_path / "m"))
    texts = [Record(fields={"text": text}, origin="x:1") for text in ("a", "d", "b")]
    _, (_, broken), (_, whole) = embedder.stream(texts)
    assert "weights token_embed/embedding are not: copy or download" in broken["error"]
    assert np.isfinite(whole["embedding"]).all()
    with pytest.raises(InputError, match="what the model gives is not finite"):
        embedder(["d"])


def test_a_dense_layer_follows_the_pooling(pooled, folder):
    path = pooled("mean")
    kernel = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    for settings, weights, expected in (
        ({}, {"linear.weight": kernel.T, "linear.bias": kernel[0]}, np.tanh),
        ({"activation_function": "torch.nn.modules.linear.Identity"}, {}, lambda x: x),
    ):
        modules = [*json.loads((path / "modules.json").read_text())[:2]]
        modules += [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "2_Dense").mkdir(exist_ok=True)
        (path / "2_Dense" / "config.json").write_text(json.dumps(settings))
        weights = {"linear.weight": np.ascontiguousarray(kernel.T)} | weights
        weights = {name: np.ascontiguousarray(x) for name, x in weights.items()}
        save_file(weights, path / "2_Dense" / "model.safetensors")
        embedder = open_embedder(str(path))
        assert embedder.about.startswith("pooling: mean, 6 by a Dense layer, not scaled, as the f")
        bias = weights.get("linear.bias", np.zeros(6))
        mean = hidden(folder, "a b", 8).mean(0)
        np.testing.assert_allclose(embedder(["a b"])[0], expected(mean @ kernel + bias), atol=1e-5)
    loaded = base.load(str(path))
    with pytest.raises(InputError, match=r"with a Dense layer, which is .* --task\.pooling mean"):
        resolve(tuned(path, Embedding()), loaded, loaded.tokenizer, "cpu")
    (path / "2_Dense" / "config.json").write_text('{"activation_function": "x.Softsign"}')
    with pytest.raises(InputError, match="with a Dense layer with Softsign, which is not suppor"):
        open_embedder(str(path))


def test_vectors_are_cut_after_they_are_scaled(pooled):
    path = pooled("mean", query="d ")
    whole = open_embedder(str(path))(TEXTS)
    settings = path / "config_sentence_transformers.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps(said | {"truncate_dim": 5}))
    embedder = open_embedder(str(path))
    np.testing.assert_allclose(embedder(TEXTS), whole[:, :5], atol=1e-6)
    assert "pooling: mean, scaled to length 1, cut to the first 5 numbers, as the" in embedder.about
    loaded = base.load(str(path))
    with pytest.raises(InputError, match=r"a cut to the first 5 numbers, .* --task\.pooling mean"):
        resolve(tuned(path, Embedding()), loaded, loaded.tokenizer, "cpu")
    for task in (Classification(), MultipleChoice(), Embedding(pooling="mean")):
        found = resolve(tuned(path, task), loaded, loaded.tokenizer, "cpu").task
        assert vars(found)["pooling"] == "mean"


def test_prompts_stand_before_texts(pooled):
    folder = pooled("mean", query="d d ", passage="")
    plain = open_embedder(str(folder)).with_prompt("")
    for embedder, prompt in (
        (open_embedder(str(folder)), "d d "),  # the folder's default
        (plain.with_prompt("query"), "d d "),
        (plain.with_prompt(None), ""),
        (plain.with_prompt(None, "other", "query"), "d d "),
        (open_embedder(str(folder)).with_prompt("passage"), ""),
    ):
        expected = plain([prompt + text for text in TEXTS])
        np.testing.assert_array_equal(embedder(TEXTS), expected)
        (one,) = embedder.stream([Record(fields={"text": "a"}, origin="x")])
        np.testing.assert_allclose(one[1]["embedding"], plain([f"{prompt}a"])[0], atol=1e-6)
        assert one[1]["text"] == "a"
    with pytest.raises(
        InputError, match=r"no prompt 'q', but query \('d d '\), passage \(''\); ''"
    ):
        plain.with_prompt("q")
    task = Embedding()
    loaded = base.load(str(folder))
    resolved = [
        resolve(tuned(folder, one), loaded, loaded.tokenizer, "cpu").task
        for one in (task, replace(task, prompt=""), replace(task, prompt="a", pair_prompt="b"))
    ]
    assert [(one.prompt, one.prompts) for one in resolved] == [
        ("d d ", {"query": "d d ", "document": "d d "}),
        ("", {}),
        ("a", {"query": "a", "document": "b"}),
    ]


def test_long_texts_do_not_need_the_square_of_their_length(folder, tmp_path):
    published = huggingface.load(folder)
    table = np.tile(published.params["encoder"]["position_embed"]["embedding"], (32, 1))
    encoder = published.params["encoder"] | {"position_embed": {"embedding": table}}
    config = replace(published.config, max_length=1024)
    huggingface.save(tmp_path / "long", {"encoder": encoder}, config, published.tokenizer)
    embedder = open_embedder(str(tmp_path / "long"))
    assert "; attention: blockwise, faster than plain on a CPU" in embedder.about
    np.testing.assert_allclose(embedder(TEXTS), open_embedder(str(folder))(TEXTS), atol=1e-5)


def test_an_encoder_that_says_nothing_gives_means(folder):
    embedder, said = open_embedder(str(folder)), "pooling: mean, scaled to length 1 (nothing says"
    assert embedder.about.startswith(said)
    assert "; attention: plain, rows of up to 32 tokens" in embedder.about
    mean = hidden(folder, TEXTS[2], 32).mean(0)
    np.testing.assert_allclose(embedder(TEXTS)[2], mean / np.linalg.norm(mean), atol=1e-5)


def test_what_is_not_supported_is_refused(pooled):
    folder = pooled("mean")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "weightedmean"}')
    with pytest.raises(InputError, match="pooling by weightedmean, which is not supported"):
        open_embedder(str(folder))
    loaded = base.load(str(folder))
    with pytest.raises(InputError, match=r"choose how, such as --task\.pooling mean"):
        resolve(tuned(folder, Classification()), loaded, loaded.tokenizer, "cpu")
    for task in (Classification(pooling="mean", head_bias=True), Tagging()):
        config = resolve(tuned(folder, task), loaded, loaded.tokenizer, "cpu")
        assert config.task == task
    for wrong in ({"step": 3}, {"base": "x"}):
        with pytest.raises(InputError, match="leave it out"):
            open_embedder(str(folder), **wrong)


# Fine-tuning.


def test_a_causal_base_pools_the_last_token(pooled, folder):
    loaded = base.load(str(folder))
    causal = replace(loaded, config=Gpt2Config(vocab_size=16))
    for task in (Classification(), Embedding(), MultipleChoice()):
        config = resolve(tuned(folder, task), causal, loaded.tokenizer, "cpu")
        assert vars(config.task)["pooling"] == "last"
    for first in ("bert", "cls"):
        with pytest.raises(InputError, match=f"pooling={first} takes the first token"):
            resolve(tuned(folder, Classification(pooling=first)), causal, loaded.tokenizer, "cpu")


def test_where_the_classifying_token_is_last_it_is_pooled(folder):
    loaded, tokenizer = base.load(str(folder)), tiny_xlnet.tokenizer()
    xlnet = replace(loaded, config=XlnetConfig(vocab_size=64), tokenizer=tokenizer)
    for task in (Classification(), Embedding(), MultipleChoice()):
        config = resolve(tuned(folder, task), xlnet, tokenizer, "cpu")
        assert vars(config.task)["pooling"] == "last"
    message = "pooling=cls takes the first token, and this tokenizer puts its classifying token las"
    with pytest.raises(InputError, match=message):
        resolve(tuned(folder, Classification(pooling="cls")), xlnet, tokenizer, "cpu")
    config = resolve(tuned(folder, Classification(pooling="mean")), xlnet, tokenizer, "cpu")
    assert vars(config.task)["pooling"] == "mean"


def tuned(folder: Path, task, **more) -> FinetuneConfig:
    source = Table(path=str(folder.parent / "data.csv"))
    data = LabelledConfig(train=source, batch_size=8, max_length=8, num_buckets=1)
    train = TrainConfig(steps=1, num_evals=1)
    return FinetuneConfig(
        name="run", runs=folder.parent, base=str(folder), data=data, task=task, train=train, **more
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Classification(), {"cls": "cls", "mean": "mean", None: "bert"}),
        (MultipleChoice(), {"cls": "cls", "mean": "mean", None: "bert"}),
        (Embedding(), {"cls": "cls", "mean": "mean", None: "mean"}),
        (Classification(pooling="max"), {"cls": "max", "mean": "max", None: "max"}),
    ],
)
def test_a_task_pools_as_its_base(task, expected, pooled, folder):
    for says, pooling in expected.items():
        path = folder if says is None else pooled(says)
        loaded = base.load(str(path))
        config = resolve(tuned(path, task), loaded, loaded.tokenizer, "cpu")
        assert vars(config.task)["pooling"] == pooling


def test_a_run_follows_its_base_and_says_so(pooled, monkeypatch):
    folder, jobs = pooled("mean"), []
    lines = [f"{text},{i % 2}" for i, text in enumerate(TEXTS * 5)]
    (folder.parent / "data.csv").write_text("\n".join(["text,label", *lines]))
    console = Console(file=io.StringIO(), width=20)

    def train(job, _):
        jobs.append(job)
        raise InputError("it would begin here")

    monkeypatch.setattr(finetuning, "train", train)
    with pytest.raises(InputError, match="it would begin here"):
        finetuning.finetune(tuned(folder, Classification()), console=console)
    assert f"pooling: mean (the folder of {folder} says mean)\n" in console.file.getvalue()
    (job,) = jobs
    assert job.config.task == Classification(pooling="mean", head_bias=True)  # what is written
    head = job.placement.abstract_state.trainable["params"]["head"]
    assert head.keys() == {"classifier"}


def test_runs_from_before_pool_as_they_did(pooled):
    """Their configs have no such field, or the first token's."""
    folder = pooled("mean")
    config = tuned(folder, MultipleChoice())
    config.directory.mkdir()
    written = json.loads(configs.to_json(config))
    del written["task"]["pooling"]
    (config.directory / "config.json").write_text(json.dumps(written))
    cursor = {"share": 0.5, "examples_seen": 4}
    resume.check_config(
        config.directory, replace(config, task=MultipleChoice(pooling="bert")), cursor
    )
    with pytest.raises(InputError, match=r"task\.pooling=bert there and mean here"):
        resume.check_config(
            config.directory, replace(config, task=MultipleChoice(pooling="mean")), cursor
        )
    old = Classification(pooling="bert")
    assert old.with_pooling("mean") == old
    models = [task.make_model(BERT, ("a",), 0.0) for task in (Classification(), old)]
    assert models[0] == models[1]


def test_runs_from_before_have_a_bias_in_their_last_layer(pooled):
    config = tuned(pooled("mean"), Classification(pooling="last"))
    config.directory.mkdir()
    written = json.loads(configs.to_json(config))
    del written["task"]["head_bias"]
    (config.directory / "config.json").write_text(json.dumps(written))
    cursor = {"share": 0.5, "examples_seen": 4}
    now = lambda bias: replace(config, task=replace(config.task, head_bias=bias))
    resume.check_config(config.directory, now(True), cursor)
    with pytest.raises(InputError, match=r"task\.head_bias=True there and False here"):
        resume.check_config(config.directory, now(False), cursor)


# The script.


@pytest.fixture
def predict(monkeypatch, capsys):
    """Runs the script here; gives what it prints, and what it says on stderr."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew

    def predict(*words) -> tuple[list[str], str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["predict.py", *map(str, words)])
            with contextlib.suppress(SystemExit):
                runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return predict


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.csv"
    path.write_text("id,body\nx,a b c\ny,\nz,b a\nw,d d d\n")
    return path


def test_a_published_encoder_embeds_a_file(predict, pooled, corpus, tmp_path):
    folder, named = pooled("mean"), ("--column", "body")
    expected = open_embedder(str(folder))(["a b c", "b a", "d d d"])
    out, err = predict(folder, "embed", "--file", corpus, *named)
    answers = [json.loads(line) for line in out]
    assert [one["id"] for one in answers] == ["x", "y", "z", "w"]
    assert [one["line"] for one in answers] == [2, 3, 4, 5]
    vectors = [one["embedding"] for one in answers if "error" not in one]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert "pooling: mean, scaled to length 1, as the folder" in err
    assert "1 of 4 have no answer; the first: " in err
    predict(folder, "embed", "--file", corpus, *named, "--out", tmp_path / "x.npy")
    array = np.load(tmp_path / "x.npy")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[[0, 2, 3]], expected, atol=1e-6)
    assert np.isnan(array[1]).all()
    ((line,), _) = predict(folder, "embed", "a b c")
    np.testing.assert_allclose(json.loads(line)["embedding"], expected[0], atol=1e-6)
    _, err = predict(folder, "embed", "--file", corpus)
    assert "no field 'text' among 'id', 'body': name the one of the text with --column" in err


def test_the_nearest_texts_of_a_file(predict, pooled, corpus, tmp_path):
    folder, named = pooled("cls"), ("--file", corpus, "--column", "body", "--top-k", 2)
    out, err = predict(folder, "search", "b a", *named)
    assert len(out) == 2
    assert out[0] == f" 1.000  {corpus}:4  b a"
    assert "searched 3 texts" in err
    predict(folder, "search", "b a", *named, "--out", tmp_path / "found.jsonl")
    first, second = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (first["line"], first["id"], first["text"]) == (4, "z", "b a")
    assert second["score"] < first["score"] == pytest.approx(1)
    _, err = predict(folder, "search", "b a")
    assert "search finds the texts of --file that are nearest to a text: give both" in err
    prompts = pooled("max", query="d d ", document="c ")
    out, err = predict(prompts, "search", "b a", *named)
    assert "; prompts: 'd d ', of the file's 'c '" in err
    embedder = open_embedder(str(prompts))
    query = embedder.with_prompt("query")(["b a"])[0]
    scores = embedder.with_prompt("document")(["a b c", "b a", "d d d"]) @ query
    assert [float(line.split()[0]) for line in out] == pytest.approx(
        sorted(scores)[:0:-1], abs=1e-3
    )
    out, err = predict(prompts, "search", "b a", *named, "--prompt", "", "--file-prompt", "")
    assert out[0] == f" 1.000  {corpus}:4  b a"
    _, err = predict(prompts, "embed", "a", "--prompt", "passage")
    assert "there is no prompt 'passage', but query ('d d '), document ('c ')" in err
    (tmp_path / "texts.txt").write_text("d\n\nb a\n\n")
    out, _ = predict(folder, "search", "b a", "--file", tmp_path / "texts.txt")
    assert [line.rpartition(":")[2] for line in out] == ["3  b a", "1  d"]
