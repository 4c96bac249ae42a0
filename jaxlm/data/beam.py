"""Preparing data sets of TensorFlow Datasets that are made with Apache Beam, without TensorFlow."""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from jaxlm.errors import InputError

_LOCAL = (None, "DirectRunner")


def prepare(builder: Any, options: Sequence[str]) -> None:
    """Download and prepare what ``builder`` describes; :class:`InputError` where Beam is missing.

    Args:
        builder: of array_record, in a folder or below ``gs://``.
        options: Beam's, such as ``runner=FlinkRunner``; none: all is done by this process.
    """
    config = tfds.download.DownloadConfig()
    if options or isinstance(builder, tfds.core.BeamBasedBuilder):
        config.beam_options = _pipeline_options(builder.name, options)
    if os.fspath(builder.data_dir).startswith("gs://"):
        builder._example_writer = lambda: BucketWriter(builder.info.file_format)
    builder.download_and_prepare(download_config=config)


class BucketWriter(tfds.core.ExampleWriter):
    """Writes a local file and copies it: array_record reads ``gs://`` and cannot write there."""

    def write(self, path: Any, examples: Iterable[Any]) -> None:
        """Write one shard."""
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "shard.array_record"
            super().write(local, examples)
            with local.open("rb") as source, epath.Path(path).open("wb") as target:
                shutil.copyfileobj(source, target)  # pyright: ignore[reportArgumentType]


def _pipeline_options(name: str, options: Sequence[str]) -> Any:
    try:
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
            StandardOptions,
        )
    except ImportError:
        raise InputError(
            f"{name} is prepared with Apache Beam, which is not installed: "
            "pip install 'jaxlm[beam]'"
        ) from None
    flags = [f"--{option.removeprefix('--')}" for option in options]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse prints, and exits
            result = PipelineOptions(flags)
            runner = result.view_as(StandardOptions).runner
            known = result.get_all_options(drop_default=True)
            all_of_them = result.get_all_options(drop_default=True, retain_unknown_options=True)
    except SystemExit:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise InputError(f"Apache Beam does not take the options {options}: {reason}") from None
    # Those of other runners may be known to their job servers alone; here they would be dropped.
    if runner in _LOCAL and (unknown := sorted(all_of_them.keys() - known.keys())):
        raise InputError(f"Apache Beam's DirectRunner knows no option {unknown[0]!r}: check it")
    return result
