"""Preparing on several machines: each tokenises a shard of the documents, one merges them."""

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxlm.data import tokenizers
from jaxlm.data.corpus import Corpus, Shard, encode, interleave, make_spools
from jaxlm.data.fidelity import Letters, report
from jaxlm.data.prepare import (
    Counts,
    PrepareConfig,
    check_place,
    check_same,
    dataset_name,
    finish,
    make_recipe,
)
from jaxlm.data.prepared import INFO, TOKENIZER, PreparedInfo
from jaxlm.data.tabular import parse_json
from jaxlm.data.workspace import bar, building, say
from jaxlm.errors import InputError
from jaxlm.runtime.storage import on_disk

_FACTS = "shard.json"


def prepare_shard(
    config: PrepareConfig,
    directory: Path | str,
    shard: str,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Tokenise the shard ``i/N`` of all documents, for :func:`merge` to join.

    Every machine reads the whole source and tokenises its own shard, into a folder beside
    ``directory``. All must have one tokenizer, so ``config.tokenizer.path`` is needed.
    """
    directory = on_disk(directory)
    part = Shard.parse(shard)
    if config.extend_vocab is not None:
        raise InputError(
            f"shard {shard} cannot extend the vocabulary, because all shards must have one "
            "tokenizer: prepare a part of the text with --extend-vocab and no --shard, and give "
            "its folder to --tokenizer.path"
        )
    if config.tokenizer.path is None:
        raise InputError(
            f"shard {shard} needs tokenizer.path, because all shards must have one tokenizer; "
            "prepare a sample first and name its folder"
        )
    recipe = make_recipe(config)
    target = _folder(directory) / f"{part.index:05d}-of-{part.count:05d}"
    if target.exists() and not overwrite:
        check_same(target, _read(target)["recipe"], recipe)
        say(console, f"{target} is already prepared")
        return target
    with building(target, _FACTS) as scratch:
        corpus = Corpus(
            source=config.source, validation_fraction=config.validation_fraction, shard=part
        )
        tokenizer = tokenizers.load(config.tokenizer.path)
        with bar(console, f"tokenising {shard}", config.source.size()) as on_read:
            tally = encode(corpus, tokenizer, scratch, on_read).tally
        tokenizers.save(tokenizer, scratch / TOKENIZER)
        letters = Letters.of(tokenizer.normalizer, tally.characters)
        facts = {
            "count": part.count,
            **Counts.of(corpus)._asdict(),
            "letters": [letters.changed, letters.total],
            "recipe": recipe,
        }
        (scratch / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    report(console, tokenizer, tally, config.tokenizer)
    return target


def merge(
    directory: Path | str, *, overwrite: bool = False, console: Console | None = None
) -> PreparedInfo:
    """Join all shards of ``directory`` and remove them.

    The result is, byte for byte, what :func:`jaxlm.data.prepare.prepare` would have made at once.
    """
    directory = on_disk(directory)
    check_place(directory)
    if (directory / INFO).exists() and not overwrite:
        raise InputError(
            f"{directory} exists; replace it with --overwrite, or choose another folder"
        )
    folder = _folder(directory)
    shards = sorted(folder.glob("*-of-*"))
    if not shards:
        raise InputError(f"{folder} holds no shards; prepare them with --shard i/N")
    facts = [_read(shard) for shard in shards]
    count = facts[0]["count"]
    expected = {f"{i:05d}-of-{count:05d}" for i in range(count)}
    if wrong := expected ^ {shard.name for shard in shards}:
        raise InputError(
            f"{folder} does not hold exactly {count} shards; missing or in the way: "
            f"{', '.join(sorted(wrong))}"
        )
    for shard, fact in zip(shards, facts, strict=True):
        way_out = f"prepare it again as {shards[0]} was, with --overwrite"
        check_same(shard, fact["recipe"], facts[0]["recipe"], way_out)

    tokenizer = tokenizers.load(shards[0])
    vocab_size = tokenizers.vocab_size(tokenizer)
    duplicates, blank = (sum(fact.get(name, 0) for fact in facts) for name in Counts._fields[:2])
    lowest = sorted(share for fact in facts for share in fact.get("lowest", ()))
    with building(directory, INFO) as scratch:
        parts = [make_spools(shard, vocab_size) for shard in shards]
        spools = make_spools(scratch, vocab_size)
        for split, spool in spools.items():
            interleave([part[split] for part in parts], spool)
        recipe, name = facts[0]["recipe"], dataset_name(directory)
        changed, letters = map(sum, zip(*(fact["letters"] for fact in facts), strict=True))
        share = changed / max(letters, 1)
        counts = Counts(duplicates, blank, tuple(lowest[:2]))
        info = finish(scratch, name, spools, tokenizer, recipe, counts, share, console)
    shutil.rmtree(folder)
    return info


def _folder(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.shards")


def _read(shard: Path) -> dict[str, Any]:
    try:
        return parse_json((shard / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{shard} is not a finished shard ({error}); remove it") from error
