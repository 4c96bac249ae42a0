"""Heads of tasks, in and out; and the kin of BERT."""

import json
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file
from tiny_heads import LABELS, POOLED, SIZES, drawn, model_of, said, tokenizer
from tiny_models import BERT

from jaxlm.convert import huggingface, report
from jaxlm.convert.architecture import TASKS
from jaxlm.data import tokenizers
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import ClassificationHead, WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.pooling import POOLS
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.runs import base as bases
from jaxlm.runs import published_task
from jaxlm.tree import leaves_with_path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def save(path, task, **more):
    head = said(task, **more)
    params = drawn(task, head.size)
    huggingface.save(path, params, BERT, tokenizer(), task_head=head)
    return params, head


@pytest.mark.parametrize("task", TASKS)
def test_there_and_back(task, tmp_path):
    params, head = save(tmp_path / "m", task)
    found = huggingface.load(tmp_path / "m")
    assert found.task_head == head
    again = {**found.params, "head": found.head}
    assert [path for path, _ in leaves_with_path(again)] == [p for p, _ in leaves_with_path(params)]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert found.lm_head is None
    if task in POOLED:  # what a base gives to a new head
        jax.tree.map(np.testing.assert_array_equal, found.pooler, params["head"]["pooler"])


DECODER = {"vocab_size": 32, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24}
OTHERS = {  # model, how heads pool, and the task's classes
    "electra": (BERT, "electra", POOLED),
    "distilbert": (BERT, "distilbert", POOLED),
    "gpt2": (Gpt2Config(**DECODER, max_length=8), "last", TASKS[:3]),
    "llama": (LlamaConfig(**DECODER, num_kv_heads=1, head_dim=8, max_length=8), "last", TASKS[:3]),
    "xlnet": (XlnetConfig(**DECODER), "xlnet", TASKS),
}


@pytest.mark.parametrize(("kind", "task"), [(kind, t) for kind in OTHERS for t in OTHERS[kind][2]])
def test_heads_of_others_there_and_back(kind, task, tmp_path):
    config, pooling, _ = OTHERS[kind]
    head = said(task, **({"pooling": pooling} if task in POOLED else {}))
    params = drawn(task, 3, config, pooling)
    if kind == "distilbert":  # which has no types of tokens
        params["encoder"]["token_type_embed"]["embedding"] *= 0
    if pooling == "last" and task == "SequenceClassification":
        with pytest.raises(InputError, match="head/classifier/bias has learned something, and has"):
            huggingface.save(tmp_path / "m", params, config, tokenizer(), task_head=head)
        params["head"]["classifier"]["bias"] *= 0
    huggingface.save(tmp_path / "m", params, config, tokenizer(), task_head=head)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["model_type"] == kind
    assert written["architectures"][0].removesuffix("Simple").lower() == f"{kind}for{task}".lower()
    found = huggingface.load(tmp_path / "m")
    assert (found.config, found.task_head) == (config, head)
    again = {**found.params, "head": found.head}
    jax.tree.map(np.testing.assert_array_equal, again, params)
    del params["head"]["classifier"]["bias"]  # a head may have none
    huggingface.save(tmp_path / "n", params, config, tokenizer(), task_head=head)
    assert not huggingface.load(tmp_path / "n").head["classifier"]["bias"].any()


