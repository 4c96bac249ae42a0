import json
from fnmatch import fnmatch

import pytest

from jaxlm.convert import hub, sentence_encoder
from jaxlm.errors import InputError

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."
KINDS = ("Transformer", "Pooling", "Normalize")
PROMPTS = "config_sentence_transformers.json"


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
    assert sentence_encoder.read(write(tmp_path, {}, **{PROMPTS: {}})).prompts == {}
    write(tmp_path, {}, **{PROMPTS: {"prompts": prompts, "default_prompt_name": "q"}})
    with pytest.raises(InputError, match="'q' is none of the prompts 'query', 'document'; correct"):
        sentence_encoder.read(tmp_path)
    inside = {"pooling_mode": "mean", "include_prompt": False}
    found = sentence_encoder.read(write(tmp_path, inside, **{PROMPTS: {"prompts": prompts}}))
    assert found.problem == "pooling that leaves out the prompt's tokens"
    assert not sentence_encoder.read(write(tmp_path, inside, **{PROMPTS: {}})).problem


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
    prompts = {"query": "q: ", "document": ""}
    for given in (None, prompts):
        sentence_encoder.write(tmp_path, pooling, 16, 128, given)
        found = sentence_encoder.read(tmp_path)
        assert (found.pooling, found.normalized, found.max_length) == (pooling, True, 128)
        assert (found.prompts, found.default_prompt) == (given or {}, "q: " if given else "")


def test_the_hub_is_asked_for_all_that_is_read(tmp_path):
    sentence_encoder.write(tmp_path, "mean", 16, 128)
    paths = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 4
    for path in paths:
        assert any(fnmatch(path.as_posix(), pattern) for pattern in hub.FILES), path
