from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.data.labelled.framing import Framer

WORDS = "a b c d e f g h play ##ing ##ed un ##known john smith lives in new york who where ? ."


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """BERT's, with few words: [PAD] [UNK] [CLS] [SEP] [MASK] are 0 to 4."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*tokenizers.SPECIALS, *WORDS.split()]) + "\n")
    return tokenizers.load(path)


@pytest.fixture(scope="session")
def framer(tokenizer: Tokenizer) -> Framer:
    return Framer(tokenizer, max_length=12)


@pytest.fixture(scope="session")
def words(tokenizer: Tokenizer) -> Callable[..., str]:
    """Tokens written out."""
    return lambda ids: " ".join(tokenizer.id_to_token(int(i)) for i in ids)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write
