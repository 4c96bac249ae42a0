import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.errors import InputError


@pytest.fixture
def copy(prepared: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.directory, tmp_path / "words"))


def fails(directory: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_prepared(directory)
    assert "\n" not in str(error.value)


def records(directory: Path) -> Path:
    return next(directory.glob("*/*train*"))


def test_a_copy_opens_and_its_source_pickles(prepared, copy):
    source = open_prepared(copy).source("train")
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source) == prepared.info.rows["train"]
    np.testing.assert_array_equal(again[3]["tokens"], source[3]["tokens"])
    assert type(source[3]["length"]) is np.int32


def test_missing(tmp_path):
    fails(tmp_path / "nowhere", r"no prepared data in .*nowhere; make it with scripts/prepare\.py")
    fails(tmp_path, r"holds no info\.json")


def test_damaged_info(copy):
    (copy / "info.json").write_text("{")
    fails(copy, r"info\.json is damaged")
    (copy / "info.json").write_text('{"name": "words"}')
    fails(copy, r"info\.json is damaged")


def test_another_tokenizer(copy):
    path = copy / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(definition))
    fails(copy, r"tokenizer\.json \(sha256 \w{12}\) is not the tokenizer of this data \(\w{12}\)")
    path.unlink()
    fails(copy, "there is no tokenizer file|neither")


def test_missing_or_cut_records(copy):
    data = records(copy).read_bytes()
    records(copy).write_bytes(data[:-1000])
    fails(copy, r"is incomplete or damaged \(\d+ bytes of train instead of")
    records(copy).unlink()
    fails(copy, r"is incomplete or damaged \(without words-train\.array_record-00000-of-00001")
    shutil.rmtree(copy / "1.0.0")
    fails(copy, r"is incomplete or damaged")


def test_other_rows_than_promised(copy):
    path = copy / "info.json"
    info = json.loads(path.read_text())
    info["rows"]["train"] += 1
    path.write_text(json.dumps(info))
    fails(copy, r"is incomplete or damaged \(not the \d+ rows of train\)")


def test_a_flipped_byte_is_found_when_read(copy):
    assert len(list(open_prepared(copy).source("train"))) > 100
    data = bytearray(records(copy).read_bytes())
    data[len(data) // 2] ^= 0xFF
    records(copy).write_bytes(data)
    source = open_prepared(copy).source("train")
    with pytest.raises(InputError, match=r"words \(train\): row \d+ is damaged"):
        list(source)
    rows = np.arange(len(source))
    with pytest.raises(InputError, match=r"words \(train\): row \d+ is damaged") as error:
        source.read(rows)  # as batches are
    (damaged,) = re.findall(r"row (\d+) is", str(error.value))
    assert len(source.read(np.delete(rows, int(damaged)))["tokens"]) == len(rows) - 1
