"""What is exported answers without jaxlm, as jaxlm answers."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny_xlnet
from flax.traverse_util import flatten_dict, unflatten_dict
from golden import make_served_golden
from tiny_heads import drawn, said, tokenizer
from tiny_models import BERT
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface, stablehlo
from jaxlm.data import tokenizers
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.loader import DataConfig
from jaxlm.errors import InputError
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import finetuned, model_card, pretrained, published_task, serving
from jaxlm.runs.embedder import open_embedder
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.pretrained import Pretrained
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.tasks.vocabulary import make_vocabulary
from jaxlm.train.loop import TrainConfig

# Packages that a server need not have; the import of one is an error.
FORBIDDEN = (
    *("jaxlm", "flax", "optax", "orbax", "einops", "jaxtyping", "safetensors", "huggingface_hub"),
    *("torch", "transformers", "tensorflow_datasets", "grain"),
)
ALONE = f"""
import sys
from importlib.abc import MetaPathFinder

class Forbidden(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Forbidden())
import json, os
sys.path[:] = [path for path in sys.path if path]
for job in json.load(open(sys.argv[1])):
    os.chdir(job["folder"])
    for lines in job["scripts"]:
        exec(lines, {{}})
"""
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
OTHER = "JAXLM_OTHER_PYTHON"
ONE = TrainConfig(steps=1)
CONFIG = replace(BERT, num_layers=1, vocab_size=16, max_length=24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of letters, published as a sentence encoder."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "vocab.txt").write_text("\n".join([*tokenizers.SPECIALS, *"abcdefgh"]) + "\n")
    tokenizer = tokenizers.load(folder / "vocab.txt")
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(CONFIG.make().init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    path = folder / "base"
    huggingface.save(path, {"encoder": params}, CONFIG, tokenizer, pooling="mean")
    return path


def tuned(base: Path, task, labels, **more) -> FinetunedRun:
    """A run that has not learned anything, whose head and adapters are drawn."""
    data = LabelledConfig(train=Table(path="none.csv"), batch_size=8, max_length=20, num_buckets=1)
    loaded = finetuned.bases.load(str(base))
    config = FinetuneConfig(
        name="run",
        runs=base,
        base=str(base),
        data=data,
        task=task,
        dropout_rate=0.1,
        train=ONE,
        **more,
    )
    config = finetuned.with_encoder(config, loaded.config, "cpu")
    init = finetuned.make_init(config, labels)
    placement = finetuned.make_placement(config, labels, init, labelled=False)
    state = finetuned.make_state(config, labels, loaded, placement)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), state.trainable
    )
    state = replace(state, trainable=drawn, opt_state=())
    return FinetunedRun(config, loaded.tokenizer, labels, state, placement, placement, {}, (0,))


def blanks(base: Path) -> Pretrained:
    loaded = finetuned.bases.load(str(base))
    masking = MaskedLm(eval_masking=MaskingConfig())
    config = PretrainConfig(
        name="run",
        data=DataConfig(paths=("x",)),
        model=CONFIG,
        task=masking,
        train=ONE,
    )
    variables = pretrained.make_model(config).init(jax.random.key(3), jnp.zeros((1, 8), jnp.int32))
    variables["params"]["encoder"] = jax.tree.map(jnp.asarray, loaded.encoder)
    placement = pretrained.make_placement(config, make_vocabulary(loaded.tokenizer))
    return Pretrained(config, loaded.tokenizer, 0, variables, {}, placement, (0,))


CLASSES = Classification(fields=TextFields(pair="pair"), pooling="bert")
LORA = LoraConfig(targets=(r"(query|value)/kernel",), rank=2)
PAIRS = [("a b", "c"), ("d", "e f g h a b c d"), ("h " * 14, "g " * 12), ("a", "a")]
WORDS = ["a b . c", "d", "e f g h a b c d"]
QUESTIONS = [("a", "b c d e"), ("b c", "a h"), ("d", "e f g h a b c d e f")]
BLANKS = ["a [MASK] b", "[MASK]", "a b c d e f [MASK] h"]


@pytest.fixture(scope="module")
def answers(base: Path, tmp_path_factory: pytest.TempPathFactory):
    """What every artefact prints, alone and in batches of unequal lengths."""
    pytest.importorskip("flatbuffers")
    folder = tmp_path_factory.mktemp("artefacts")
    runs = {
        "classify": (tuned(base, CLASSES, ("no", "yes", "so"), tuning=LORA), PAIRS),
        "tag": (tuned(base, Tagging(split="space"), ("O", "B-X", "I-X")), WORDS),
        "answer": (tuned(base, QuestionAnswering(doc_stride=1, null_threshold=4.0), ()), QUESTIONS),
        "fill-mask": (blanks(base), BLANKS),
    }
    served = {name: (serving.served(run), texts) for name, (run, texts) in runs.items()}
    served["embed"] = (serving.open_served(str(base)), WORDS)
    jobs = []
    for name, (one, texts) in served.items():
        jaxtyping.config.update("jaxtyping_disable", True)  # a symbolic length is no int
        try:
            serving.write(name, folder / name, one)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)
        given = [text.split() if name == "tag" else text for text in texts]
        jobs.append((folder / name, batches(given)))
    return dict(zip(served, alone(sys.executable, folder, jobs), strict=True)), runs


def batches(texts):
    """All of them, one alone, and the others: of unequal sizes and lengths."""
    return texts, texts[:1], texts[1:]


def alone(python, place, jobs):
    """What artefacts make of batches, each by the lines of its README, under a Python."""
    written = []
    for folder, given in jobs:
        readme = (folder / "README.md").read_text()
        (lines,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
        scripts, (*head, last) = [lines], lines.splitlines()
        last = last.removeprefix("print(").removesuffix(")")
        for batch in given:
            own = [f"texts = {batch!r}" if line.startswith("texts =") else line for line in head]
            scripts.append(
                "\n".join([*own, f"print('=', json.dumps({last}, default=np.ndarray.tolist))"])
            )
        written.append({"folder": str(folder), "scripts": scripts})
    (place / "jobs.json").write_text(json.dumps(written))
    (place / "alone.py").write_text(ALONE)
    printed = started(python, "-W", "error", place / "alone.py", place / "jobs.json").splitlines()
    own = iter([json.loads(line.removeprefix("=")) for line in printed if line.startswith("=")])
    return [[next(own) for _ in given] for _, given in jobs]


def started(python, *arguments):
    """What a program prints; it must succeed."""
    kept = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    done = subprocess.run(
        [python, *arguments],
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(name, run, texts, base):
    match name:
        case "classify":
            found = run.answer([{"text": a, "pair": b} for a, b in texts])
            return [[one["probabilities"][x] for x in ("no", "yes", "so")] for one in found]
        case "tag":
            return [one["tags"] for one in run.answer(texts)]
        case "answer":
            found = run.answer([{"question": a, "context": b} for a, b in texts])
            return [one["answer"] or "" for one in found]
        case "fill-mask":
            tokens = run.answer(texts)
            return [[one["token"] for one in answer["blanks"][0]] for answer in tokens]
    return open_embedder(str(base))(texts).tolist()


@pytest.mark.parametrize("name", ["classify", "tag", "answer", "embed", "fill-mask"])
def test_five_lines_answer_as_the_run(name, answers, base):
    found, runs = answers
    run, texts = runs.get(name, (None, WORDS))
    wanted = expected(name, run, texts, base)
    for batch, own in zip(found[name], (wanted, wanted[:1], wanted[1:]), strict=True):
        if name == "tag":
            batch = [list(words.values()) for words in batch]
        if name == "classify":
            batch = [list(row.values()) for row in batch]
        if name in ("classify", "embed"):
            np.testing.assert_allclose(batch, own, atol=1e-5)
        else:
            assert batch == own
    assert len({json.dumps(one) for one in wanted}) > 1  # it looks at the text


def test_no_answer_is_none_of_the_text(base):
    """The span (0, 0) stands for it, whatever token is first: [CLS], or one of the question."""
    run = tuned(base, QuestionAnswering(), ())
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # without a frame, as GPT-2's
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    answers, texts = serving.served(run).answers, [("a", "b c d"), ("b", "a d")]
    for begins, words in ((True, run.tokenizer), (False, tiny_xlnet.tokenizer()), (False, bare)):
        rows = words.encode_batch(texts)
        assert (rows[0].sequence_ids[0] is None) == begins
        first = rows[1].sequence_ids.index(1)
        found = np.array([[0, 0], [first, first + 1]])
        assert eval(answers, {"texts": texts, "rows": rows, "found": found}) == ["", "a d"]


@pytest.mark.parametrize("archive", sorted(GOLDEN.glob("served_jax_*.zip")), ids=str)
def test_what_another_jax_has_written_is_read(archive, tmp_path):
    pytest.importorskip("flatbuffers")
    shutil.unpack_archive(archive, tmp_path)
    function, weights = make_served_golden.make_function()
    written = (tmp_path / stablehlo.MODEL).read_bytes()
    call = jax.jit(jax.export.deserialize(bytearray(written)).call)
    rng = np.random.default_rng(1)
    for rows, length in ((1, 24), (3, 5)):
        ids = rng.integers(0, 32, (rows, length)).astype(np.int32)
        mask = np.int32(np.arange(length) < rng.integers(1, length, (rows, 1)))
        found, expected = (f(weights, ids, mask) for f in (call, jax.jit(function)))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.ptp(expected) > 0.01


@pytest.mark.slow
@pytest.mark.skipif(OTHER not in os.environ, reason=f"{OTHER} names no Python with another JAX")
def test_it_is_written_and_read_under_either_jax(base, tmp_path):
    """By the scripts of each, for the plain packages of each."""
    task_head = said("SequenceClassification")
    params = drawn("SequenceClassification", 3, CONFIG)
    classifier, texts = tmp_path / "classifier", tmp_path / "texts.txt"
    huggingface.save(classifier, params, CONFIG, tokenizer(), task_head=task_head)
    long = [*WORDS, "h g f " * 9]  # the last is cut
    texts.write_text("\n".join(long))
    pythons = sys.executable, os.environ[OTHER]
    versions = [started(one, "-c", "import jax; print(jax.__version__)") for one in pythons]
    assert len(set(versions)) == 2
    models, jobs, predicted = {"classify": classifier, "embed": base}, [], {}
    for i, python in enumerate(pythons):
        for task, model in models.items():
            answers = started(python, ROOT / "scripts" / "predict.py", model, task, "--file", texts)
            predicted[task, i] = [values(json.loads(line)) for line in answers.splitlines()]
            folder = tmp_path / f"to {task} by {i}"
            started(python, ROOT / "scripts" / "export.py", model, folder)
            jobs.append((folder, batches(long)))
    wanted = [batches(answers) for answers in predicted.values()]
    for python in pythons:
        for found, own in zip(alone(python, tmp_path, jobs), wanted, strict=True):
            for batch, expected in zip(found, own, strict=True):
                rows = [list(row.values()) if isinstance(row, dict) else row for row in batch]
                np.testing.assert_allclose(rows, expected, atol=1e-5)


def values(answer):
    """The numbers of an answer of scripts/predict.py."""
    return answer["embedding"] if "embedding" in answer else list(answer["probabilities"].values())


@pytest.mark.parametrize("target", ["labels", "number"])
def test_what_is_made_of_logits_is_inside(target, base):
    label = TextFields(target=target)
    task = Classification(fields=label, pooling="mean", scale=None)
    names = ("x", "y") if target == "labels" else ()
    if target == "labels":
        task = Classification(fields=label, pooling="mean", thresholds=("x=0.25",))
    else:
        task = Classification(fields=label, pooling="mean", scale=(50.0, 10.0))
    run = tuned(base, task, names)
    served = serving.served(run)
    rows = served.tokenizer.encode_batch(["a b c", "d e f"])
    arrays = (
        np.int32([getattr(r, n) for r in rows]) for n in ("ids", "type_ids", "attention_mask")
    )
    found = np.asarray(served.apply(served.params, *arrays))
    answers = run.answer(["a b c", "d e f"])
    if target == "labels":
        wanted = [list(one["probabilities"].values()) for one in answers]
        assert served.about == {"labels": names, "thresholds": {"x": 0.25, "y": 0.5}}
    else:
        wanted = [one["value"] for one in answers]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_an_xlnet_is_exported_for_all_lengths(base, tmp_path):
    """Whose attention makes a table of all distances in a row."""
    config = XlnetConfig(vocab_size=16, num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=16)
    shapes = jax.eval_shape(config.make().init, jax.random.key(0), jnp.ones((1, 8), jnp.int32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    tokens = tokenizers.load(base)
    encoder = {"encoder": params["params"]}
    huggingface.save(tmp_path / "xlnet", encoder, config, tokens, pooling="mean")
    one = serving.open_served(str(tmp_path / "xlnet"))
    rows = [one.tokenizer.encode(text) for text in PAIRS[2]]
    weights = {"/".join(path): x for path, x in flatten_dict(one.params).items()}
    call = lambda weights, *arrays: one.apply(unflatten_dict(weights, sep="/"), *arrays)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        written = stablehlo.serialize(call, weights, one.shapes, one.max_length)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert f"StableHLO_v{stablehlo.STABLEHLO}".encode() in written  # whatever JAX would write
    assert b"composite" not in written
    function = jax.export.deserialize(bytearray(written)).call
    wanted = open_embedder(str(tmp_path / "xlnet"))(list(PAIRS[2]))
    for row, vector in zip(rows, wanted, strict=True):
        arrays = (np.int32([x]) for x in (row.ids, row.type_ids, row.attention_mask))
        np.testing.assert_allclose(function(weights, *arrays)[0], vector, atol=1e-5)


def test_what_cannot_be_exported_says_so(base, tmp_path):
    (tmp_path / "there").mkdir()
    one = serving.open_served(str(base))
    with pytest.raises(InputError, match=r"there exists: name a new folder"):
        serving.write("x", tmp_path / "there", one)
    for wrong, why in (({"step": 3}, "names a checkpoint"), ({"base": "x"}, "is for adapters")):
        with pytest.raises(InputError, match=why):
            serving.open_served(str(base), **wrong)
    run = blanks(base)
    config = PretrainConfig(
        name="mine", data=run.config.data, model=CONFIG, task=CausalLm(), train=ONE
    )
    with pytest.raises(
        InputError, match=r"^mine is to generate, which is no function of one batch"
    ):
        serving.served(replace(run, config=config))


def test_embeddings_have_the_prompt_of_queries(base):
    task = Embedding(pooling="mean", prompt="a b ", pair_prompt="c ")
    served = serving.served(tuned(base, task, ()))
    prompts = {"query": "a b ", "document": "c "}
    assert served.about == {"prompt": "a b ", "prompts": prompts}


@pytest.mark.parametrize("limit", [500, 5000])
def test_a_full_disk_leaves_nothing(base, limit, tmp_path, monkeypatch, limit_file_size):
    """Nor does a folder go that has the name of the new one behind a dot."""
    weights, tokenizer = {"x": np.ones(10_000, np.float32)}, tokenizers.load(base)
    monkeypatch.setattr(stablehlo, "serialize", lambda *_: b"1" * 1000)
    (tmp_path / ".out").mkdir()
    limit_file_size(limit)
    with pytest.raises(
        InputError, match=r"/out cannot be written \(.*too large.*; make room there"
    ):
        stablehlo.write(tmp_path / "out", max, weights, (), None, tokenizer, {}, "")
    assert list(tmp_path.iterdir()) == [tmp_path / ".out"]


def test_without_flatbuffers(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(InputError, match="pip install flatbuffers"):
        stablehlo.serialize(lambda weights, x: x, {}, ["batch"], None)


def test_the_card_says_what_was_measured_and_no_paths(base, tmp_path):
    run = tuned(base, CLASSES, ("no", "yes", "so"), tuning=LORA)
    assert "| metric |" not in model_card.write(run, tmp_path)
    lines = [{"step": 0, "eval/accuracy": 0.75, "eval/f1": float("nan")}, {"step": 5, "eval/x": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    card = model_card.write(run, tmp_path)
    assert "| accuracy | 0.7500 |" in card
    assert "| metric |" not in model_card.write(replace(run, averaged=(5, 0)), tmp_path)
    assert "f1" not in card
    assert "eval" not in card
    for known in ('pipeline_tag: "text-classification"', "- labels: no, yes, so", "data: none.csv"):
        assert known in card
    assert "- base: base\n" in card
    assert str(base.parent) not in card
    (tmp_path / "eval.json").write_text('{"step": 0, "data": "x", "accuracy": 0.8, "loss": null}')
    assert "| accuracy | 0.8000 |" in model_card.write(run, tmp_path)
    for other in ({"options": {"rows": 10}}, {"averaged": [5, 0]}, {"path": "x"}, {"step": 5}):
        measured = {"step": 0, "averaged": [0], "accuracy": 0.9} | other
        (tmp_path / "eval.json").write_text(json.dumps(measured))
        assert "| accuracy | 0.7500 |" in model_card.write(run, tmp_path)


LONG = ["a b c d e f g h " * 4, "h g f e d c b a " * 5]
SEVERAL = TextFields(target="labels")


@pytest.mark.parametrize(
    ("task", "labels", "usual"),
    [
        (Classification(fields=SEVERAL, thresholds=("x=0.25",)), ("x", "y"), {"thresholds": ()}),
        (QuestionAnswering(null_threshold=0.35), (), {"null_threshold": None}),
        (QuestionAnswering(null_threshold=None, max_answer_length=2), (), {"max_answer_length": 9}),
        (Tagging(split="space", doc_stride=9), ("O", "B-X", "I-X"), {"split": "punctuation"}),
    ],
    ids=["thresholds", "null_threshold", "max_answer_length", "split"],
)
def test_what_is_merged_answers_as_the_run(task, labels, usual, base, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(ROOT / "scripts")
    merge_lora = importlib.import_module("merge_lora")
    run = tuned(base, task, labels)
    monkeypatch.setattr(merge_lora.finetuned, "open_finetuned", lambda *_, **__: run)
    monkeypatch.setattr(merge_lora, "read_any_config", lambda _: run.config)
    merge_lora.main(base, tmp_path / "merged")
    letters = [" ".join(one) for one in permutations("abcd")] + LONG
    asks = isinstance(task, QuestionAnswering)
    pairs = [(text[0], text) for text in letters] + [(text, "h") for text in letters]
    texts = pairs if asks else [f"{text}, d" for text in letters]
    answers = run.answer(texts)
    merged = published_task.open_tuned(str(tmp_path / "merged"))
    assert merged.answer(texts) == near(answers)
    other = replace(run, config=replace(run.config, task=replace(task, **usual)))
    assert other.answer(texts) != near(answers)  # the control
    for name in usual:
        assert f"{name}=" in (tmp_path / "merged" / "README.md").read_text()


def near(value):
    """The same, of which numbers may differ in their last digits."""
    match value:
        case float():
            return pytest.approx(value, rel=1e-4)
        case dict():
            return {name: near(x) for name, x in value.items()}
        case list():
            return [near(x) for x in value]
    return value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": ["z=0.3"]}, "jaxlm: thresholds: 'z' is none of the labels O, B-X"),
        ({"thresholds": "x"}, "jaxlm.thresholds='x' is not of type"),
        ({"threshold": 1}, "jaxlm has 'threshold', which is none of thresholds, max_length"),
        ({"max_length": 0}, "jaxlm: max_length=0 is not above 0: correct it"),
        (["x=0.3"], "jaxlm=.* is of the wrong type: write an object"),
    ],
)
def test_wrong_settings_of_a_folder_are_named(settings, message, tmp_path):
    head = said("SequenceClassification", problem_type="multi_label_classification")
    params = drawn("SequenceClassification")
    huggingface.save(tmp_path / "m", params, BERT, tokenizer(), task_head=head)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"jaxlm": settings}))
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        published_task.open_tuned(str(tmp_path / "m"))
