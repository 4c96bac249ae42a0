import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_xlnet
import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from jaxlm.data import tokenizers
from jaxlm.data.loader import check_alike
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig, prepare
from jaxlm.data.prepared import open_prepared
from jaxlm.data.shards import merge, prepare_shard
from jaxlm.data.sources import Csv, Jsonl, TextFiles
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.tasks.vocabulary import make_vocabulary

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare.py"


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def stream(prepared, split: str) -> np.ndarray:
    """All tokens of a split, padding removed."""
    source = prepared.source(split)
    rows = [source[i] for i in range(len(source))]
    return np.concatenate([row["tokens"][: row["length"]] for row in rows])


def documents(prepared, split: str) -> list[str]:
    tokenizer = tokenizers.load(prepared.tokenizer_path)
    tokens = stream(prepared, split)
    starts = np.flatnonzero(tokens == prepared.info.special.cls)
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]


def make(tmp_path: Path, text: str, **settings) -> PrepareConfig:
    (tmp_path / "in.txt").write_text(text)
    tokenizer = settings.pop("tokenizer", TokenizerConfig(vocab_size=200))
    source = TextFiles(glob=str(tmp_path / "in.txt"), document="line")
    return PrepareConfig(source=source, tokenizer=tokenizer, **settings)


def test_new_tokens_without_a_tokenizer_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(tmp_path, "red green", extend_vocab=9)
    (tmp_path / "in.txt").unlink()
    with pytest.raises(
        InputError, match=r"^extend_vocab=9 adds to a .* --tokenizer\.path"
    ) as refused:
        prepare(config, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    options = "--extend-vocab None --tokenizer.vocab-size 209"
    assert options in str(refused.value)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("prepare")
    chosen = tyro.cli(script.Arguments, args=["--out", "x", *options.split()], config=script.FORM)
    assert (chosen.extend_vocab, chosen.tokenizer.vocab_size) == (None, 209)


def test_every_document_is_in_one_split_in_order(prepared, corpus_path):
    lines = corpus_path.read_text().splitlines()
    train, validation = documents(prepared, "train"), documents(prepared, "validation")
    assert sorted(train + validation) == sorted(lines)
    assert train == [line for line in lines if line in set(train)]
    assert 20 <= len(validation) <= 60  # 40 of 400 expected; 3 standard deviations are 18
    assert prepared.info.documents == {"train": len(train), "validation": len(validation)}


def test_packing(prepared):
    """[CLS] … [SEP] end to end; all rows full but the last, which alone is padded."""
    special, info = prepared.info.special, prepared.info
    for split in ("train", "validation"):
        source = prepared.source(split)
        rows = [source[i] for i in range(len(source))]
        assert len(rows) == info.rows[split] > 10
        assert all(row["tokens"].shape == (16,) for row in rows)
        assert all(row["tokens"].dtype == np.uint16 for row in rows)
        assert {int(row["length"]) for row in rows[:-1]} == {16}
        last = rows[-1]
        assert (last["tokens"][last["length"] :] == special.pad).all()
        tokens = stream(prepared, split)
        assert info.tokens[split] == len(tokens)
        assert info.fill[split] == len(tokens) / (16 * len(rows))
        assert tokens[0] == special.cls
        assert tokens[-1] == special.sep
        ends = np.flatnonzero(tokens == special.sep)
        np.testing.assert_array_equal(np.flatnonzero(tokens == special.cls)[1:], ends[:-1] + 1)
        assert any(row["tokens"][0] != special.cls for row in rows)  # cut documents just go on


def test_info(prepared):
    info = prepared.info
    tokenizer = tokenizers.load(prepared.tokenizer_path)
    assert info.tokenizer_sha256 == tokenizers.fingerprint(tokenizer)
    assert info.vocab_size == tokenizers.vocab_size(tokenizer)
    assert info.name == "words"
    counts = Counter(stream(prepared, "validation").tolist())
    for token in (info.special.cls, info.special.sep):
        del counts[token]
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert info.unigram_entropy == pytest.approx(entropy, abs=1e-5)


def test_tfds_reads_it_by_name_without_our_code(prepared):
    script = f"""
import sys
import tensorflow_datasets as tfds
source = tfds.data_source("words", data_dir={str(prepared.directory.parent)!r}, split="train")
print(len(source), source[0]["tokens"].tolist())
assert not any(name in sys.modules for name in ("tensorflow", "jaxlm"))
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokens = prepared.source("train")[0]["tokens"].tolist()
    assert printed == f"{prepared.info.rows['train']} {tokens}\n"


def test_tensorflow_stays_out(prepared):
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "characters"])
def test_preparing_twice_gives_the_same_bytes(config, tmp_path, kind):
    tokenizer = TokenizerConfig(kind=kind, vocab_size=300)
    config = dataclasses.replace(config, tokenizer=tokenizer)
    prepare(config, tmp_path / "a" / "words")
    prepare(config, tmp_path / "b" / "words")
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.fixture(scope="module")
def whole(config, prepared, tmp_path_factory) -> tuple[PrepareConfig, dict[str, bytes]]:
    """What all machines are told, and what one machine makes of it."""
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(path=prepared.directory))
    directory = tmp_path_factory.mktemp("whole") / "words"
    prepare(config, directory)
    return config, contents(directory)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_merge_into_the_same_bytes_whatever_their_number(whole, tmp_path, count):
    config, expected = whole
    for i in reversed(range(count)):
        prepare_shard(config, tmp_path / "words", f"{i}/{count}")
    merge(tmp_path / "words")
    assert contents(tmp_path / "words") == expected
    assert not (tmp_path / "words.shards").exists()


def test_shards_without_documents_and_copies_change_nothing(prepared, tmp_path):
    tokenizer = TokenizerConfig(path=prepared.directory)
    text = "a b\n\nc é\na b\n中 f\nc é\na b\n"
    config = make(tmp_path, text, tokenizer=tokenizer, validation_fraction=0.5)
    info = prepare(config, tmp_path / "whole" / "words")
    assert (sum(info.documents.values()), info.duplicates) == (3, 3)
    assert info.unknown_share == pytest.approx(1 / 12)  # each document has two special tokens
    assert info.changed_share == pytest.approx(1 / 6)  # é
    for i in range(8):
        prepare_shard(config, tmp_path / "words", f"{i}/8")
    shards = (tmp_path / "words.shards").iterdir()
    assert sum(not list(shard.glob("*.tokens")) for shard in shards) >= 5  # of 8; 3 documents
    merge(tmp_path / "words")
    assert contents(tmp_path / "words") == contents(tmp_path / "whole" / "words")


def test_shards_must_be_complete_and_alike(config, prepared, tmp_path):
    with pytest.raises(InputError, match=r"shard 0/2 needs tokenizer\.path"):
        prepare_shard(config, tmp_path / "words", "0/2")
    with pytest.raises(InputError, match="holds no shards"):
        merge(tmp_path / "words")
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(path=prepared.directory))
    prepare_shard(config, tmp_path / "words", "0/2")
    with pytest.raises(InputError, match="missing or in the way: 00001-of-00002"):
        merge(tmp_path / "words")
    prepare_shard(dataclasses.replace(config, row_length=32), tmp_path / "words", "1/2")
    with pytest.raises(InputError, match="row_length 32 there and 16 here"):
        merge(tmp_path / "words")


@pytest.mark.parametrize("shard", ["2/2", "1", "a/2", "-1/2", "1/0"])
def test_bad_shard(config, tmp_path, shard):
    with pytest.raises(InputError, match="is not i/N"):
        prepare_shard(config, tmp_path / "words", shard)


def test_copies_are_dropped(tmp_path):
    lines = [f"line number {i % 50}" for i in range(120)]
    info = prepare(make(tmp_path, "\n".join([*lines, "", " "])), tmp_path / "out")
    assert sum(info.documents.values()) == 50
    assert info.duplicates == 70
    prepared = open_prepared(tmp_path / "out")
    train, validation = documents(prepared, "train"), documents(prepared, "validation")
    assert sorted(train + validation) == sorted(set(lines))


def test_texts_end_as_the_tokenizer_ends_them(tmp_path):
    tiny_xlnet.tokenizer().save(str(tmp_path / "tokenizer.json"))
    text = "\n".join("".join(chr(97 + i // 8**k % 8) for k in range(9)) for i in range(80))
    given = TokenizerConfig(path=tmp_path / "tokenizer.json")
    prepare(make(tmp_path, text, tokenizer=given), tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    tokens, special = stream(prepared, "train"), prepared.info.special
    ends = np.flatnonzero(tokens == special.cls)
    assert len(ends) == prepared.info.documents["train"]
    assert ends[-1] == len(tokens) - 1
    np.testing.assert_array_equal(np.flatnonzero(tokens == special.sep), ends - 1)
    vocabulary = make_vocabulary(tokenizers.load(prepared.tokenizer_path))
    assert (vocabulary.start_id, vocabulary.end_id) == (None, special.cls)
    assert not np.asarray(vocabulary.is_ordinary)[[special.cls, special.sep]].any()


def test_texts_of_t5_have_no_start(tmp_path):
    """There padding only begins what is written."""
    made = tokenizers.train("characters", ["abcdefgh"], 20).to_str()
    made = made.replace("[CLS]", "<s0>").replace("[PAD]", "<pad>").replace("[SEP]", "</s>")
    t5 = Tokenizer.from_str(made)
    end = [("</s>", t5.token_to_id("</s>"))]
    t5.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
    t5.save(str(tmp_path / "tokenizer.json"))
    given = TokenizerConfig(path=tmp_path / "tokenizer.json")
    lines = ["".join(chr(97 + i // 8**k % 8) for k in range(3)) for i in range(80)]
    prepare(make(tmp_path, "\n".join(lines), tokenizer=given), tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    tokens, special = stream(prepared, "train"), prepared.info.special
    assert special.cls == special.pad
    assert special.pad not in tokens
    assert (tokens == special.sep).sum() == prepared.info.documents["train"]
    vocabulary = make_vocabulary(tokenizers.load(prepared.tokenizer_path))
    assert (vocabulary.start_id, vocabulary.end_id) == (None, special.sep)


def test_data_of_before_keep_their_frame(tmp_path):
    """What its tokens are called framed a text then, whatever the post-processor said."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>", "a"]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    now, before = SpecialTokens.of(tokenizer), SpecialTokens(pad=0, unk=3, cls=5, sep=6, mask=4)
    found = [make_vocabulary(tokenizer, special) for special in (None, now, before)]
    assert [(one.start_id, one.end_id) for one in found] == [(2, 1), (2, 1), (5, 6)]
    assert [one.ordinary.tolist() for one in found] == [[5, 6, 7], [5, 6, 7], [1, 2, 7]]


