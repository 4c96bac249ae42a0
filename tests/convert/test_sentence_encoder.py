import importlib
import json
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_heads import drawn, tokenizer
from tiny_models import BERT

from jaxlm.convert import hub, huggingface, sentence_encoder
from jaxlm.errors import InputError
from jaxlm.runs import base
from jaxlm.runs.embedder import settings

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."
KINDS = ("Transformer", "Pooling", "Normalize")
PROMPTS = "config_sentence_transformers.json"
LENGTHS, TOKENS = "sentence_bert_config.json", "tokenizer_config.json"


def write(folder, pooling, kinds=KINDS, prefix=OLD, **more):
    paths = ["" if i == 0 else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{prefix}{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    files = {"modules.json": modules, "1_Pooling/config.json": pooling, **more}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "max"),
        ({"word_embedding_dimension": 8}, "mean"),  # the library's default
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["max"]}, "max"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_the_folder_says_how(pooling, expected, tmp_path):
    for prefix in (OLD, NEW):
        found = sentence_encoder.read(write(tmp_path, pooling, prefix=prefix))
        assert (found.pooling, found.normalized, found.problem) == (expected, True, "")
    assert found.max_length is None
    assert not sentence_encoder.read(write(tmp_path, pooling, kinds=KINDS[:2])).normalized


def test_lengths_and_prompts(tmp_path):
    more = {
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
    }
    prompts = {"query": "query: ", "document": ""}
    for said, default in (
        ({"prompts": prompts}, ""),
        ({"prompts": prompts, "default_prompt_name": None}, ""),
        ({"prompts": prompts, "default_prompt_name": "query"}, "query: "),
    ):
        found = sentence_encoder.read(write(tmp_path, {}, **more, **{PROMPTS: said}))
        assert (found.max_length, found.prompts, found.default_prompt) == (256, prompts, default)
        assert found.default_prompt_name == said.get("default_prompt_name")
    assert sentence_encoder.read(write(tmp_path, {}, **{PROMPTS: {}})).prompts == {}
    write(tmp_path, {}, **{PROMPTS: {"prompts": prompts, "default_prompt_name": "q"}})
    with pytest.raises(InputError, match="'q' is none of the prompts 'query', 'document'; correct"):
        sentence_encoder.read(tmp_path)
    inside = {"pooling_mode": "mean", "include_prompt": False}
    found = sentence_encoder.read(write(tmp_path, inside, **{PROMPTS: {"prompts": prompts}}))
    assert found.problem == "pooling that leaves out the prompt's tokens"
    assert not sentence_encoder.read(write(tmp_path, inside, **{PROMPTS: {}})).problem


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ({"max_seq_length": 256}, {"model_max_length": 512}, 256),
        ({"max_seq_length": None}, {"model_max_length": 128}, 128),
        ({"transformer_task": "feature-extraction"}, {"model_max_length": 128}, 128),  # since 5.4
        ({}, {"model_max_length": int(1e30)}, None),  # transformers' for none
        ({}, {"model_max_length": None}, None),
    ],
)
def test_the_length_is_the_tokenizers_where_nothing_else_is_said(
    lengths, tokens, expected, tmp_path
):
    found = sentence_encoder.read(write(tmp_path, {}, **{LENGTHS: lengths, TOKENS: tokens}))
    assert (found.max_length, found.problem) == (expected, "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (LENGTHS, {"max_seq_length": "long"}),
        (TOKENS, {"model_max_length": 0}),
        (PROMPTS, {"truncate_dim": -3}),
    ],
)
def test_what_is_no_number_above_0_is_named(name, said, tmp_path):
    ((key, value),) = said.items()
    message = rf"{name}: {key}={value!r} is not a whole number above 0; correct it, or leave it out"
    with pytest.raises(InputError, match=message):
        sentence_encoder.read(write(tmp_path, {}, **{name: said}))


def test_a_cut_of_the_vectors_is_read(tmp_path):
    found = sentence_encoder.read(write(tmp_path, {}, **{PROMPTS: {"truncate_dim": 3}}))
    assert (found.truncate_dim, found.problem) == (3, "")
    assert (found.beyond_pooling, found.cut) == ("", "a cut to the first 3 numbers")
    assert sentence_encoder.read(write(tmp_path, {}, **{PROMPTS: {}})).truncate_dim is None