@pytest.mark.parametrize("task", POOLED)
def test_a_tuned_distilbert_there_and_back(task, tmp_path):
    """All its tokens are of one type, which all training teaches; its positions bear that there."""
    head = said(task, pooling="distilbert")
    params = drawn(task, 3, BERT, "distilbert")
    params["encoder"]["token_type_embed"]["embedding"] *= 0
    huggingface.save(tmp_path / "base", params, BERT, tokenizer(), task_head=head)
    begun = huggingface.load(tmp_path / "base")
    model = model_of(BERT, task, pooling="distilbert")
    tokens = jnp.array([[2, 5, 6, 3], [2, 7, 8, 3]])
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens))
    loss = lambda params: (apply(params) ** 2).mean()
    tuned = {**begun.params, "head": begun.head}
    gradients = jax.jit(jax.grad(loss))(tuned)
    tuned = jax.tree.map(lambda x, g: np.asarray(x - 0.1 * g), tuned, gradients)
    types = tuned["encoder"]["token_type_embed"]["embedding"]
    assert types[0].any()
    assert not types[1:].any()
    huggingface.save(tmp_path / "m", tuned, BERT, tokenizer(), task_head=head)
    found = huggingface.load(tmp_path / "m")
    np.testing.assert_allclose(apply({**found.params, "head": found.head}), apply(tuned), rtol=1e-4)
    tuned["encoder"]["token_type_embed"] = {"embedding": types + 1}  # as pairs teach
    with pytest.raises(InputError, match="type of the second texts of pairs, for which a Distil"):
        huggingface.save(tmp_path / "n", tuned, BERT, tokenizer(), task_head=head)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_what_is_not_finite_is_no_answer(task, tmp_path):
    """One token's embedding is damaged: other texts have their answers."""
    save(tmp_path / "m", task)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name].copy()
    weights[name][tokenizer().token_to_id("h")] = np.nan
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    run = published_task.open_tuned(str(tmp_path / "m"))
    answers = run.answer(["a b", "c h", "d"])
    assert [set(one) >= {"error"} for one in answers] == [False, True, False]
    assert json.dumps(answers, allow_nan=False)
    said = r"is not finite, for its weights params/encoder/token_embed/embedding are not: copy or"
    with pytest.raises(InputError, match=said):
        run.answer(["h", "h a"])
    published = huggingface.load(tmp_path / "m")
    written = {**published.params, "head": published.head}
    with pytest.raises(
        InputError, match=r"word_embeddings.* would hold numbers that are not finite"
    ):
        huggingface.save(
            tmp_path / "n",
            written,
            published.config,
            published.tokenizer,
            task_head=published.task_head,
        )
    assert not (tmp_path / "n").exists()


def test_a_head_with_another_activation_is_written_as_what_has_it(tmp_path):
    params = drawn("SequenceClassification", 3, BERT, "distilbert")
    head = said("SequenceClassification", pooling="distilbert")
    with pytest.raises(InputError, match="encoder/token_type_embed/embedding has learned a type"):
        huggingface.save(tmp_path / "m", params, BERT, tokenizer(), task_head=head)
    head_params = jax.tree.map(jnp.asarray, params["head"])
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 16)), jnp.float32)
    answers = {
        name: ClassificationHead(3, pool=POOLS[name]).apply({"params": head_params}, x)
        for name in ("bert", "distilbert", "electra", "xlnet")
    }
    assert len({np.asarray(x).tobytes() for x in answers.values()}) == 4


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        ({}, {"label", "probability", "probabilities", "text"}),
        ({"problem_type": "multi_label_classification"}, {"labels", "probabilities", "text"}),
        ({"problem_type": "regression", "labels": ()}, {"value", "text"}),
    ],
)
def test_a_folder_answers_as_a_run(more, answer, tmp_path):
    params, head = save(tmp_path / "m", "SequenceClassification", **more)
    run = published_task.open_tuned(str(tmp_path / "m"))
    texts = ["a b c d e f g h a", "h"]
    answers = run.answer(texts)
    assert set(answers[0]) == answer
    model = model_of(BERT, "SequenceClassification", head.size)
    params = jax.tree.map(jnp.asarray, params)
    for text, one in zip(texts, answers, strict=True):
        ids = tokenizer().encode(text).ids
        ids = ids if len(ids) <= 8 else [*ids[:7], ids[-1]]
        logits = np.asarray(model.apply({"params": params}, jnp.array([ids])))[0]
        if "value" in one:
            np.testing.assert_allclose(one["value"], logits[0], rtol=1e-4)
            continue
        share = np.exp(logits) / np.exp(logits).sum()
        share = 1 / (1 + np.exp(-logits)) if "labels" in one else share
        assert list(one["probabilities"]) == list(LABELS)
        np.testing.assert_allclose(list(one["probabilities"].values()), share, rtol=1e-4)


def test_what_a_folder_is_for(tmp_path):
    for task, verb in (
        ("TokenClassification", "tag"),
        ("QuestionAnswering", "answer"),
        ("MultipleChoice", "choose"),
        ("SequenceClassification", "classify"),
    ):
        save(tmp_path / task, task)
        config = published_task.read_config_of(str(tmp_path / task))
        assert config.task.verb == verb
    pairs = published_task.read_config_of(str(tmp_path / "SequenceClassification"), pairs=True)
    assert pairs.task.text_fields == ("text", "pair")
    huggingface.save(tmp_path / "bare", {"encoder": drawn(task)["encoder"]}, BERT, tokenizer())
    with pytest.raises(InputError, match="is something to fine-tune from, with --base"):
        published_task.read_config_of(str(tmp_path / "bare"))
    for option in ({"step": 3}, {"base": "x"}):
        with pytest.raises(InputError, match=r"is for runs, and .* leave it out"):
            published_task.open_tuned(str(tmp_path / task), **option)


