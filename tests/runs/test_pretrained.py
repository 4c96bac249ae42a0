"""What a run's configuration becomes beside its data and its devices."""

from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm.config import PretrainConfig, read_file
from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.runs import pretrained
from jaxlm.sharding import MeshConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def prepared(vocab_size: int) -> PreparedInfo:
    return PreparedInfo(
        name="x",
        row_length=64,
        vocab_size=vocab_size,
        special=SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4),
        documents={"train": 1},
        duplicates=0,
        rows={"train": 1000},
        tokens={"train": 64_000},
        fill={"train": 1.0},
        unigram_entropy=6.0,
        tokenizer_sha256="x",
        fingerprint="x",
        source_fingerprint="x",
        recipe={},
    )


@pytest.mark.parametrize(
    ("tensor", "padded"), [(1, 30_528), (4, 30_528), (12, 30_528), (5, 30_720), (128, 30_592)]
)
def test_the_vocabulary_is_padded_to_what_the_mesh_divides(tensor: int, padded: int) -> None:
    config = read_file(CONFIGS / "quickstart.py")
    assert isinstance(config, PretrainConfig)
    config = replace(config, mesh=MeshConfig(tensor=tensor))
    resolved = pretrained.resolve(config, [prepared(30_522)], "cpu")
    assert resolved.model.vocab_size == padded
    assert padded % 64 == padded % tensor == 0
    assert padded - 30_522 < 64 * tensor