@pytest.mark.parametrize(
    ("kind", "said", "problem"),
    [
        ("Dense", {}, ""),
        ("Dense", {"use_residual": False, "module_input_name": "sentence_embedding"}, ""),
        ("Dense", {"module_output_name": None}, ""),
        ("Dense", {"use_residual": True}, "a Dense layer with a residual"),
        ("Dense", {"module_input_name": "token_embeddings"}, "a Dense layer of token_embeddings"),
        ("Dense", {"module_output_name": "other"}, "a Dense layer that gives other"),
        ("Normalize", {"module_input_name": "sentence_embedding"}, ""),
        ("Normalize", {"module_input_name": "tokens"}, "a Normalize layer of tokens"),
        ("Normalize", {"module_output_name": "other"}, "a Normalize layer that gives other"),
    ],
)
def test_modules_between_other_names_are_named(kind, said, problem, tmp_path):
    """As sentence-transformers writes them since 5.4, and residuals since 5.7."""
    (tmp_path / f"2_{kind}").mkdir()
    (tmp_path / f"2_{kind}" / "config.json").write_text(json.dumps(said))
    if kind == "Dense":
        weights = {"linear.weight": np.ones((8, 8), np.float32)}
        save_file(weights, tmp_path / "2_Dense" / "model.safetensors")
    found = sentence_encoder.read(write(tmp_path, {}, kinds=("Transformer", "Pooling", kind)))
    assert found.problem == problem
    assert (found.pooling is None) == bool(problem)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"transformer_task": "fill-mask"}, "transformer_task='fill-mask'"),
        ({"query_length": 8}, "query_length=8"),
        ({"document_length": 9, "query_expansion": None}, "document_length=9"),
        ({"query_expansion": {"length": 8}}, "query_expansion={'length': 8}"),
        ({"query_length": None, "module_output_name": "token_embeddings"}, ""),
    ],
)
def test_an_encoder_that_is_told_more_is_named(said, problem, tmp_path):
    assert sentence_encoder.read(write(tmp_path, {}, **{LENGTHS: said})).problem == problem


@pytest.mark.parametrize(
    ("pooling", "kinds", "problem"),
    [
        ({"pooling_mode_cls_token": True}, KINDS, "pooling by mean_tokens and cls_token"),
        ({"pooling_mode": "weightedmean"}, KINDS, "pooling by weightedmean"),
        ({"pooling_mode_mean_tokens": False}, KINDS, "pooling by nothing"),
        ({}, ("Transformer", "Pooling", "Dense"), "a Dense layer without model.safetensors"),
        ({}, ("Transformer", "Pooling", "LSTM"), "a LSTM layer"),
        (
            {},
            ("Transformer", "Pooling", "Normalize", "Dense"),
            "layers in the order Transformer, Pooling, Normalize, Dense",
        ),
    ],
)
def test_what_is_not_supported_is_named(pooling, kinds, problem, tmp_path):
    found = sentence_encoder.read(write(tmp_path, pooling, kinds=kinds))
    assert (found.pooling, found.problem) == (None, problem)


def test_other_folders(tmp_path):
    assert sentence_encoder.read(tmp_path) is None
    (tmp_path / "modules.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"modules\.json is not a list of modules"):
        sentence_encoder.read(tmp_path)


@pytest.mark.parametrize("pooling", ["cls", "last", "mean", "max"])
def test_what_is_written_is_read(pooling, tmp_path):
    prompts = {"query": "q: ", "document": "d: "}
    for given, default in (({}, None), (prompts, None), (prompts, "query"), (prompts, "document")):
        cut = 8 if given else None
        sentence_encoder.write(tmp_path, pooling, 16, 128, given, default, cut)
        found = sentence_encoder.read(tmp_path)
        assert found.truncate_dim == cut
        assert (found.pooling, found.normalized, found.max_length) == (pooling, True, 128)
        assert (found.prompts, found.default_prompt_name) == (given, default)
        assert found.default_prompt == given.get(default, "")


@pytest.mark.parametrize(
    ("lengths", "said", "longest"),
    [
        ({"max_seq_length": 5}, {"prompts": {"query": "a ", "b": ""}}, 5),
        ({}, {"prompts": {"b": "", "query": "a "}, "default_prompt_name": "query"}, 6),
        ({"max_seq_length": 5}, {}, 5),
        ({"max_seq_length": 5}, {"truncate_dim": 4}, 5),
    ],
)
def test_a_folder_written_anew_says_the_same(lengths, said, longest, tmp_path, monkeypatch):
    """Also where the encoder could read more tokens, and no prompt is the default."""
    old, new = tmp_path / "old", tmp_path / "new"
    params = {"encoder": drawn("SequenceClassification")["encoder"]}
    huggingface.save(old, params, BERT, tokenizer(), pooling="mean")
    tokens = json.loads((old / TOKENS).read_text()) | {"model_max_length": 6}
    for name, content in ((LENGTHS, lengths), (PROMPTS, said), (TOKENS, tokens)):
        (old / name).write_text(json.dumps(content))
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    importlib.import_module("convert").main(str(old), new)
    before, after = map(sentence_encoder.read, (old, new))
    assert before == after
    assert after.max_length == settings(base.load(str(new))).max_length == longest < BERT.max_length


def test_the_hub_is_asked_for_all_that_is_read(tmp_path):
    sentence_encoder.write(tmp_path, "mean", 16, 128)
    paths = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 4
    for path in paths:
        assert any(fnmatch(path.as_posix(), pattern) for pattern in hub.FILES), path
