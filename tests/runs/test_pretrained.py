"""What a run's configuration becomes beside its data and its devices."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config import PretrainConfig, read_file, to_json
from jaxlm.data.labelled.records import Record
from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.runs import folder, pretrained
from jaxlm.runs.pretrained import Pretrained
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.tasks.task import PretrainTask

CONFIGS = Path(__file__).parents[2] / "configs"


def test_what_is_not_finite_is_no_answer() -> None:
    def answers(config, variables, tokenizer, texts, **options):
        return [{"blanks": [{"probability": np.nan if "x" in t.text else 0.5}]} for t in texts]

    run: Any = SimpleNamespace(
        config=SimpleNamespace(model="m"),
        variables={"params": {"bias": jnp.full(2, jnp.nan)}},
        tokenizer=None,
        task=SimpleNamespace(answers=answers),
    )
    records = [Record(fields={"text": text}, origin="a:1") for text in ("a", "x", "b")]
    (_, one), (_, two), (_, three) = Pretrained.stream(run, records)
    assert one == three == {"blanks": [{"probability": 0.5}]}
    assert "is not finite, for its weights params/bias are not" in two["error"]


def test_one_device_answers() -> None:
    """No kernel runs on several by itself."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    everywhere = jax.device_put(jnp.ones(2), NamedSharding(mesh, PartitionSpec()))
    found = []

    def answers(config, variables, tokenizer, texts, **options):
        found.extend(jax.tree.leaves(variables))
        return [{"text": text.text} for text in texts]

    run: Any = SimpleNamespace(
        config=SimpleNamespace(model="m"),
        variables={"params": {"bias": everywhere}},
        tokenizer=None,
        task=SimpleNamespace(answers=answers),
    )
    list(Pretrained.stream(run, [Record(fields={"text": "a"}, origin="a:1")]))
    assert [len(x.sharding.device_set) for x in found] == [1] < [jax.device_count()]


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


@pytest.mark.parametrize("base", [False, True])
def test_a_run_keeps_its_vocabulary_on_another_mesh(tmp_path: Path, base: bool) -> None:
    """Its tables have as many rows, whatever mesh they were padded for."""
    config = read_file(CONFIGS / "quickstart.py")
    assert isinstance(config, PretrainConfig)
    of_base = replace(config.model, vocab_size=30_528) if base else None
    model = None if base else config.model
    config = replace(config, runs=tmp_path, name="x", model=model, base="b" if base else None)

    def on(tensor: int, size: int = 30_522, **others: Any) -> Any:
        run = replace(config, mesh=MeshConfig(tensor=tensor), **others)
        own = folder.begun(run)
        return pretrained.resolve(run, [prepared(size)], "cpu", of_base, own and own.model)

    begun = on(5)
    (config.directory / "config.json").parent.mkdir()
    (config.directory / "config.json").write_text(to_json(begun))
    assert on(1).model.vocab_size == 30_528  # nothing has been trained there
    (config.directory / "checkpoints" / "0").mkdir(parents=True)
    for resumed in (on(1), on(1, model=begun.model), on(8)):
        assert resumed.model.vocab_size == begun.model.vocab_size == 30_720
    if not base:
        given = replace(begun.model, vocab_size=30_528)
        assert on(1, model=given).model.vocab_size == 30_528
    assert on(1, 30_721).model.vocab_size == 30_784  # more: refused for its tokenizer, later
    another = pretrained.resolve(config, [prepared(30_522)], "cpu", of_base)
    assert another.model.vocab_size == 30_528  # that is not to resume the run of that name


@pytest.mark.parametrize(
    ("task", "losses"),
    [
        (MaskedLm(), {"unigram entropy": 6.0}),
        (CausalLm(), {"unigram entropy": 6.0}),
        (PermutationLm(), {"unigram entropy": 6.0}),
        (SpanCorruption(), {"unigram entropy": 6.0}),
        (ReplacedToken(), {}),  # fifty times a loss of two classes, and a generator's
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_loss_that_is_not_of_a_token_is_not_compared_with_tokens(
    task: PretrainTask, losses: dict[str, float]
) -> None:
    assert pretrained.unlearned(task, [prepared(100)]) == losses
    assert ("perplexity" in task.metrics(2.0, [prepared(100)], "train")) == bool(losses)


def test_what_is_not_evaluated_has_no_part_in_the_entropy() -> None:
    """A folder without a validation split may be the most of the text, and of other text."""
    train = prepared(100)
    one, other = (
        replace(train, unigram_entropy=entropy, tokens={"train": 64_000, "validation": tokens})
        for entropy, tokens in ((4.0, 300), (5.0, 100))
    )
    infos = [train, one, other]
    assert pretrained.unlearned(MaskedLm(), infos) == {"unigram entropy": 4.25}
    assert pretrained.unlearned(MaskedLm(), infos, "train") == {"unigram entropy": 5.0}
