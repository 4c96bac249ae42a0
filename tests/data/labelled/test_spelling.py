"""Labels as they are written, and as they are meant."""

import json
from dataclasses import replace

import pytest

from jaxlm.data.labelled import labels, spelling
from jaxlm.data.labelled.classification import TextFields, label_array
from jaxlm.data.labelled.dataset import LabelledConfig, read_splits, reading
from jaxlm.data.labelled.records import Conll, JsonLines, Record, Table
from jaxlm.data.labelled.tagging import TagFields
from jaxlm.errors import InputError
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.tagging import Tagging

TWINS = {
    "NFD": "cafe\u0301",
    "zero-width space": "caf\u200b\u00e9",
    "BOM": "\ufeffcaf\u00e9",
    "soft hyphen": "caf\u00ad\u00e9",
    "no-break space": "\u00a0caf\u00e9",
    "mark of direction": "caf\u00e9\u200e",
    "joiner at the end": "caf\u00e9\u200d",
    "quotes": '"caf\u00e9"',
    "case": "CAF\u00c9",
}


@pytest.fixture(params=["csv", "tsv", "jsonl", "conll"])
def read(request, tmp_path):
    """Writes rows of a text and a label as a file of some kind, and reads its classes."""

    def read(values: list[str], *, as_written: bool = False) -> tuple[list[str], list[str]]:
        path = tmp_path / f"data.{request.param}"
        texts = [f"text{i}" for i in range(len(values))]
        rows = list(zip(texts, values, strict=True))
        match request.param:
            case "jsonl":
                lines = [json.dumps({"text": t, "label": v}) for t, v in rows]
                source = JsonLines(path=str(path))
            case "conll":
                lines = [line for t, v in rows for line in (f"{t}\t{v}", "")]
                source = Conll(path=str(path))
            case kind:
                quote = kind == "csv" and any('"' in value for value in values)
                mark = "\t" if kind == "tsv" else ","
                doubled = [(t, v.replace('"', '""')) for t, v in rows]
                cells = [(t, f'"{v}"') for t, v in doubled] if quote else rows
                lines = [mark.join(own) for own in [("text", "label"), *cells]]
                source = Table(path=str(path))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if request.param == "conll":
            task = Tagging(fields=TagFields(as_written=as_written), entities=False)
        else:
            task = Classification(fields=TextFields(as_written=as_written))
        splits = read_splits(LabelledConfig(train=source), task.read, task.check)
        return [x for part in splits[:2] for e in part for x in e.classes], list(splits.notes)

    return read


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
def test_twins_are_one_label_and_it_is_said(request, read, twin):
    if twin.startswith('"') and "tsv" in request.node.name:
        pytest.skip("tables read fields that are well quoted without the marks")
    values = ["caf\u00e9"] * 8 + ["bar"] * 8 + [twin] * 4
    classes, notes = read(values)
    assert sorted(classes) == ["bar"] * 8 + ["caf\u00e9"] * 12
    (note,) = notes
    assert "is 'caf\u00e9' (4); --task.fields.as-written takes each as it stands" in note
    kept, notes = read(values, as_written=True)
    assert (len(set(kept)), notes) == (3, [])


@pytest.mark.parametrize("word", ["nan", "None", "NULL", "#N/A", "<NA>"])
def test_a_word_for_a_missing_value_is_no_label(read, word):
    values = ["pos", "neg", word, "pos", "neg", word, "pos", "neg"] * 3
    with pytest.raises(InputError, match=rf"is '{word}', a word for .* '{word}' \(6\).*as-written"):
        read(values)
    assert word in read(values, as_written=True)[0]


def test_labels_that_only_look_like_one_another_stay_apart():
    names = ["1", "10", "1.05", "v1", "a b", "ab", "e", "\u00e9", "\u0441at", "cat"]
    assert len({spelling.key(name) for name in names}) == len(names)
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # joiners inside make another sign
    assert spelling.clean(family) == family
    assert spelling.key("1.0") == spelling.key("1")


def test_an_unseen_spelling_gets_the_number_of_its_label():
    assert labels.numbers_of(["TRUE", "false"], ("False", "True"), ["x:1", "x:2"]).tolist() == [
        1,
        0,
    ]
    assert labels.number_of("a", ("A", "a"), "x:1") == 1
    with pytest.raises(InputError, match="label 'AB' is not among"):
        labels.number_of("AB", ("Ab", "ab"), "x:1")  # which of the two?


