"""Real names, prepared from a few invented records by a copy of the real builder."""

import types
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from jaxlm.data.tfds import Tfds
from jaxlm.errors import InputError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    reviews = [{"text": f"review {i} é", "label": i % 2} for i in range(20)]
    _prepare(directory, "imdb_reviews", {"train": reviews, "test": reviews[:3]})
    premises = [{"premise": "p", "hypothesis": "h", "label": 0, "idx": i} for i in range(3)]
    _prepare(directory, "glue/mnli_mismatched", {"validation": premises})
    return directory


def _prepare(data_dir: Path, name: str, records: dict) -> None:
    builder = Tfds(name=name, data_dir=str(data_dir))._find_builder()
    shadow = types.new_class(
        type(builder).__name__,
        (type(builder),),
        {"skip_registration": True},
        lambda namespace: namespace.update(
            name=builder.name,
            __module__=type(builder).__module__,
            _split_generators=lambda self, _: {s: enumerate(r) for s, r in records.items()},
        ),
    )
    shadow(
        config=builder.builder_config, data_dir=data_dir, file_format="array_record"
    ).download_and_prepare()


@pytest.mark.parametrize(
    ("split", "count"), [("train", 20), ("train[:25%]", 5), ("train[2:4]+test", 5)]
)
def test_splits_and_slices(data_dir, split, count):
    source = Tfds(name="imdb_reviews", split=split, data_dir=str(data_dir))
    texts = list(source.documents())
    assert len(texts) == source.size() == count
    assert all(text.startswith("review") and text.endswith("é") for text in texts)
    assert texts == list(source.documents())


def test_legacy_names_are_found(data_dir):
    source = Tfds(
        name="glue/mnli_mismatched", split="validation", field="premise", data_dir=str(data_dir)
    )
    assert list(source.documents()) == ["p", "p", "p"]


class _Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
    def _split_generators(self, _):
        return {name: iter(records) for name, records in self._split_datasets.items()}


def test_a_prepared_folder_without_code_is_found_by_its_name(tmp_path):
    _Builder(
        name="my_own",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"body": tfds.features.Text()}),
        description="",
        split_datasets={"train": enumerate([{"body": "x"}, {"body": "y"}])},
        data_dir=tmp_path,
        file_format="array_record",
    ).download_and_prepare()
    source = Tfds(name="my_own", field="body", data_dir=str(tmp_path))
    assert sorted(source.documents()) == ["x", "y"]
    assert len(source.fingerprint()) == 64


def test_fingerprint_follows_the_settings(data_dir):
    train = Tfds(name="imdb_reviews", data_dir=str(data_dir))
    assert train.fingerprint() == Tfds(name="imdb_reviews", data_dir=str(data_dir)).fingerprint()
    test = Tfds(name="imdb_reviews", split="test", data_dir=str(data_dir))
    assert test.fingerprint() != train.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "no_such_name"}, "knows no 'no_such_name'"),
        ({"name": "Not A Name"}, "knows no 'Not A Name'"),
        ({"name": "imdb_reviews", "split": "dev"}, "no split 'dev' among '.*test'"),
        ({"name": "imdb_reviews", "split": "train[:x]"}, "no split"),
        ({"name": "imdb_reviews", "field": "body"}, "no text feature 'body' among .*'label'"),
        ({"name": "imdb_reviews", "field": "label"}, "no text feature 'label'"),
    ],
)
def test_bad_settings(data_dir, settings, message):
    with pytest.raises(InputError, match=message) as error:
        list(Tfds(data_dir=str(data_dir), **settings).documents())
    assert "\n" not in str(error.value)


def test_without_a_network_it_says_so_at_once(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    message = r"imdb_reviews is not in .* no network to download it; .*download_and_prepare"
    with pytest.raises(InputError, match=message):
        list(Tfds(name="imdb_reviews", data_dir=str(tmp_path)).documents())