def change(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_classes_of_one_name_are_refused_where_they_are_used(tmp_path):
    save(tmp_path / "m", "SequenceClassification")
    change(tmp_path / "m", id2label={"0": "neg", "1": "pos", "2": "neg"})
    with pytest.raises(InputError, match=r"config\.json: id2label names 2 classes 'neg': give"):
        published_task.read_config_of(str(tmp_path / "m"))
    assert huggingface.load(tmp_path / "m").head is not None  # a base has the names of the data


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, r"classifier.weight has the shape \(3, 16\)"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "classifier.bias does not belong"),
        ({"architectures": "Bert"}, "architectures='Bert' is of the wrong type"),
    ],
)
def test_heads_that_do_not_fit(more, message, tmp_path):
    save(tmp_path / "m", "SequenceClassification")
    change(tmp_path / "m", **more)
    with pytest.raises(InputError, match=message) as raised:
        huggingface.load(tmp_path / "m")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label does not name the labels 0, 1, …"),
        ({"problem_type": "ordinal"}, "problem_type='ordinal' is not supported; single_label_cl"),
        ({"problem_type": "regression"}, "problem_type='regression' of 3 numbers is not"),
    ],
)
def test_a_base_does_without_a_head_that_cannot_be_read(more, message, tmp_path, capsys):
    save(tmp_path / "m", "SequenceClassification")
    whole = huggingface.load(tmp_path / "m")
    change(tmp_path / "m", **more)
    capsys.readouterr()
    found = huggingface.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    assert (found.head, found.task_head) == (None, None)
    said = capsys.readouterr().err
    assert re.search(f"note: .*config.json: {message}.*: the head is left out", said)
    assert said.count("\n") == 1
    assert report.read(tmp_path / "m").differences == ()
    with pytest.raises(InputError, match=rf"{message}.*: correct it, or .*--base\)$") as raised:
        published_task.open_tuned(str(tmp_path / "m"))
    assert "\n" not in str(raised.value)
    assert bases.load(str(tmp_path / "m")).fingerprint  # the way out


def test_a_head_that_is_said_and_not_there(tmp_path):
    save(tmp_path / "m", "TokenClassification")
    path = tmp_path / "m" / "model.safetensors"
    weights = {n: x for n, x in load_file(path).items() if "classifier" not in n}
    save_file(weights, path)
    assert huggingface.load(tmp_path / "m").head is None  # a base
    with pytest.raises(InputError, match="hold no head of one: it is something to fine-tune from"):
        published_task.open_tuned(str(tmp_path / "m"))
    save(tmp_path / "cut", "SequenceClassification")
    path = tmp_path / "cut" / "model.safetensors"
    save_file({n: x for n, x in load_file(path).items() if "pooler" not in n}, path)
    with pytest.raises(InputError, match=r"lacks the tensor bert\.pooler\.dense\.weight"):
        huggingface.load(tmp_path / "cut")


# Old Flax checkpoints.