def test_validation_is_spelled_as_training_is(tmp_path):
    train, other = tmp_path / "train.csv", tmp_path / "validation.csv"
    train.write_text("text,label\n" + "".join(f"t{i},{i % 2 == 0}\n" for i in range(4)))
    other.write_text("text,label\na,TRUE\nb,FALSE\n")
    config = LabelledConfig(train=Table(path=str(train)), validation=Table(path=str(other)))
    task = Classification()
    splits = read_splits(config, task.read, task.check)
    assert task.classes(splits.validation) == ["True", "False"]
    assert splits.notes[0].startswith("validation: labels that look alike, or differ in case")


def test_nuls_are_counted(tmp_path):
    path = tmp_path / "nuls.csv"
    rows = [f"a{i}{chr(0) if i in (3, 5) else ''},{'xy'[i % 2]}\n" for i in range(12)]
    path.write_text("text,label\n" + "".join(rows))
    task = Classification()
    (note,) = read_splits(LabelledConfig(train=Table(path=str(path))), task.read, task.check).notes
    assert note == f"2 of 12 texts hold NUL characters, first at {path}:5"


def classes_of(values: list[object], **fields: object) -> list[tuple[str, ...]]:
    records = [
        Record(fields={"text": f"t{i}", "label": value}, origin=f"x.csv:{i + 2}")
        for i, value in enumerate(values)
    ]
    task = Classification(fields=replace(TextFields(target="labels"), **fields))
    examples = task.read(records)
    task.check(examples)
    return [example.classes for example in examples]


def test_lists_of_labels_and_rows_of_zeros_and_ones():
    python = ["['a', 'b']", "[]", "['it\\'s']", '["a", 1]']
    assert classes_of(python) == [("a", "b"), (), ("it's",), ("a", "1")]
    rows = ["[1, 0, 0]", "[0, 1, 1]", "[0, 0, 0]"]
    assert classes_of(rows) == [("0",), ("1", "2"), ()]
    assert classes_of([[1, 0], [True, True]], names=("x", "y")) == [("x",), ("x", "y")]
    assert classes_of([[1], [0, 1], [0]]) == [("1",), ("0", "1"), ("0",)]  # numbers of labels
    assert classes_of([[1], [0, 1]], names=("x", "y")) == [("y",), ("x", "y")]
    with pytest.raises(InputError, match="label has the number 2, but there are 2 names"):
        classes_of([[2]], names=("x", "y"))
    with pytest.raises(InputError, match=r"""write it as \["a", "b"\], or the labels with '\|'"""):
        classes_of(["['a' 'b']"])  # numpy's form, which Python reads as one text


