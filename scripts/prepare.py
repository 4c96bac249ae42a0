"""Prepare text for training: read it, tokenise it, pack it into rows.

python scripts/prepare.py --out prepared/pydocs
python scripts/prepare.py --out prepared/books --row-length 512 text --glob 'books/*.txt'
python scripts/prepare.py --out prepared/news --tokenizer.path prepared/books jsonl --glob '*.jsonl'

On several machines: all call it with --shard 0/4 … 3/4, then one with --merge instead.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from jaxlm.data.prepare import PrepareConfig, prepare
from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.shards import merge, prepare_shard
from jaxlm.data.sources import Csv, Jsonl, PyDocs, TextFiles, Tfds
from jaxlm.errors import report_input_errors
from jaxlm.runtime.console import make_console
from jaxlm.runtime.storage import StoragePath, locate

Source = (
    Annotated[PyDocs, tyro.conf.subcommand("pydocs")]
    | Annotated[TextFiles, tyro.conf.subcommand("text")]
    | Annotated[Jsonl, tyro.conf.subcommand("jsonl")]
    | Annotated[Csv, tyro.conf.subcommand("csv")]
    | Annotated[Tfds, tyro.conf.subcommand("tfds")]
)
FORM = (
    tyro.conf.CascadeSubcommandArgs,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.FlagCreatePairsOff,
)


@dataclass(frozen=True, kw_only=True)
class Arguments(PrepareConfig):
    """Prepare text for training: read it, tokenise it, pack it into rows."""

    source: Source = field(default_factory=PyDocs)
    """Where the text comes from."""
    out: Path
    """The folder to make; may be gs://bucket/folder."""
    overwrite: bool = False
    """Replace what is there."""
    shard: str | None = None
    """Prepare only shard i of N, given as i/N with i from 0."""
    merge: bool = False
    """Join the finished shards; the source and all settings are taken from them."""


def main(arguments: Arguments) -> None:
    options = {"overwrite": arguments.overwrite, "console": make_console(stderr=True)}
    if arguments.shard is not None:
        print(prepare_shard(arguments, arguments.out, arguments.shard, **options))
    elif arguments.merge:
        summarize(merge(arguments.out, **options), locate(arguments.out))
    else:
        summarize(prepare(arguments, arguments.out, **options), locate(arguments.out))


def summarize(info: PreparedInfo, directory: StoragePath) -> None:
    table = Table("", *info.rows, box=None, header_style="bold")
    table.add_row("documents", *(f"{count:,}" for count in info.documents.values()))
    table.add_row("tokens", *(f"{count:,}" for count in info.tokens.values()))
    table.add_row(f"rows of {info.row_length}", *(f"{count:,}" for count in info.rows.values()))
    table.add_row("fill", *(f"{share:.2%}" for share in info.fill.values()))
    console = make_console()
    console.print(table)
    dropped = f"{info.duplicates:,} duplicates"
    dropped += f" and {info.blank:,} without text" if info.blank else ""
    console.print(
        f"{dropped} dropped; vocabulary {info.vocab_size:,}; unigram entropy "
        f"{info.unigram_entropy:.3f} nats\nin {directory}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    with report_input_errors():
        main(tyro.cli(Arguments, config=FORM))