def as_flax(weights):
    """The tree of transformers' Flax classes."""
    tree = {}
    for name, x in weights.items():
        *path, last = name.split(".")
        if last == "weight":
            last = "scale" if "LayerNorm" in name else "kernel"
            last = "embedding" if "_embeddings" in name else last
        tree[(*path, last)] = x.T if last == "kernel" else x
    return unflatten_dict(tree)


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder as the Flax classes wrote it."""
    save(tmp_path / "old", "SequenceClassification")
    path = tmp_path / "old" / "model.safetensors"
    tree = as_flax(load_file(path))
    (tmp_path / "old" / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    path.rename(tmp_path / "kept")
    return tmp_path / "old"


def test_an_old_flax_checkpoint_is_read(old):
    found = huggingface.load(old)
    params = drawn("SequenceClassification")
    again = {**found.params, "head": found.head}
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda x: x[:-9], "is not a complete file of msgpack"),
        (lambda x: b"\x80\x04\x95.", "is not a complete file of msgpack|holds no tree of arrays"),
        (lambda x: msgpack_serialize({"bert": {"a": "b"}}), r"no tree of arrays at \('bert', 'a'"),
        (lambda x: b"", "is not a complete file of msgpack"),
    ],
)
def test_damaged_flax_checkpoints(content, message, old):
    path = old / "flax_model.msgpack"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=message) as raised:
        huggingface.load(old)
    assert "\n" not in str(raised.value)


# Against transformers.

KIN = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"pad_token_id": 1, "max_position_embeddings": 18}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1, "max_position_embeddings": 18}),
    "electra": ("Electra", {"embedding_size": 16}),
    "distilbert": ("DistilBert", {}),
    "gpt2": ("GPT2", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}),
    "llama": ("Llama", {"pad_token_id": 0}),
    "xlnet": ("XLNet", {"pad_token_id": 0}),
}
FAST = {
    ("bert", "SequenceClassification"),
    ("roberta", "SequenceClassification"),
    ("xlm-roberta", "MultipleChoice"),
    ("electra", "TokenClassification"),
    ("distilbert", "QuestionAnswering"),
    ("gpt2", "SequenceClassification"),
    ("llama", "QuestionAnswering"),
    ("xlnet", "SequenceClassification"),
}
ALL = [
    pytest.param(kin, task, marks=() if (kin, task) in FAST else pytest.mark.slow)
    for kin in KIN
    for task in (OTHERS[kin][2] if kin in ("gpt2", "llama", "xlnet") else (*TASKS, "MaskedLM"))
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kin", "task"), ALL)
def test_equals_transformers_in_and_out(kin, task, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, flags = KIN[kin]
    small = {"vocab_size": 16, "max_position_embeddings": 16, "num_labels": SIZES.get(task, 3)}
    if kin == "distilbert":
        small |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    elif kin == "gpt2":
        small |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}
    elif kin == "xlnet":
        small |= {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
        del small["max_position_embeddings"]
    else:
        small |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        small |= {"intermediate_size": 24}
    config = getattr(transformers, f"{name}Config")(**small | flags)
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{task}")
    theirs = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizers.save(tokenizer(), tmp_path / "theirs" / "tokenizer.json")
    ids = torch.randint(5, 16, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, slice(4) if kin == "xlnet" else slice(5, 9)] = 0
    ids = ids * mask
    rows = {"input_ids": ids, "attention_mask": mask}
    rows = {n: x[None] for n, x in rows.items()} if task == "MultipleChoice" else rows

    def logits(model):
        with torch.no_grad():
            answer = model.eval()(**rows)
        if task == "QuestionAnswering":
            return torch.stack([answer.start_logits, answer.end_logits], -1).numpy()
        return answer.logits.reshape(-1, 1).numpy() if task == "MultipleChoice" else answer.logits

    found = huggingface.load(tmp_path / "theirs")
    if task == "MaskedLM":
        params, head = {**found.params, "head": found.lm_head}, None
        ours = huggingface_lm(found.config)
    else:
        params, head = {**found.params, "head": found.head}, found.task_head
        ours = model_of(found.config, task, pooling=head.pooling or "bert")
    segments = jnp.asarray(mask.numpy() - 1, jnp.int32)
    given = jnp.asarray(ids.numpy(), jnp.int32)
    mine = np.asarray(
        jax.jit(lambda p: ours.apply({"params": p}, given, segment_ids=segments))(params)
    )
    real = ... if task in POOLED else np.asarray(mask, bool)
    np.testing.assert_allclose(mine[real], np.asarray(logits(theirs))[real], rtol=0, atol=1e-5)
    huggingface.save(tmp_path / "ours", params, found.config, found.tokenizer, task_head=head)
    model, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    np.testing.assert_allclose(np.asarray(logits(model))[real], mine[real], rtol=0, atol=1e-5)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert head is None or written["architectures"] == [type(model).__name__]
    again = huggingface.load(tmp_path / "ours")
    assert (again.config, again.task_head) == (found.config, found.task_head)
    back = {**again.params, "head": again.head or again.lm_head}
    jax.tree.map(np.testing.assert_array_equal, back, params)


def huggingface_lm(config):
    return WithLmHead(config.make(), config.make_lm_head())


def test_an_electra_with_narrow_embeddings_is_refused(tmp_path):
    save(tmp_path / "m", "TokenClassification")
    change(tmp_path / "m", model_type="electra", embedding_size=8)
    with pytest.raises(InputError, match="embedding_size=8 is not hidden_size=16, and a map betwe"):
        huggingface.load(tmp_path / "m")


def test_a_head_that_is_computed_otherwise_is_left_out(tmp_path, capsys):
    config, _, _ = OTHERS["xlnet"]
    params = drawn("QuestionAnswering", 2, config)
    huggingface.save(
        tmp_path / "m", params, config, tokenizer(), task_head=said("QuestionAnswering")
    )
    path = tmp_path / "m" / "model.safetensors"
    parts = ("start_logits.dense", "end_logits.dense_0", "answer_class.dense_0")
    weights = load_file(path)
    for end in ("weight", "bias"):
        x = weights.pop(f"qa_outputs.{end}")
        weights |= {f"{part}.{end}": x.copy() for part in parts}
    save_file(weights, path)
    change(tmp_path / "m", architectures=["XLNetForQuestionAnswering"])
    found = huggingface.load(tmp_path / "m")
    assert found.task_head is None
    jax.tree.map(np.testing.assert_array_equal, found.params["encoder"], params["encoder"])
    note = "the head of a XLNetForQuestionAnswering (6 tensors) is computed in another way"
    assert note in capsys.readouterr().err
    for read in (published_task.read_config_of, published_task.open_tuned, published_task.is_tuned):
        with pytest.raises(InputError, match=r"XLNetForQuestionAnswering, whose head.*with --base"):
            read(str(tmp_path / "m"))
    shown = report.read(tmp_path / "m")
    assert (len(shown.others), shown.differences) == (6, ())
    assert "answer_class.dense_0.bias: of a head that is computed otherwise" in shown.others[0]


# The script.


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs one here; gives its exit code, what it prints, and what it says on stderr."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew

    def script(name, *words):
        code = 0
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return script


@pytest.fixture
def convert(script):
    return lambda *words: script("convert.py", *words)


def test_a_folder_is_asked_and_evaluated_as_a_run(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m", "SequenceClassification")
    code, out, err = script("predict.py", "m", "classify", "a b c", "--pair", "d")
    assert code == 0, err
    assert {line.split()[1] for line in out.splitlines()} == set(LABELS)
    (tmp_path / "x.csv").write_text("text,label\na b,O\nc d,B-X\ne,O\n")
    code, out, err = script("evaluate.py", "m", "--data", "x.csv")
    assert code == 0, err
    assert "m at step 0, 3 examples of x.csv" in out
    measured = json.loads((tmp_path / "eval" / "m" / "eval.json").read_text())
    answers = published_task.open_tuned("m").answer(["a b", "c d", "e"])
    right = [one["label"] == label for one, label in zip(answers, ["O", "B-X", "O"], strict=True)]
    assert measured["accuracy"] == pytest.approx(np.mean(right))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    code, _, err = script("evaluate.py", "m")
    assert (code, err) == (
        2,
        "error: m is no run, and has no data of its own: give some (--data)\n",
    )


def test_a_folder_is_written_anew(convert, old, tmp_path):
    code, out, _ = convert(old, "--dry-run")
    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == "25 parameters, 0 that do not fit"
    assert (
        "bert.encoder.layer.0.output.dense.bias … bert.encoder.layer.1.output.dense.bias  ->  "
        "encoder/layers/mlp/down/bias [2, 16]  ((embed) -> embed)"
    ) in lines
    code, out, err = convert(old, tmp_path / "new")
    assert (code, out) == (0, f"{old} is in {tmp_path / 'new'}\n"), err
    before, after = huggingface.load(old), huggingface.load(tmp_path / "new")
    assert before.fingerprint == after.fingerprint
    assert after.task_head == before.task_head
    code, _, err = convert(old)
    assert (code, err) == (2, "error: name a new folder, or give --dry-run\n")


def test_all_that_does_not_fit_is_shown_at_once(convert, tmp_path):
    save(tmp_path / "m", "SequenceClassification")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    del weights["bert.encoder.layer.1.output.dense.bias"]
    weights["bert.more"] = np.zeros(2, np.float32)
    weights["classifier.bias"] = np.zeros(9, np.float32)
    weights["bert.embeddings.position_ids"] = np.arange(8)
    save_file(weights, path)
    code, out, _ = convert(tmp_path / "m", "--dry-run")
    assert code == 1
    assert out.splitlines()[-5:] == [
        "bert.embeddings.position_ids: nothing to read",
        "does not fit: bert.more has no place",
        f"does not fit: {tmp_path / 'm'} lacks the tensor bert.encoder.layer.1.output.dense.bias",
        f"does not fit: {tmp_path / 'm'}: classifier.bias has the shape (9,), but the "
        "configuration says (3,)",
        "25 parameters, 3 that do not fit",
    ]
