"""A model that learns to write one text for another: trained, averaged, evaluated, asked."""

import importlib
import io
import itertools
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.labelled.records import JsonLines
from jaxlm.data.labelled.seq2seq import Pair, PairFields
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.decode.beam import BeamConfig
from jaxlm.decode.generate import GenerateConfig, Generation
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs import base as bases
from jaxlm.runs import finetuned, steps, writing
from jaxlm.runs.answers import say_long
from jaxlm.runs.embedder import open_embedder
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.folder import CHECKPOINTS, SOURCE_TOKENIZER, TOKENIZER
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.seq2seq import TRANSLATIONS, Seq2Seq
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import list_steps
from jaxlm.train.state import TrainState

WORDS = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß"}
MODEL = TransformerConfig(num_layers=1, hidden_dim=32, num_heads=2, mlp_dim=64, dropout_rate=0.0)


def make_config(folder: Path) -> FinetuneConfig:
    """One to three words, and the other words for them the other way round."""
    sources = [words for n in (1, 2, 3) for words in itertools.product(WORDS, repeat=n)]
    targets = [[WORDS[word] for word in reversed(words)] for words in sources]
    for side, texts in (("en", sources), ("de", targets)):
        (folder / f"a.{side}").write_text("".join(f"{' '.join(text)}\n" for text in texts))
    return FinetuneConfig(
        name="tiny",
        runs=folder,
        data=LabelledConfig(
            train=ParallelText(source=str(folder / "a.en"), target=str(folder / "a.de")),
            batch_size=8,
            batch_tokens=256,
            num_buckets=1,
        ),
        task=Seq2Seq(label_smoothing=0.1, num_samples=1, num_scored=5, sample_tokens=12),
        model=MODEL,
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        optimizer=OptimizerConfig(peak_lr=0.01, schedule="inverse_sqrt", warmup_steps=20),
        train=TrainConfig(steps=20, num_evals=2),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """Sources have a tokenizer of their own, which those of the slow runs share with targets."""
    sources = TokenizerConfig(vocab_size=60)
    config = make_config(tmp_path_factory.mktemp("translate"))
    return replace(config, source_tokenizer=sources)


@pytest.fixture(scope="module")
def printed(config: FinetuneConfig) -> str:
    """What a run says that is trained a little."""
    out = io.StringIO()
    finetune(config, console=Console(file=out, width=300))
    return out.getvalue()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def evaluations(config: FinetuneConfig) -> list[dict]:
    lines = read_jsonl(config.directory / "metrics.jsonl")
    return [line for line in lines if "eval/loss" in line]


def test_a_run_says_what_it_reads_and_writes(config, printed) -> None:
    (shapes,) = [li for li in printed.splitlines() if li.startswith("note: batches of ")]
    assert "tokens, " in shapes
    assert "of which are padding" in shapes
    first, *_, last = evaluations(config)
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/perplexity"] == pytest.approx(np.exp(last["eval/loss"]), rel=1e-4)
    names = {"eval/accuracy", "eval/bleu", "eval/chrf"}
    assert names <= last.keys()
    samples = rows_of(config.directory / "samples.jsonl")
    assert [one["step"] for one in samples] == [0, 10, 20]
    said = printed.splitlines()
    shown = said.index(f"  {samples[-1]['prompt']} → {samples[-1]['response'] or '(nothing)'}")
    assert said[shown + 1] == f"    wanted: {samples[-1]['wanted']}"
    assert "the source copied" in printed
    for side in ("sources", "targets"):
        assert f"{side}: 0.00% of the tokens are unknown, 0.00% are cut" in printed
    batch_sizes = {8, 16, 32, 64}  # as many rows as 256 tokens allow
    assert any(f"batches of {rows} x " in shapes for rows in batch_sizes)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """Those that evaluate and ask a run, which is read once for all of a test."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    monkeypatch.setattr(finetuned, "open_finetuned", cache(finetuned.open_finetuned))
    return [importlib.import_module(name) for name in ("evaluate", "predict")]


def test_it_is_evaluated_and_asked(config, printed, scripts, capsys) -> None:
    evaluate, predict = scripts
    folder, run = config.runs, config.directory
    (folder / "b.en").write_text("red\nwhite\n\nblue\n\n \n")
    capsys.readouterr()
    with pytest.raises(InputError, match=r"b\.en is one side alone: give the other with --target"):
        evaluate.main(run, data=folder / "b.en")
    evaluate.main(run, data=folder / "a.en", target=folder / "a.de", rows=4)
    said = capsys.readouterr().out
    assert "4 examples of " in said
    assert "  bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in said
    found = json.loads((run / "eval" / "a-rows-4" / "eval.json").read_text())
    assert found["chrf_signature"].startswith("nrefs:1|")
    rows = rows_of(run / "eval" / "a-rows-4" / TRANSLATIONS)
    assert [(one["source"], one["reference"]) for one in rows] == list(WORDS.items())
    written = {one["source"]: " ".join(one["translation"].split()) for one in rows}

    out = folder / "b.de"
    predict.main(run, "translate", file=folder / "b.en", out=out)
    # Line n for line n, to the last.
    expected = [written["red"], written["white"], "", written["blue"], "", ""]
    assert out.read_text().splitlines() == expected
    said = capsys.readouterr()
    assert "3 of 6 have no answer; the first: " in said.err
    assert f"6 lines in {out}" in said.out
    predict.main(run, "translate", file=folder / "b.en", out=folder / "b.jsonl")
    answers = rows_of(folder / "b.jsonl")
    assert [one["line"] for one in answers] == [1, 2, 3, 4]
    assert "'source' is empty" in answers[2]["error"]
    assert " ".join(answers[3]["translation"].split()) == written["blue"]


def test_a_run_has_both_tokenizers(config, printed, capsys) -> None:
    loaded = finetuned.open_finetuned(config.directory)
    source, target = loaded.source_tokenizer, loaded.tokenizer
    assert source is not None
    assert source.encode("white red").tokens == ["[CLS]", "white", "red", "[SEP]"]
    assert len(target.encode("rot").ids) < len(target.encode("red").ids)  # it learned targets
    model = loaded.config.model
    assert (model.source_vocab_size, model.vocab_size) == (64, 320)
    examples = [replace(PAIRS[0], source=text) for text in (126 * "red ", 127 * "red ", "blue")]
    say_long(*loaded.cut(examples))
    assert capsys.readouterr().err == "note: 1 of 3 texts are cut at 128 tokens, as in training\n"
    ids = loaded.responder.prompt(replace(PAIRS[0], source="red white"))
    reader = loaded.responder.generate.model
    assert reader.shown(ids) == "red white"
    assert reader.source("red white") == ids


def test_a_translation_run_is_neither_a_base_nor_an_encoder(config, printed) -> None:
    run = str(config.directory)
    with pytest.raises(
        InputError, match=r"is a fine-tuned run, .* \(more --train\.steps, and --acc"
    ):
        bases.load(run)
    with pytest.raises(InputError, match=r"whose head cannot embed: use translate$"):
        open_embedder(run)


def test_another_tokenizer_of_sources_is_refused(config, printed, tmp_path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(config.directory, moved)
    shutil.copy(moved / TOKENIZER, moved / SOURCE_TOKENIZER)
    with pytest.raises(InputError, match=r"source_tokenizer\.json .* is not the tokenizer that"):
        finetuned.open_finetuned(moved)
    (moved / SOURCE_TOKENIZER).unlink()
    with pytest.raises(InputError, match=r"it has no source_tokenizer\.json"):
        finetuned.open_finetuned(moved)
    other = replace(config, source_tokenizer=TokenizerConfig(vocab_size=40))
    with pytest.raises(InputError, match="was trained with source_tokenizer_sha256 "):
        finetune(other, console=quiet())


@pytest.mark.slow
def test_sources_that_are_cut_are_said(config, printed, scripts, capsys) -> None:
    """In an evaluation, in predictions for a file, and for one text."""
    evaluate, predict = scripts
    folder, run = config.runs, config.directory
    (folder / "long.en").write_text("red\n" + 200 * "red " + "\nblue\n")
    (folder / "long.de").write_text("rot\nrot\n" + 200 * "blau " + "\n")
    few = GenerateConfig(max_new_tokens=12)
    predict.main(run, "translate", file=folder / "long.en", out=folder / "out.de", generate=few)
    said = "texts are cut at 128 tokens, as in training"
    assert f"1 of 3 {said}" in capsys.readouterr().err
    predict.main(run, "translate", 200 * "red ", generate=few)
    assert f"1 of 1 {said}" in capsys.readouterr().err
    sides = {"data": folder / "long.en", "target": folder / "long.de"}
    evaluate.main(run, **sides, generate=few)
    assert f"2 of 3 {said}" in capsys.readouterr().err


def test_files_are_read_in_the_encoding_of_training(config, tmp_path, scripts) -> None:
    evaluate, predict = scripts
    source, target = tmp_path / "x.en", tmp_path / "x.de"
    source.write_bytes("café\n".encode("latin-1"))
    target.write_bytes("für\n".encode("latin-1"))
    latin = ParallelText(source="a.en", target="a.de", encoding="latin-1")
    run = SimpleNamespace(config=replace(config, data=replace(config.data, train=latin)))
    run.task = config.task
    (record,) = predict.read_records(latin, (), ("source",), source)
    assert record.fields == {"source": "café"}
    (record,) = evaluate.records_of(run, source, target)
    assert record.fields == {"source": "café", "target": "für"}
    with pytest.raises(InputError, match="is not UTF-8"):  # the control
        next(predict.read_records(config.data.train, (), ("source",), source))


def test_beams_are_evaluated_and_shown(config, printed, scripts, capsys) -> None:
    evaluate, predict = scripts
    folder, run = config.runs, config.directory
    beam = BeamConfig(size=3, n_best=2, max_new_tokens=12)
    (folder / "c.en").write_text("red\nwhite\nblue\ngreen\n")
    predict.main(run, "translate", file=folder / "c.en", out=folder / "c.jsonl", beam=beam)
    answers = rows_of(folder / "c.jsonl")
    for one in answers:
        first, second = one["n_best"]
        assert first["score"] == one["score"] > second["score"]
        assert first["text"] == one["translation"]
    best = [" ".join(one["translation"].split()) for one in answers]
    predict.main(run, "translate", file=folder / "c.en", out=folder / "c.de", beam=beam)
    assert (folder / "c.de").read_text().splitlines() == best
    predict.main(run, "translate", file=folder / "c.en", out=folder / "c.csv", beam=beam)
    assert "score" in (folder / "c.csv").read_text().splitlines()[0]
    evaluate.main(run, data=folder / "c.en", target=folder / "c.en", beam=beam)
    rows = rows_of(
        run / "eval" / "c-beam.size-3-beam.n_best-2-beam.max_new_tokens-12" / TRANSLATIONS
    )
    assert [" ".join(one["translation"].split()) for one in rows] == best
    capsys.readouterr()
    predict.main(run, "translate", "red", beam=beam)
    lines = capsys.readouterr().out.splitlines()
    scores = [one["score"] for one in answers[0]["n_best"]]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(scores, abs=1e-3)
    told = GenerateConfig(max_new_tokens=3)
    with pytest.raises(InputError, match=r"generate and beam \(size=3\) are two ways to write"):
        predict.main(run, "translate", "red", beam=beam, generate=told)
    with pytest.raises(InputError, match=r"--beam.size 3 compares whole texts"):
        predict.main(run, "translate", "red", beam=beam, stream=True)


@pytest.mark.slow
def test_a_model_learns_to_translate(tmp_path, scripts, capsys) -> None:
    """It is the mean of two checkpoints."""
    config, (evaluate, predict) = make_config(tmp_path), scripts
    data = replace(config.data, num_buckets=2)
    task = replace(config.task, num_scored=None)
    train = replace(config.train, steps=120, num_evals=4, average=2)
    run = finetune(replace(config, data=data, task=task, train=train), console=Console(width=300))
    assert evaluations(config)[-1]["eval/chrf"] > 90
    said = "the mean of the checkpoints of steps 90, 120, which is used from now on: loss "
    assert said in capsys.readouterr().out
    evaluate.main(run)
    said = capsys.readouterr().out
    assert (
        "at the mean of 2 checkpoints, steps 90 to 120, 8 examples of its validation data" in said
    )
    assert json.loads((run / "eval.json").read_text())["averaged"] == [90, 120]
    predict.main(run, "translate", "blue red white")
    assert capsys.readouterr().out == "weiß rot blau\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "places", [{}, {"placement": "pmap"}, {"mesh": MeshConfig(fsdp=2, tensor=2)}], ids=str
)
def test_resumed_in_the_middle_of_an_epoch_it_is_the_same_run(tmp_path, places) -> None:
    """With batches of several sizes."""
    config = make_config(tmp_path)
    data, train = replace(config.data, num_buckets=3), replace(config.train, save_every=7, keep=9)
    whole = replace(config, name="whole", data=data, train=train, **places)
    finetune(whole, console=quiet())
    resumed = replace(whole, name="resumed")
    shutil.copytree(whole.directory, resumed.directory)
    for step in list_steps(resumed.directory / CHECKPOINTS):
        if step > 7:
            shutil.rmtree(resumed.directory / CHECKPOINTS / str(step))
    finetune(resumed, console=quiet())
    losses = [[one["eval/loss"] for one in evaluations(run)] for run in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    read = [finetuned.open_finetuned(run.directory).state.trainable for run in (whole, resumed)]
    for a, b in zip(*map(jax.tree.leaves, read), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def quiet() -> Console:
    return Console(quiet=True)


def generation(text: str) -> Generation:
    return Generation(
        prompt="x", text=text, tokens=[1, 2], log_probabilities=[-1.0, -0.5], stopped="stop_token"
    )


class Told:
    """Stands in for a responder; it writes the sources in capitals, and keeps what it was asked."""

    def __init__(self, config: FinetuneConfig):
        self.framer = type("Framer", (), {"max_length": 64})
        self.asked, self.limits = [], []

    def respond(self, examples, config, *, room=None):
        self.asked.append([one.source for one in examples])
        self.limits.append(config.max_new_tokens)
        return (generation(one.source.upper()) for one in examples)


PAIRS = [
    Pair(source=c, target=c.upper() if c != "b" else "x y z w", origin=f"x:{c}") for c in "abc"
]


@pytest.mark.parametrize(
    ("num_samples", "num_scored", "asked"), [(1, 2, 2), (2, 1, 2), (2, 0, 2), (0, None, 3)]
)
def test_what_is_written_at_an_evaluation(tmp_path, num_samples, num_scored, asked) -> None:
    task = Seq2Seq(num_samples=num_samples, num_scored=num_scored, sample_tokens=7)
    config = replace(make_config(tmp_path), task=task)
    config.directory.mkdir(parents=True)
    told = Told(config)
    samples = writing.make_samples(config, lambda variables: told, PAIRS, 80)
    found = samples(TrainState(jnp.asarray(3), {}, {}, ()))
    assert told.asked == [["a", "b", "c"][:asked]]
    assert told.limits == [7]
    assert len(found.written) == (3 if num_scored is None else num_scored)
    shown = ["  a → A", "    wanted: A", "  b → B", "    wanted: x y z w"]
    assert found.lines == shown[: 2 * num_samples]


def test_samples_of_texts_with_ends_of_lines_are_kept(tmp_path) -> None:
    """Also of those that JSON does not escape, at which str.splitlines cuts."""
    config = replace(make_config(tmp_path), task=Seq2Seq(num_samples=1, num_scored=1))
    config.directory.mkdir(parents=True)
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\nj"
    samples = writing.make_samples(
        config, lambda variables: Told(config), [Pair(source=text, target=text, origin="x:1")], 80
    )
    for step in (3, 7):
        samples(TrainState(jnp.asarray(step), {}, {}, ()))
    found = rows_of(config.directory / writing.SAMPLES)
    assert [one["step"] for one in found] == [3, 7]
    assert {(one["prompt"], one["response"], one["wanted"]) for one in found} == {
        (text, text.upper(), text)
    }


def outputs(*texts: str) -> dict:
    """Of targets of one and two tokens, and of another that does not count."""
    found = {
        "losses": [np.array([1.0, 9.0]), np.array([2.0, 3.0]), np.array([0.0])],
        "correct": [np.array([1, 1]), np.array([0, 0]), np.array([1])],
        "weights": [np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([0.0])],
    }
    return found | ({"written": [generation(text) for text in texts]} if texts else {})


def test_metrics() -> None:
    task = Seq2Seq()
    found = task.metrics(PAIRS, (), outputs())
    assert found == {"perplexity": pytest.approx(np.exp(2.0)), "accuracy": pytest.approx(1 / 3)}
    long = [replace(one, target=" ".join(["w", "x", "y", "z", one.source])) for one in PAIRS]
    right = [str(one.target) for one in long]
    found = task.metrics(long, (), outputs(*right))
    assert tuple(found) == task.metric_names(long, ())
    assert [found["bleu"], found["chrf"]] == pytest.approx([100, 100])
    worse = task.metrics(long, (), outputs(*right[:2], "w x y"))
    assert all(50 < value < 95 for value in (worse["bleu"], worse["chrf"]))
    # Of fewer that are written only these are compared.
    assert task.metrics(long, (), outputs(*right[:2]))["bleu"] == pytest.approx(100)
    # As where a model has diverged and writes nothing.
    assert np.isnan(task.metrics(long, (), outputs() | {"written": []})["bleu"])
    assert Seq2Seq(num_scored=0).metric_names(PAIRS, ()) == ("perplexity", "accuracy")
    assert task.baselines(PAIRS, [replace(long[0], source="w x y z a")], ()) == {
        "the source copied": {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    }
    assert Seq2Seq(num_scored=0).baselines(PAIRS, PAIRS, ()) == {}


def test_the_most_wrong_are_those_of_unlikely_targets() -> None:
    weights = [np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([1.0])]
    found = Seq2Seq().predictions(PAIRS, (), outputs("A", "B", "d") | {"weights": weights})
    assert [one.loss for one in found] == [1.0, 2.5, 0.0]
    assert [(one.gold, one.predicted, one.right) for one in found] == [
        ("A", "A", True),
        ("x y z w", "B", False),
        ("C", "d", False),
    ]
    assert Seq2Seq().predictions(PAIRS, (), outputs()) == []


def test_sources_that_are_their_targets_are_said() -> None:
    same = Pair(source="q", target="q", origin="x:9")
    (line,) = Seq2Seq().check([*PAIRS, same])
    assert line == "1 of 4 sources, first that of x:9, are their own targets, and teach to copy"
    assert Seq2Seq().check(PAIRS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": PairFields(target=None)}, "task.fields.target is None: name the field"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is not inside \[0, 1\)"),
        ({"num_scored": -1}, "task.num_scored=-1 is below 0; 0 is none"),
        ({"num_samples": -2}, "task.num_samples=-2 is below 0; 0 is none"),
        ({"sample_tokens": 0}, "task.sample_tokens=0 is not above 0"),
    ],
)
def test_impossible_tasks(change, message) -> None:
    with pytest.raises(InputError, match=message):
        Seq2Seq(**change)


SOURCES = TokenizerConfig(vocab_size=60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "b", "model": None, "tokenizer": None}, "source_tokenizer is given, and also ba"),
        ({"task": Instruction()}, "task=Instruction reads all with tokenizer: leave it out"),
    ],
)
def test_where_there_is_no_tokenizer_of_sources(tmp_path, changes, message) -> None:
    config = replace(make_config(tmp_path), source_tokenizer=SOURCES)
    with pytest.raises(InputError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("model", "source_size", "message"),
    [
        (T5Config(), 9, "a T5Config has one vocabulary for all it reads and writes: leave it out"),
        (replace(MODEL, source_vocab_size=8), None, "source_vocab_size=8 is for sources with a to"),
        (replace(MODEL, source_vocab_size=8), 9, "model.source_vocab_size=8 is smaller than the"),
    ],
)
def test_models_and_vocabularies_that_do_not_fit(model, source_size, message) -> None:
    with pytest.raises(InputError, match=message):
        steps.with_vocabulary(model, 20, MeshConfig(), source_size)


def test_flops_are_of_both_sides_and_of_the_vocabulary() -> None:
    gpt2 = Gpt2Config(vocab_size=64, num_layers=1, hidden_dim=32, num_heads=2, mlp_dim=64)
    sides = (Seq2Seq(), replace(MODEL, vocab_size=64), 2), (Instruction(), gpt2, 1)
    for task, model, count in sides:
        data = LabelledConfig(train=JsonLines(path="x"))
        train = TrainConfig(steps=1)
        config = FinetuneConfig(name="x", data=data, task=task, model=model, train=train)
        expected = 3 * model.forward_flops(16, 16) / (16 * count)
        assert finetuned.flops_per_token(config, {}, 16) == expected


def test_a_model_without_a_decoder_is_refused() -> None:
    with pytest.raises(InputError, match="BertConfig is one of them alone: use --model Transfo"):
        Seq2Seq().make_model(BertConfig(vocab_size=32), (), 0.0)
