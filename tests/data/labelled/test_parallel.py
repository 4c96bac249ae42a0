"""Files whose lines belong together."""

import bz2
import gzip
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm.data.labelled import seq2seq
from jaxlm.data.labelled.dataset import LabelledConfig, like, read_splits
from jaxlm.data.labelled.parallel import ParallelText, read
from jaxlm.data.labelled.seq2seq import PairFields
from jaxlm.errors import InputError

ENGLISH, GERMAN = "one dog\ntwo\nthree\n", "ein Hund\nzwei\ndrei\n"


@pytest.fixture
def pair(write):
    def pair(source: str | bytes = ENGLISH, target: str | bytes = GERMAN, ending: str = ""):
        return ParallelText(
            source=write(f"a.en{ending}", source), target=write(f"a.de{ending}", target)
        )

    return pair


def texts(source):
    return [(one.fields["source"], one.fields["target"]) for one in source.records()]


def pairs_of(source, **changes):
    config = LabelledConfig(train=source, validation_fraction=0.4, **changes)
    splits = read_splits(config, lambda records: seq2seq.read(records, PairFields()))
    return splits.train + splits.validation


def test_line_by_line(pair):
    (first, *_, last) = pair().records()
    assert first.fields == {"source": "one dog", "target": "ein Hund"}
    assert last.origin.endswith("a.de:3")
    assert f"{pair().source} and " in last.origin


@pytest.mark.parametrize(
    ("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)], ids=["gz", "bz2"]
)
def test_compressed_or_with_other_line_ends_it_is_the_same(pair, write, ending, pack):
    plain = texts(pair())
    assert texts(pair(*(pack(text.encode()) for text in (ENGLISH, GERMAN)), ending)) == plain
    assert texts(pair(ENGLISH.replace("\n", "\r\n"), GERMAN.rstrip())) == plain
    assert texts(pair(ENGLISH.encode("utf-16"), GERMAN)) == plain
    latin = replace(pair("a\n", "für\n".encode("latin-1")), encoding="latin-1")
    assert texts(latin) == [("a", "für")]


def test_several_files_of_a_side(write, tmp_path):
    for number in (1, 2):
        write(f"{number}.en", f"{number}\n")
        write(f"{number}.de", f"n{number}\n")
    patterns = ParallelText(source=str(tmp_path / "*.en"), target=str(tmp_path / "*.de"))
    assert texts(patterns) == [("1", "n1"), ("2", "n2")]
    uneven = replace(patterns, target=str(tmp_path / "1.de"))
    with pytest.raises(InputError, match=r"\*\.en is 2 files and .*1\.de 1: each file"):
        texts(uneven)


def test_a_fingerprint_is_of_both_sides_and_of_no_name(pair, write):
    one = pair()
    moved = replace(one, source=write("b.en", ENGLISH))
    assert moved.fingerprint() == one.fingerprint()
    changed = [
        replace(one, target=write("b.de", GERMAN + "vier\n")),
        ParallelText(source=one.target, target=one.source),
        replace(one, encoding="latin-1"),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in changed)}) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_unequal_numbers_of_lines_and_the_way_out(pair, tmp_path, packed):
    """The command that the error gives mends the longer file."""
    sides = [ENGLISH.encode(), (GERMAN + "vier\n").encode()]
    source = pair(*map(gzip.compress, sides), ".gz") if packed else pair(*sides)
    with pytest.raises(InputError, match=r"a\.en\S* has 3 lines and \S*a\.de\S* 4, but") as error:
        texts(source)
    assert "\n" not in str(error.value)
    _, command = str(error.value).split("leave them out: ")
    mended = tmp_path / "new.de"
    subprocess.run(command.replace("NEW", str(mended)), shell=True, check=True)
    assert texts(replace(source, target=str(mended)))[-1] == ("three", "drei")


def test_an_empty_side_names_its_line(pair):
    source = pair(target="ein Hund\n \ndrei\n")
    message = r"a\.de:2: field 'target' is empty.*: 1 of 3 records .* --data.on-bad-row skip"
    with pytest.raises(InputError, match=message):
        pairs_of(source)
    assert len(pairs_of(source, on_bad_row="skip")) == 2


def test_an_empty_file_is_no_side(pair):
    with pytest.raises(InputError, match=r"a\.de is empty"):
        texts(pair(target=""))


def test_another_file_is_a_side_or_has_both(pair, write):
    """Of a run that was trained on two files."""
    trained = pair()
    with pytest.raises(InputError, match=r"a\.en is one side alone: give the other with --target"):
        like(trained, Path(trained.source))
    found = read(trained.source, trained.target, ("en", "de"))
    assert [one.fields for one in found][1] == {"en": "two", "de": "zwei"}
    both = like(trained, Path(write("b.jsonl", '{"source": "a"}\n')))
    assert [one.fields for one in both.records()] == [{"source": "a"}]
