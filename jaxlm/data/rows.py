"""Rows of token ids as a data set of TensorFlow Datasets, in array_record files."""

import os
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int, Shaped

from jaxlm.data.files import OnRead, ignore
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath

VERSION = "1.0.0"
_RECORDS_PER_FILE = 10_000  # a random read takes time in proportion to the records of its file
_OPTIONS = "group_size:1"  # every record can be read alone
_ONE_BY_ONE = "readahead_buffer_size:0,max_parallelism:0"  # else a seek reads ahead: 900 µs


def write(
    directory: Path,
    name: str,
    splits: dict[str, np.ndarray],
    *,
    row_length: int,
    pad: int,
    on_write: OnRead = ignore,
) -> None:
    """Cut each split's tokens into rows and write them, with the metadata, below ``directory``.

    A record is ``{"tokens": [row_length], "length": number of tokens before the padding}``; only
    the last row of a split is padded. ``tfds.data_source(name, data_dir=directory's parent)``
    reads it, if the directory bears that name. ``on_write`` is told the number of rows.
    """
    folder = directory / VERSION
    folder.mkdir()
    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(
                shape=(row_length,),
                dtype=next(iter(splits.values())).dtype.type,
                encoding="bytes",
            ),
            "length": tfds.features.Scalar(dtype=np.int32),
        }
    )
    infos = []
    for split, tokens in splits.items():
        num_rows = -(-len(tokens) // row_length)
        num_files = -(-num_rows // _RECORDS_PER_FILE)
        files = []
        for i in range(num_files):
            file = folder / f"{name}-{split}.array_record-{i:05d}-of-{num_files:05d}"
            first, last = (num_rows * k // num_files for k in (i, i + 1))
            _write_file(file, tokens, range(first, last), row_length, pad, features)
            on_write(last - first)
            files.append((last - first, file.stat().st_size))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[rows for rows, _ in files],
                num_bytes=sum(size for _, size in files),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=VERSION,
        description="Rows of token ids, packed and written by jaxlm.",
        check_data=False,
    )


def _write_file(
    path: Path, tokens: np.ndarray, rows: range, row_length: int, pad: int, features: Any
) -> None:
    try:
        with closing(ArrayRecordWriter(str(path), _OPTIONS)) as writer:
            for row in rows:
                real = tokens[row * row_length : (row + 1) * row_length]
                padded = np.full(row_length, pad, tokens.dtype)
                padded[: len(real)] = real
                record = {"tokens": padded, "length": len(real)}
                writer.write(features.serialize_example(record))
    except RuntimeError as error:  # array_record's word for a full disk
        raise OSError(str(error)) from error


class Rows:
    """Random access to the rows of one split; pickles to a few kilobytes."""

    def __init__(self, directory: StoragePath, split: str):
        builder: Any = tfds.builder_from_directory(os.fspath(directory / VERSION))
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split=split, deserialize_method=raw)
        self._features = builder.info.features
        files = builder.info.splits[split]
        self._files = [os.fspath(path) for path in files.filepaths]
        self._ends = np.cumsum(files.shard_lengths)
        self._own = threading.local()  # each thread's readers, which stand at a record
        self._place = f"{directory} ({split})"
        self._around: tuple[bytes, bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_own": threading.local()}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """``{"tokens": [row_length], "length": int32}``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        try:
            record = self._features.deserialize_example_np(self._records[int(index)])
        except (RuntimeError, ValueError) as error:  # array_record checks sums as it reads
            raise InputError(
                f"{self._place}: row {index} is damaged ({error}); prepare the data again"
            ) from error
        return {"tokens": record["tokens"], "length": np.int32(record["length"])}

    def read(self, indices: Int[np.ndarray, " rows"]) -> dict[str, Shaped[np.ndarray, "rows ..."]]:
        """``{"tokens": [rows, row_length], "length": int32 [rows]}``, as one by one but faster."""
        if not len(indices) or indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"rows {indices.tolist()} of {len(self)}")
        try:
            records = self._read(indices)
        except (RuntimeError, ValueError, IndexError):
            records = []  # one by one, to name the row that is damaged
        # A full row's record is the same bytes as another's, but for its tokens.
        before, after = self._around or self._learn_layout(records, indices)
        starts, stop = len(before), -len(after) or None
        if records and before and all(r.startswith(before) and r.endswith(after) for r in records):
            shape, dtype = self._features["tokens"].shape, self._features["tokens"].np_dtype
            joined = b"".join([record[starts:stop] for record in records])
            tokens = np.frombuffer(joined, dtype).reshape(-1, *shape)
            return {"tokens": tokens, "length": np.full(len(records), shape[0], np.int32)}
        rows = [self[index] for index in indices.tolist()]
        return {name: np.stack([row[name] for row in rows]) for name in ("tokens", "length")}

    def _read(self, indices: np.ndarray) -> list[bytes]:
        """Records, by a seek each: 2 µs. array_record's own reads of numbers look through the index
        of the whole file for each: 12 µs, in files of 10,000 records."""
        readers = self._own.__dict__
        files = np.searchsorted(self._ends, indices, side="right")
        places = indices - np.append(0, self._ends)[files]
        records = []
        for file, place in zip(files.tolist(), places.tolist(), strict=True):
            name = self._files[file]
            if name not in readers:
                options = {"options": _ONE_BY_ONE, "file_reader_buffer_size": 4096}
                readers[name] = ArrayRecordReader(name, **options)
            readers[name].seek(place)
            records.append(readers[name].read())
        return records

    def _learn_layout(self, records: Sequence[bytes], indices: np.ndarray) -> tuple[bytes, bytes]:
        """What stands before and after the tokens in the record of a full row; empty: not known."""
        for record, index in zip(records, indices.tolist(), strict=False):
            row = self[index]
            parts = record.split(row["tokens"].tobytes())
            if row["length"] == row["tokens"].size and len(parts) == 2:
                self._around = parts[0], parts[1]
                return self._around
        return b"", b""