ROWS = [[0, 1, 0, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("odd", [[0, 0, 1], [0, 0, 0, 2], [1], [], "[0, 1, 0, 0, 0]"], ids=str)
@pytest.mark.parametrize("names", [None, ("A", "B", "C", "D")])
def test_a_row_of_zeros_and_ones_that_is_like_no_other_is_named(odd, names):
    with pytest.raises(InputError, match=r"x\.csv:4: label is .* where 4 zeros and ones are"):
        classes_of([*ROWS, odd], names=names)
    if names:  # which say how many there are, of each record by itself
        with pytest.raises(InputError, match=r"one for each of --task\.fields\.names: correct it"):
            classes_of([[0, 0, 1]], names=names)


def test_lists_of_numbers_with_one_twice_are_lists():
    values = [[3, 7], [1, 1], [2, 5]]
    assert classes_of(values) == [("3", "7"), ("1",), ("2", "5")]
    rows = [[0, 2, 2], [0, 0, 0], [1, 1, 1]]
    with pytest.raises(InputError, match=r"or read lists .* with --task\.fields\.row-size 0"):
        classes_of(rows)
    assert classes_of(rows, row_size=0) == [("0", "2"), ("0",), ("1",)]
    with pytest.raises(InputError, match=r"row_size=-1 is below 0"):
        TextFields(row_size=-1)


@pytest.mark.parametrize("odd", ["[0,0,1,0]", "[]", "[1]", "[0, 1"])
def test_an_odd_row_can_be_left_out(tmp_path, odd, capsys):
    path, rows = tmp_path / "x.tsv", ["[0,1,0]", "[1,0,1]", odd, "[0,1,1]"] * 2
    path.write_text("text\tlabel\n" + "".join(f"t{i}\t{row}\n" for i, row in enumerate(rows)))
    config = LabelledConfig(train=Table(path=str(path)), on_bad_row="skip")
    task = Classification(fields=TextFields(target="labels"))
    splits = read_splits(config, reading(task), task.check)
    assert len(splits.train) + len(splits.validation) + splits.duplicates == 6
    assert "2 of 8 records cannot be used, and are left out: " in capsys.readouterr().err


def test_labels_are_taken_as_they_stand_in_validation_too(tmp_path):
    train, other = tmp_path / "train.csv", tmp_path / "validation.csv"
    train.write_text("text,label\nt,IT\nu,en\nv,IT\nw,en\n")
    other.write_text("text,label\na,it\nb,en\n")
    config = LabelledConfig(train=Table(path=str(train)), validation=Table(path=str(other)))
    task = Classification(fields=TextFields(as_written=True))
    splits = read_splits(config, task.read, task.check)
    assert (task.classes(splits.validation), splits.notes) == (["it", "en"], ())
    names = task.labels(splits.train)
    with pytest.raises(InputError, match="label 'it' is not among those"):
        label_array(splits.validation, names)
    assert spelling.alike(splits.validation, names) == splits.validation


def test_another_separator_is_seen():
    values = ["a,b", "a", "b,c", "c", "a,c"]
    with pytest.raises(InputError, match=r"no record holds the separator '\|'.*separator ','"):
        classes_of(values)
    assert classes_of(values, separator=",")[0] == ("a", "b")
    assert classes_of(values, as_written=True)[0] == ("a,b",)
    assert classes_of(["a, the first", "b, the second", "c"])[0] == ("a, the first",)


def test_columns_of_zeros_and_ones():
    def read(target: str, *rows: tuple[object, object]) -> list[tuple[str, ...]]:
        records = [
            Record(fields={"text": "t", "mild": a, "rude": b}, origin=f"x.csv:{i}")
            for i, (a, b) in enumerate(rows)
        ]
        fields = TextFields(label="mild, rude", target=target)  # pyright: ignore[reportArgumentType]
        return [example.classes for example in Classification(fields=fields).read(records)]

    several = read("labels", ("1", "0"), (1, True), ("FALSE", "1.0"), (0, 0.0))
    assert several == [("mild",), ("mild", "rude"), ("rude",), ()]
    assert read("class", ("1", "0"), ("0", "1")) == [("mild",), ("rude",)]
    with pytest.raises(InputError, match=r"x\.csv:0: rude is '0\.3', which is neither 1 nor 0"):
        read("labels", ("1", "0.3"))
    with pytest.raises(InputError, match=r"x\.csv:0: 2 of mild, rude are 1, .*target labels"):
        read("class", ("1", "1"))


def single(values: list[str], **fields: object) -> list[str]:
    task = Classification(fields=replace(TextFields(), **fields))
    records = [Record(fields={"text": "t", "label": v}, origin="x.csv:2") for v in values]
    return task.check(task.read(records))


def test_a_list_or_an_id_is_no_class():
    with pytest.raises(InputError, match=r"is '\[1, 0\]', a list, .*--task.fields.target labels"):
        single(["[1, 0]", "[0, 1]"])
    ids = [f"id{i}" for i in range(30)]
    with pytest.raises(InputError, match="30 examples have 30 classes, nearly each its own"):
        single(ids)
    with pytest.raises(InputError, match=r"--task\.fields\.target number"):
        single([str(i / 7) for i in range(30)])
    assert single(ids, as_written=True) == single([*ids, *ids]) == []
    assert single(["x", "y"]) == []  # a small file may be so
    (note,) = single(["a|b", "a", "b", "b|a"])
    assert "--task.fields.target labels --task.fields.separator '|'" in note


def test_a_header_inside_is_no_record(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\na,x\ntext,label\nb,y\n")
    records = Table(path=str(tmp_path / "data.csv")).records()
    with pytest.raises(InputError, match=r"data\.csv:3: the columns' names stand here again"):
        Classification().read(records)
    alone = Record(fields={"text": "text", "label": "a"}, origin="x")
    assert alone.text("text") == "text"


def test_numbers_of_tags_get_names():
    record = Record(fields={"tokens": ["a", "b"], "tags": [0, 1]}, origin="x:1")
    (sentence,) = Tagging(fields=TagFields(names=("O", "B-x"))).read([record])
    assert sentence.tags == ["O", "B-x"]
