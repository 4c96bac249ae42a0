"""Text from TensorFlow Datasets, without TensorFlow."""

import hashlib
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import DatasetNotFoundError

from jaxlm.data import beam
from jaxlm.data.files import OnRead, ignore
from jaxlm.errors import InputError
from jaxlm.runtime.storage import locate

_CHUNK = 1024  # records read at once: single reads are slow in large array_record files


@dataclass(frozen=True, kw_only=True)
class Tfds:
    """A data set of TensorFlow Datasets, by name; downloaded and prepared if it is not yet."""

    name: str
    """Name of the data set, such as 'imdb_reviews' or 'wikipedia/20230601.simple'."""
    split: str = "train"
    """A split, or a slice of one: 'train[:10%]', 'train+test'."""
    field: str = "text"
    """The text feature that is the document."""
    data_dir: str | None = None
    """Folder of data sets; None: the default, ~/tensorflow_datasets."""
    beam: tuple[str, ...] = ()
    """Options of Apache Beam, for data sets that are prepared with it, such as runner=FlinkRunner;
    none means that one process of this machine prepares them."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in the order of the data set."""
        feature = self._text_feature()
        for record in self._raw_records(on_read):
            yield _plain(record[self.field], feature)

    def records(self, on_read: OnRead = ignore) -> Iterator[dict[str, Any]]:
        """All features of every example as plain Python, classes by their names."""
        features = self._features()
        for record in self._raw_records(on_read):
            yield _plain(record, features)

    def _raw_records(self, on_read: OnRead) -> Iterator[dict[str, Any]]:
        source = self._data_source()
        for start in range(0, len(source), _CHUNK):
            for record in source.__getitems__(range(start, min(start + _CHUNK, len(source)))):
                on_read(1)
                yield record

    def size(self) -> int:
        """Number of examples."""
        return len(self._data_source())

    def fingerprint(self) -> str:
        """A sha256 of the data set's description (name, version, split sizes) and the settings."""
        info = self._builder().info
        description = repr((info.full_name, self.split, self.field)) + info.as_json
        return hashlib.sha256(description.encode()).hexdigest()

    def _features(self) -> Any:
        return self._builder().info.features

    def _text_feature(self) -> Any:
        features = self._features()
        if self.field not in features or features[self.field].np_dtype not in (object, str, bytes):
            raise InputError(
                f"{self.name} has no text feature {self.field!r} among "
                f"{', '.join(map(repr, features))}; name the one that holds the text"
            )
        return features[self.field]

    def _data_source(self) -> Any:
        builder = self._builder()
        try:
            return builder.as_data_source(split=self.split)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{self.name} has no split {self.split!r} among "
                f"{', '.join(map(repr, builder.info.splits))}"
            ) from error
        except NotImplementedError as error:  # TFDS's word for the tfrecord format
            raise InputError(
                f"{self.name} in {builder.data_dir} was not prepared as array_record; "
                f"prepare it again into another data_dir"
            ) from error

    def _builder(self) -> Any:
        builder = self._find_builder()
        if not builder.is_prepared():
            self._prepare(builder)
        return builder

    def _find_builder(self) -> Any:
        # TFDS registers these on import, but stops at the first module whose needs are not met.
        import tensorflow_datasets.question_answering
        import tensorflow_datasets.summarization
        import tensorflow_datasets.text
        import tensorflow_datasets.text_simplification
        import tensorflow_datasets.translate  # noqa: F401

        if self.data_dir is not None:
            locate(self.data_dir)  # says what a bucket needs
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of whatever is unprepared
        try:
            try:
                return tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
            except TypeError:  # a folder of prepared data, read without its code, has one format
                return tfds.builder(self.name, data_dir=self.data_dir)
        except (DatasetNotFoundError, ValueError) as error:
            raise InputError(
                f"TensorFlow Datasets knows no {self.name!r}, and data_dir {self.data_dir!r} holds "
                "no prepared data set of that name"
            ) from error
        except ModuleNotFoundError as error:
            raise InputError(
                f"{self.name} cannot be opened, because its definition needs {error.name}"
            ) from error

    def _prepare(self, builder: Any) -> None:
        recipe = (
            f"prepare it on a machine that has, with tfds.builder({self.name!r}, "
            "file_format='array_record').download_and_prepare(), and copy the folder to "
            f"{builder.data_dir}"
        )
        if not _online():
            raise InputError(
                f"{self.name} is not in {builder.data_dir} and there is no network to download it; "
                f"{recipe}"
            )
        try:
            beam.prepare(builder, self.beam)
        except ModuleNotFoundError as error:
            raise InputError(
                f"preparing {self.name} needs {error.name}, which is not installed here; {recipe}"
            ) from error
        except OSError as error:  # requests' exceptions are OSErrors
            raise InputError(f"downloading {self.name} failed ({error}); {recipe}") from error


def _plain(value: Any, feature: Any) -> Any:
    """Plain Python for what a feature decodes to; a class of -1 (unknown) is None."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(value[name], inner) for name, inner in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(value, dict):  # a sequence of dicts comes as a dict of sequences
            inner: Any = feature.feature
            return {name: [_plain(v, inner[name]) for v in value[name]] for name in value}
        return [_plain(item, feature.feature) for item in value]
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value)) if value >= 0 else None
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _online() -> bool:
    """Asked first, because a download without a network retries for minutes."""
    try:
        urllib.request.urlopen("https://storage.googleapis.com/tfds-data/", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer is an answer
    except OSError:
        return False
    return True
