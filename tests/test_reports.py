"""Faults that users of other projects reported in public, made small: jaxlm must do better."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.axes import Axes
from pyarrow import ipc, parquet
from test_evaluate import make_run

from jaxlm.convert import bert, folder, huggingface, sentence_encoder
from jaxlm.data import files, tokenizers
from jaxlm.data.labelled import classification, question_answering, tagging
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import read_records
from jaxlm.data.labelled.records import JsonLines, Squad, Table
from jaxlm.data.labelled.tagging import TagFields
from jaxlm.errors import InputError
from jaxlm.evaluate import plots
from jaxlm.models.bert import BertConfig
from jaxlm.runs import finetuned
from jaxlm.runs.answers import as_records
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging


def examples(source: Table | JsonLines, **fields: Any) -> list[tuple[str, Any]]:
    """Text and label of every record."""
    own = TextFields(**fields)
    found = read_records(source.records(), lambda given: classification.read(given, own), "raise")
    return [(example.text, example.label) for example in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinetunedRun:
    """Tuned to tell two words apart."""
    made = make_run(tmp_path_factory.mktemp("reports"), Classification())
    return finetuned.open_finetuned(str(made))


@pytest.mark.parametrize("mark", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"])
def test_excels_line_of_the_separator(tmp_path: Path, mark: str) -> None:
    """python/cpython #109644, pandas-dev/pandas #47303: a first line sep=; was the header."""
    path = tmp_path / "a.csv"
    path.write_text(f"{mark}\ntext;label\nbad, bad;neg\ngood;pos\n", encoding="utf-8")
    assert examples(Table(path=str(path))) == [("bad, bad", "neg"), ("good", "pos")]
    (tmp_path / "b.csv").write_text("sep=,x\nbad,y\n")  # a header like any other
    found = examples(Table(path=str(tmp_path / "b.csv")), text="sep=", label="x", as_written=True)
    assert found == [("bad", "y")]


def save_to_disk(folder: Path, columns: Mapping[str, list[Any]]) -> None:
    """As `datasets` does: tables in shards, and what describes them in JSON."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    with ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text(json.dumps({"features": {}, "_fingerprint": "1"}, indent=2))


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    """huggingface/datasets #3700, axolotl #1430: its state.json was read as data."""
    columns = {"text": ["a", "b"], "label": ["x", "y"]}
    save_to_disk(tmp_path / "one", columns)
    assert examples(JsonLines(path=str(tmp_path / "one"))) == [("a", "x"), ("b", "y")]
    save_to_disk(tmp_path / "splits" / "train", columns)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"name one of \S+splits/train$"):
        files.find(str(tmp_path / "splits"))


def test_names_of_classes_in_parquet(tmp_path: Path) -> None:
    """huggingface/datasets #3578: the names of classes got lost, and numbers were learned."""
    classes = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    tags = {"feature": {"names": ["O", "B-X"], "_type": "ClassLabel"}, "_type": "List"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": classes, "tags": tags}
    columns = {"text": ["a", "b"], "label": [1, 0], "tokens": [["a"], ["b"]], "tags": [[0], [1]]}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "a.parquet")
    source = JsonLines(path=str(tmp_path / "a.parquet"))
    assert examples(source) == [("a", "pos"), ("b", "neg")]
    assert [s.tags for s in tagging.read(source.records(), TagFields())] == [["O"], ["B-X"]]


@pytest.mark.parametrize(("encoding", "width"), [("utf-16-le", 2), ("utf-8", 1), ("utf-32-le", 4)])
def test_offsets_in_other_units(tmp_path: Path, encoding: str, width: int) -> None:
    """argilla-io/argilla #5729: an emoji moved spans, because JavaScript counts it twice."""
    text = "😀 é Anna Smith met Bob"

    def place(part: str) -> int:
        return len(text[: text.index(part)].encode(encoding)) // width

    spans = [[place("Anna"), place(" met"), "PER"], [place("Bob"), place("Bob") + 3, "PER"]]
    path = tmp_path / "spans.jsonl"
    path.write_text(json.dumps({"text": text, "label": spans}) + "\n", encoding="utf-8")
    sentences = tagging.read(JsonLines(path=str(path)).records(), TagFields())
    assert sentences[0].words == ["😀", "é", "Anna", "Smith", "met", "Bob"]
    assert sentences[0].tags == ["O", "O", "B-PER", "I-PER", "O", "B-PER"]

    answers = [{"text": "Anna", "answer_start": place("Anna")}]
    question = {"id": "1", "question": "Who?", "answers": answers}
    paragraphs = [{"context": text, "qas": [question]}]
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    source = Squad(path=str(tmp_path / "q.json"))
    questions = question_answering.read(source.records(), question_answering.SpanFields())
    assert questions[0].starts == (text.index("Anna"),)
    said = [*Tagging().check(sentences), *QuestionAnswering().check(questions)]
    assert len(said) == (0 if width == 4 else 2)