def test_literal_special_tokens_are_plain_text(tmp_path):
    text = "\n".join(f"say [MASK] or [CLS] and [PAD] {i}" for i in range(50))
    prepare(make(tmp_path, text), tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    tokens, special = stream(prepared, "train"), prepared.info.special
    assert not np.isin(tokens, [special.mask, special.pad]).any()
    assert (tokens == special.cls).sum() == prepared.info.documents["train"]
    assert "[ mask ]" in documents(prepared, "train")[0]
    tokenizer = tokenizers.load(prepared.tokenizer_path)  # elsewhere, it is the special token
    assert special.mask in tokenizer.encode("say [MASK]").ids


def test_large_vocabularies_take_four_bytes(tmp_path, prepared):
    tokenizer = tokenizers.load(prepared.tokenizer_path)
    tokenizer.add_tokens([f"extra{i}" for i in range(70_000)])
    tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
    text = "\n".join(f"extra{69_950 + i}" for i in range(50))
    config = make(tmp_path, text, tokenizer=TokenizerConfig(path=tmp_path))
    prepare(config, tmp_path / "out")
    tokens = stream(open_prepared(tmp_path / "out"), "train")
    assert tokens.dtype == np.int32
    assert tokens.max() > 65_536


def test_no_validation(tmp_path):
    info = prepare(make(tmp_path, "a b c\nd e f", validation_fraction=0.0), tmp_path / "out")
    assert set(info.rows) == {"train"}
    assert info.unigram_entropy == pytest.approx(math.log(6), abs=1e-5)
    with pytest.raises(InputError, match="no split 'validation', only train"):
        open_prepared(tmp_path / "out").source("validation")


def test_finished_work_is_reused(config, prepared):
    before = contents(prepared.directory)
    assert prepare(config, prepared.directory) == prepared.info
    assert contents(prepared.directory) == before


def test_another_configuration_is_refused_unless_overwritten(tmp_path):
    config = make(tmp_path, "a b\n" * 3 + "c d\n", validation_fraction=0.0)
    prepare(config, tmp_path / "out")
    other = dataclasses.replace(config, row_length=8)
    with pytest.raises(
        InputError, match=r"otherwise \(row_length 128 there and 8 here\); .*with --overwrite$"
    ):
        prepare(other, tmp_path / "out")
    with pytest.raises(InputError, match=r"\); as a caller says$"):
        prepare(other, tmp_path / "out", way_out="as a caller says")
    assert prepare(other, tmp_path / "out", overwrite=True).row_length == 8
    (tmp_path / "in.txt").write_text("something else\n")
    with pytest.raises(InputError, match=r"otherwise \(source_sha256 \w+ there and \w+ here\)"):
        prepare(other, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "out"}


def test_a_foreign_folder_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(InputError, match="something other than prepared data"):
            prepare(config, place, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"row_length": 2}, "row_length=2 has no room for text"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1\.0 is not in \[0, 1\)"),
    ],
)
def test_bad_configuration(settings, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(**settings)


def test_too_little_text(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"one document, of which nothing .* --document line"):
        prepare(make(tmp_path, "one line", validation_fraction=0.001), out)
    with pytest.raises(InputError, match=r"config, --prepare\.source\.document line\)"):
        prepare(make(tmp_path, "one line", validation_fraction=0.001), out)
    with pytest.raises(InputError, match="no text to train"):
        prepare(make(tmp_path, " \n \n"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.parametrize("number", [2, 30])
@pytest.mark.parametrize(("fraction", "how_many"), [(1e-9, "none"), (1 - 1e-9, "all")])
def test_a_fraction_that_gives_both_splits_is_named(number, fraction, how_many, tmp_path):
    text = "\n".join(f"line {i}" for i in range(number))
    (tmp_path / "own").mkdir()
    tokenizers.save(tokenizers.train("wordpiece", [text], 200), tmp_path / "own/tokenizer.json")
    tokenizer = TokenizerConfig(path=tmp_path / "own")
    config = make(tmp_path, text, validation_fraction=fraction, tokenizer=tokenizer)
    wanted = rf"^{how_many} of {number} documents .*: set it to ([\d.]+), which holds out one$"
    with pytest.raises(InputError, match=wanted) as caught:
        prepare(config, tmp_path / "out")
    for shard in ("0/2", "1/2"):
        prepare_shard(config, tmp_path / "parts", shard)
    with pytest.raises(InputError, match=f"{str(caught.value).rpartition(':')[2]}$"):
        merge(tmp_path / "parts")
    said = re.search(wanted, str(caught.value))
    assert said is not None
    found = dataclasses.replace(config, validation_fraction=float(said[1]))
    documents = {"train": number - 1, "validation": 1}
    assert prepare(found, tmp_path / "out").documents == documents


@pytest.mark.parametrize(
    "content",
    ['{"text": "a b"}\n{"text": ""}\n{"text": " "}\n{"text": "a b"}\n{"text": "\\u0000"}', "x"],
)
def test_what_has_no_text_is_counted(content, tmp_path):
    if content == "x":
        (tmp_path / "in.csv").write_text('text,n\na b,1\n,2\n" ",3\na b,4\n\x01,5\n')
        source = Csv(glob=str(tmp_path / "in.csv"), column="text")
    else:
        (tmp_path / "in.jsonl").write_text(content)
        source = Jsonl(glob=str(tmp_path / "in.jsonl"))
    tokenizer = TokenizerConfig(vocab_size=200)
    config = PrepareConfig(source=source, tokenizer=tokenizer, validation_fraction=0.0)
    info = prepare(config, tmp_path / "out")
    assert (info.documents, info.duplicates, info.blank) == ({"train": 1}, 1, 3)
    assert open_prepared(tmp_path / "out").info == info


def test_interrupted_work_vanishes(config, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        assert (tmp_path / ".out.partial").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxlm.data.rows.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_work_is_not_taken_for_finished_and_is_cleared(config, tmp_path, monkeypatch):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train.tokens").write_bytes(b"half of a token")
    with pytest.raises(InputError, match="no prepared data"):
        open_prepared(tmp_path / "out")
    info = prepare(config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(stream(open_prepared(tmp_path / "out"), "train")) == info.tokens["train"]


@pytest.mark.parametrize("limit", [1_000, 50_000], ids=["while tokenising", "while writing rows"])
def test_a_full_disk(config, prepared, tmp_path, limit, limit_file_size):
    """Both kinds of writer run into it."""
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(path=prepared.directory))
    limit_file_size(limit)
    with pytest.raises(InputError, match=r"out cannot be written \(.*File too large.*make room"):
        prepare(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out cannot be written"):
        prepare(config, tmp_path / "file" / "out")


def test_the_command_line(corpus_path, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    source = ("text", "--glob", str(corpus_path), "--document", "line")
    done = run("--out", str(tmp_path / "out"), "--tokenizer.vocab-size", "300", *source)
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout
    assert json.loads((tmp_path / "out" / "info.json").read_text())["vocab_size"] == 300

    failed = run("--out", str(tmp_path / "other"), "text", "--glob", "no/such/file")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: there is no file 'no/such/file'")
    assert failed.stderr.count("\n") == 1


def test_data_of_two_frames_are_not_mixed(prepared):
    older = dataclasses.replace(prepared.info.special, cls=5)
    other = dataclasses.replace(prepared, info=dataclasses.replace(prepared.info, special=older))
    check_alike([prepared, prepared])
    with pytest.raises(InputError, match=r"by the tokens 2 and 3, and .* by 5 and 3, .*; prepare"):
        check_alike([prepared, other])
