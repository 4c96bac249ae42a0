import dataclasses
import random
from pathlib import Path

import pytest

from jaxlm.data.prepare import PrepareConfig, TokenizerConfig, prepare
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.data.sources import TextFiles


def make_text(num_lines: int, seed: int = 0) -> str:
    """Distinct lines of words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(200)]
    return "".join(
        f"{number} {' '.join(rng.choices(words, k=rng.randint(1, 30)))}\n"
        for number in range(num_lines)
    )


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(make_text(400))
    return path


@pytest.fixture(scope="session")
def config(corpus_path: Path) -> PrepareConfig:
    return PrepareConfig(
        source=TextFiles(glob=str(corpus_path), document="line"),
        tokenizer=TokenizerConfig(vocab_size=300),
        row_length=16,
        validation_fraction=0.1,
    )


@pytest.fixture(scope="session")
def prepared(config: PrepareConfig, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    directory = tmp_path_factory.mktemp("prepared") / "words"
    prepare(config, directory)
    return open_prepared(directory)


@pytest.fixture(scope="session")
def other(
    prepared: Prepared, config: PrepareConfig, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    """Different text, the same tokenizer."""
    directory = tmp_path_factory.mktemp("other")
    (directory / "in.txt").write_text(make_text(100, seed=1))
    source = TextFiles(glob=str(directory / "in.txt"), document="line")
    tokenizer = TokenizerConfig(path=prepared.directory)
    prepare(dataclasses.replace(config, source=source, tokenizer=tokenizer), directory / "out")
    return open_prepared(directory / "out")