def test_spans_inside_of_words_are_counted(tmp_path: Path) -> None:
    """argilla-io/argilla #5729: "just a silent bug recording start:end wrongly off by 1-2"."""
    lines = [{"text": "Anna met Bob", "label": [[1, 4, "PER"]]}, {"text": "so", "label": []}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (said,) = Tagging().check(tagging.read(JsonLines(path=str(path)).records(), TagFields()))
    assert said.startswith(f"in 1 of 2 texts, first at {path}:1, a span begins or ends inside")


def legend_of(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of every legend that is made from now on."""
    seen, legend = [], Axes.legend

    def watched(self: Axes, *args: Any, **kwargs: Any) -> Any:
        made = legend(self, *args, **kwargs)
        seen.append([text.get_text() for text in made.get_texts()])
        return made

    monkeypatch.setattr(Axes, "legend", watched)
    return seen


def test_names_that_begin_with_an_underscore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """matplotlib/matplotlib #21295: a legend leaves them out."""
    seen = legend_of(monkeypatch)
    plots.plot_learning_curves({"_a": {1: [0.5]}, "b": {1: [0.4]}}, tmp_path / "a.png")
    assert seen == [[" _a", "b"]]


@pytest.mark.parametrize("name", ["$x^$", "$$", "5$ to 10$ {", "積極", "\U0010fffd"])
def test_names_that_are_no_mathematics_and_in_no_font(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """matplotlib/matplotlib #20266, ultralytics/yolov5 #6522: what stands in labels must not end
    a plot, nor warn for each character and draw boxes (here a warning is an error)."""
    plots.plot_learning_curves({name: {1: [0.5]}}, tmp_path / "a.png", y_label=f"f1/{name}")
    plots.plot_confusion(np.array([0, 1]), np.array([0, 1]), ["b", name], tmp_path / "b.png")
    plots.plot_sweep([{"a": name}, {"a": "b"}], [0.5, 1.0], tmp_path / "c.png", metric=f"f1/{name}")
    if name == "\U0010fffd":  # which no font has
        assert f"the plot has numbers for 1 = {name}; install" in capsys.readouterr().err


def test_kinds_of_floats_that_numpy_has_not(tmp_path: Path) -> None:
    """safetensors/safetensors #682: AttributeError, for 8-bit floats."""
    header = {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / folder.WEIGHTS
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x38\x38")
    with pytest.raises(InputError, match="take a copy of the model in float32"):
        list(folder.Tensors(tmp_path).values())


def test_texts_that_are_cut_are_counted(
    run: FinetunedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """huggingface/sentence-transformers #4060: texts were cut, and nobody was told."""
    given = ["good 1 " * 200, "bad 2", "good 3 " * 200]
    assert len(list(run.stream(as_records(given, ["text"]), chunk=1))) == 3
    longest = run.framer.max_length
    said = f"note: 2 of 3 texts are cut at {longest} tokens, as in training\n"
    assert capsys.readouterr().err == said
    run.answer(["bad 2"])
    assert capsys.readouterr().err == ""


def test_the_last_batch_is_evaluated_once(run: FinetunedRun) -> None:
    """huggingface/accelerate #350: examples that fill the last batch were measured twice."""
    task, size = run.task, run.config.data.batch_size
    numbers = range(2 * size + 3)
    rows = [{"text": f"{('bad', 'good')[i % 2]} {i}", "label": str(i % 3 // 2)} for i in numbers]
    given = task.read(as_records(rows, ["text"]))
    sums, outputs = run.outputs(given)
    assert sums is not None
    assert len(outputs["probabilities"]) == len(given)
    true = [int(row["label"]) for row in rows]
    losses = -np.log(outputs["probabilities"][np.arange(len(given)), true])
    assert sums.means()["loss"] == pytest.approx(losses.mean(), rel=1e-4)


def test_a_quotation_mark_too_many_is_one_bad_row(tmp_path: Path) -> None:
    """pandas-dev/pandas #47073: one stray quotation mark ended all, where bad lines were to be
    skipped."""
    rows = ['"a, b",x', '"an "odd" one",x', "c,y", '"never closed,y', '"d\ne",x', "f,y"]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    own = lambda given: classification.read(given, TextFields())
    (tmp_path / "b.csv").write_text('text,label\n"an "odd" one",x\nb,y\n')
    with pytest.raises(InputError, match="set quoting to none: 1 of 2"):
        examples(Table(path=str(tmp_path / "b.csv")))
    with pytest.raises(InputError, match=r"a\.csv:3, \S+:5: malf.* 2 of 6 records .* skip$"):
        read_records(Table(path=str(path)).records(), own, "raise")
    found = read_records(Table(path=str(path)).records(), own, "skip")
    assert [example.text for example in found] == ["a, b", "c", "d\ne", "f"]
    assert [e.origin.rpartition(":")[2] for e in found] == ["2", "4", "6", "8"]


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        (["3,5", "-4", "1,250"], [3.5, -4, 1.25]),
        (["1,000", "2"], "write 1000 for it, without separators"),
        (["1_000", "2"], "write 1000 for it, without separators"),
        (["3,5", "4.5"], r"write 3\.5 for it, as others have a decimal point"),
        (["5 stars", "4"], "is not a finite float32 number: 1 of 2"),
    ],
)
def test_numbers_of_other_countries(
    tmp_path: Path, written: list[str], numbers: list[float] | str
) -> None:
    """pandas-dev/pandas #59299: an error named numbers with a decimal comma that were right. What
    may be thousands is never taken for a fraction, nor 1_000 for a number."""
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{row}\n" for row in ["text;n", *(f"a;{n}" for n in written)]))
    source = Table(path=str(path), delimiter=";")
    if isinstance(numbers, str):
        with pytest.raises(InputError, match=numbers):
            examples(source, label="n", target="number")
        return
    assert [label for _, label in examples(source, label="n", target="number")] == numbers
    task = Classification(fields=TextFields(label="n", target="number"))
    assert task.check(task.read(source.records())) == ["n has decimal commas: 3,5 is read so"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_line_breaks_are_no_unknown_tokens(kind: tokenizers.Kind) -> None:
    """google/sentencepiece #101: each line break inside of a text became an unknown token."""
    text = "one two\nthree\tfour\r\nfive six\u2028seven\xa0eight\x85nine"
    trained = tokenizers.train(kind, [" ".join(text.split())] * 2, 400)  # on lines, as is usual
    encoded = trained.encode(text, add_special_tokens=False)
    assert trained.token_to_id(tokenizers.UNK) not in encoded.ids
    assert encoded.offsets[-1][1] == len(text)  # places are those of the text as it was given


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("text , label", None),
        ("Text,LABEL", r"no field 'text' among 'Text', 'LABEL'; did you mean 'Text'\?$"),
        ("text", r"has 1; all other lines have one field more .* \(R leaves out"),
        ("# made by hand,,", r"has 3; all other lines have 2: remove the first, if it is a title"),
    ],
)
def test_headers_that_are_a_little_off(tmp_path: Path, head: str, message: str | None) -> None:
    """pandas-dev/pandas #9067 and #4623, label-sleuth #315: spaces, capitals, a title above."""
    path = tmp_path / "a.csv"
    path.write_text(f"{head}\na,x\nb,y\n")
    if message is None:
        assert examples(Table(path=str(path))) == [("a", "x"), ("b", "y")]
        return
    with pytest.raises(InputError, match=message):
        examples(Table(path=str(path)))


def test_a_sentence_encoder_that_lowers_its_texts(tmp_path: Path) -> None:
    """vllm-project/vllm #11815: sentence_bert_config.json's do_lower_case is for the text, whatever
    the tokenizer does."""
    config = BertConfig(
        vocab_size=80, num_layers=1, hidden_dim=8, num_heads=2, mlp_dim=8, max_length=16
    )
    encoder = config.make()
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    cased = tokenizers.train("wordpiece", ["One two Three", "one TWO three"], 80, cased=True)
    huggingface.save(tmp_path / "own", {"encoder": params}, config, cased, pooling="mean")
    text = "Two threE"
    alone = huggingface.load(tmp_path / "own").tokenizer.encode(text).tokens
    settings = tmp_path / "own" / tokenizers.LENGTHS
    settings.write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    lowered = huggingface.load(tmp_path / "own").tokenizer
    assert lowered.encode(text).tokens == cased.encode("two three").tokens != alone


def test_an_adapter_in_the_place_of_a_model(tmp_path: Path) -> None:
    """huggingface/peft #298, #523: "does not appear to have a file named config.json"."""
    settings = {"base_model_name_or_path": "bert-base-uncased", "peft_type": "LORA"}
    (tmp_path / folder.ADAPTER).write_text(json.dumps(settings))
    with pytest.raises(InputError, match="an adapter of PEFT for bert-base-uncased, not a model"):
        folder.read_config(tmp_path)


def test_a_module_without_settings_needs_no_folder(tmp_path: Path) -> None:
    """huggingface/sentence-transformers #2458: the 2_Normalize of modules.json was not there."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    (tmp_path / tokenizers.MODULES).write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / folder.CONFIG).write_text('{"pooling_mode_cls_token": false}')
    says = sentence_encoder.read(tmp_path)
    assert says is not None
    assert (says.pooling, says.normalized, says.problem) == ("mean", True, "")


def test_positions_of_roberta() -> None:
    """huggingface/transformers #14243: of 514 positions 512 can be used, and more ended in an
    error about an index."""
    raw = {
        "model_type": "roberta",
        "vocab_size": 10,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 514,
        "pad_token_id": 1,
    }
    assert bert.read_config(raw, "config.json")[1].max_length == 512
