"""Pretraining that starts from a run, or from a published model; and a finished run made longer."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import BERT
from tiny_runs import make_config

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.loader import eval_batches
from jaxlm.data.prepare import TokenizerConfig, prepare
from jaxlm.data.prepared import open_prepared
from jaxlm.data.sources import TextFiles
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.tuning import LoraConfig
from jaxlm.runs import base as bases
from jaxlm.runs import command_line, pretrained, pretraining, resume
from jaxlm.runs.folder import read_config
from jaxlm.runs.pretraining import pretrain
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.train import restore
from jaxlm.train.loop import TrainConfig, evaluate
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import list_steps

GOLDEN = Path(__file__).parents[1] / "golden" / "published_bert.safetensors"
STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    return make_config(tmp_path_factory.mktemp("continued"), steps=STEPS)


@pytest.fixture(scope="module")
def whole(config: PretrainConfig) -> Path:
    return pretrain(config)


@pytest.fixture(scope="module")
def other(config: PretrainConfig, whole: Path) -> PretrainConfig:
    """From the run, on another text, with nothing prepared."""
    assert config.prepare is not None
    folder = config.runs.parent
    words = np.random.default_rng(1).choice(["dog", "cat", "red", "fox"], (300, 12))
    (folder / "other.txt").write_text("\n".join(" ".join(line) for line in words))
    source = TextFiles(glob=str(folder / "other.txt"), document="line")
    return replace(
        config,
        name="adapted",
        base=str(whole),
        model=None,
        data=replace(config.data, paths=(str(folder / "other"),)),
        prepare=replace(config.prepare, source=source),
    )


def losses(directory: Path) -> dict[int, float]:
    lines = read_jsonl(directory / "metrics.jsonl")
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


def test_continues_from_a_run_on_another_text(
    other: PretrainConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = pretrain(other)
    assert f"from {whole}: encoder and head" in capsys.readouterr().out
    base = pretrained.open_pretrained(whole)
    data = open_prepared(other.data.paths[0])  # cut by the base's tokenizer
    rows = eval_batches(data, base.config.data.batch_size)
    assert losses(adapted)[0] == pytest.approx(
        evaluate(base.placement, base.state, rows)["loss"], abs=1e-5
    )
    assert losses(adapted)[STEPS] < losses(adapted)[0]
    read = pretrained.open_pretrained(adapted)
    assert read.tokenizer.to_str() == base.tokenizer.to_str()
    assert replace(read.config.model, dtype=None) == replace(base.config.model, dtype=None)
    pretrain(other)  # and is complete
    assert "complete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_head_that_does_not_fit_is_new(
    other: PretrainConfig, config: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's encoder alone, as published by one that has no such head."""
    folder = config.runs.parent / "published"
    read = pretrained.open_pretrained(config.directory)
    params = {"encoder": jax.tree.map(np.asarray, read.variables["params"]["encoder"])}
    assert isinstance(read.config.model, BertConfig)
    huggingface.save(folder, params, read.config.model, read.tokenizer)
    pretrain(replace(other, name="headless", base=str(folder)))
    assert f"from {folder}: encoder; its head is new" in capsys.readouterr().out


def write_published(folder: Path) -> Path:
    """A BERT of transformers, with a vocabulary of small letters."""
    folder.mkdir()
    with safe_open(GOLDEN, framework="np") as file:
        (folder / "config.json").write_text(file.metadata()["config"])
    arrays, prefix = load_file(GOLDEN), "weights/"
    weights = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    save_file(weights, folder / "model.safetensors")
    words = ["red", "green", "blue", "cat", "dog", *"abcdefghijklmn"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    return folder


@pytest.mark.slow
def test_continues_from_a_published_model_with_its_head(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_published(tmp_path / "model")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    assert size % 64  # so that rows are added, which must not be likely
    assert config.prepare is not None
    adapted = replace(
        config,
        name="published",
        base=str(model),
        model=None,
        prepare=replace(config.prepare, row_length=8),
        data=replace(config.data, paths=(str(tmp_path / "prepared"),)),
        train=replace(config.train, steps=1, num_evals=1),
    )
    directory = pretrain(adapted)
    assert "encoder and head" in capsys.readouterr().out
    published = huggingface.load(model)
    assert published.lm_head is not None
    read = pretrained.open_pretrained(directory)
    assert read.config.model is not None
    params = jax.tree.map(jnp.asarray, {**published.params, "head": published.lm_head})
    plain = WithLmHead(published.config.make(), published.config.make_lm_head())
    rows = next(eval_batches(open_prepared(adapted.data.paths[0]), 16))
    tokens = jnp.asarray(rows["tokens"], jnp.int32)
    segments = jnp.where(jnp.arange(tokens.shape[1])[None] < rows["lengths"][:, None], 0, -1)
    wanted = plain.apply({"params": params}, tokens, segment_ids=segments)
    restored = pretrained.open_pretrained(directory, 0)
    found = restored.model.apply(restored.variables, tokens, segment_ids=segments)
    assert found.shape[-1] == 64 * -(-size // 64)
    np.testing.assert_allclose(
        jax.nn.log_softmax(found)[..., :size], jax.nn.log_softmax(wanted), atol=1e-4
    )


def test_a_base_that_reads_small_letters_alone_cuts_the_text_so(
    config: PretrainConfig, tmp_path: Path
) -> None:
    """As its folder says, whatever its tokenizer does, and whoever reads it."""
    model = write_published(tmp_path / "model")
    (model / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (model / "modules.json").write_text("[]")
    (model / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    (tmp_path / "text.txt").write_text("\n".join(f"RED {a} {b}" for a in "abcde" for b in "fghij"))
    assert config.prepare is not None
    source = TextFiles(glob=str(tmp_path / "text.txt"), document="line")
    wanted = replace(config.prepare, source=source, validation_fraction=0.3)
    base = bases.load(str(model))
    paths = replace(config.data, paths=(str(tmp_path / "made"),))
    made = replace(config, base=str(model), prepare=wanted, data=paths)
    (data,) = pretraining.open_data(made, base, Console(quiet=True))
    assert data.info.unknown_share == 0
    by_hand = replace(wanted, tokenizer=TokenizerConfig(path=base.tokenizer_path))  # pyright: ignore
    prepare(by_hand, tmp_path / "by_hand")
    paths = replace(config.data, paths=(str(tmp_path / "by_hand"),))
    alone = replace(made, prepare=None, data=paths)
    (same,) = pretraining.open_data(alone, base, Console(quiet=True))
    assert same.info.fingerprint == data.info.fingerprint


def test_text_of_another_tokenizer_is_refused(
    other: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    assert other.prepare is not None
    foreign = replace(other.prepare, tokenizer=TokenizerConfig(vocab_size=50))
    prepare(foreign, tmp_path / "foreign")
    paths = replace(other.data, paths=(str(tmp_path / "foreign"),))
    with pytest.raises(InputError, match="with another tokenizer than that of base=") as refused:
        pretrain(replace(other, name="never", data=paths, prepare=None))
    way_out = str(refused.value).rpartition("--tokenizer.path ")[2]
    again = replace(other.prepare, tokenizer=TokenizerConfig(path=Path(way_out)))
    prepare(again, tmp_path / "again")
    paths = replace(other.data, paths=(str(tmp_path / "again"),))
    pretrain(replace(other, name="again", data=paths, prepare=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1}, r"num_layers=1 \(there 2\), would have \S+ of shape \(1, .* \(2, "),
        (
            {"max_length": 16},
            r"max_length=16 \(there 32\), would have .* \(16, 16\), .* \(32, 16\)",
        ),
        ({"mlp_dim": 64, "epsilon": 1e-5}, r"mlp_dim=64 \(there 32\); epsilon=1e-05"),
        ({"vocab_size": 128}, r"vocab_size=128 is not the base's 64: leave it out"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_its_base_is_refused(
    other: PretrainConfig, config: PretrainConfig, change: dict[str, Any], message: str
) -> None:
    model = replace(config.model, **change)
    with pytest.raises(InputError, match=message):
        pretrain(replace(other, name="never", model=model))


def test_a_model_of_another_kind_than_its_base_is_refused(other: PretrainConfig) -> None:
    with pytest.raises(InputError, match=r"is a LlamaConfig, and the base's a BertConfig"):
        pretrain(replace(other, name="never", model=LlamaConfig()))
    with pytest.raises(InputError, match="base and model are None"):
        replace(other, base=None)


@pytest.mark.slow
def test_a_longer_phase_with_other_fields_goes_on_where_the_base_was(
    other: PretrainConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, with more positions, on longer rows; what the base knew is kept."""
    assert other.prepare is not None
    longer = replace(
        other,
        name="longer",
        prepare=replace(other.prepare, row_length=48),
        data=replace(other.data, paths=(str(tmp_path / "longer"),)),
        train=replace(other.train, steps=1, num_evals=1),
    )
    with pytest.raises(InputError, match=r"rows of 48 tokens .* max_length=32") as refused:
        pretrain(longer)
    way_out = re.search(r"--model.max-length \d+", str(refused.value))
    assert way_out is not None
    options = [*way_out[0].split(), "--model.epsilon", "1e-6"]
    directory = pretrain(command_line.changed(longer, options, prog="test"))
    said = "encoder and head; other than there: model.max_length=48 (there 32), model.epsilon=1e-06"
    assert said in capsys.readouterr().out.replace("\n", " ")
    found = pretrained.open_pretrained(directory, 0).variables["params"]["encoder"]
    known = pretrained.open_pretrained(whole).variables["params"]["encoder"]
    table = np.asarray(found["position_embed"]["embedding"])
    np.testing.assert_array_equal(table[:32], known["position_embed"]["embedding"])
    np.testing.assert_array_equal(table[32:], table[:16])
    np.testing.assert_array_equal(
        found["token_embed"]["embedding"], known["token_embed"]["embedding"]
    )
    # The resolved config starts the same phase.
    resolved = command_line.read(directory / "config.json")
    assert isinstance(resolved, PretrainConfig)
    assert (resolved.model, resolved.base) == (
        read_config(directory, PretrainConfig).model,
        str(whole),
    )
    pretrain(resolved)
    assert "complete" in capsys.readouterr().out


def test_the_plot_shows_what_the_base_reached_on_the_same_text(
    config: PretrainConfig, other: PretrainConfig, whole: Path
) -> None:
    base = bases.load(str(whole))
    found = pretraining.loss_of_base(replace(config, name="next"), base, base.tokenizer)
    assert found == {f"{config.name} at step {STEPS}": losses(whole)[STEPS]}
    harder = replace(config, task=MaskedLm(masking=MaskingConfig(rate=0.4)))
    published = replace(base, step=None)
    for changed, from_what in ((other, base), (harder, base), (config, published)):
        assert pretraining.loss_of_base(changed, from_what, base.tokenizer) == {}


@pytest.mark.slow
def test_a_phase_begins_with_the_moments_of_its_base(other: PretrainConfig, whole: Path) -> None:
    short = replace(other, name="decay", train=replace(other.train, steps=1, num_evals=1))
    begun = pretrain(replace(short, base_moments=True))
    placement = pretrained.open_pretrained(whole).placement
    target = {"opt_state": placement.abstract_state.opt_state}
    found, wanted = (
        restore.restore_part(directory / "checkpoints", target, step).state
        for directory, step in ((begun, 0), (whole, STEPS))
    )
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 0
    muon = replace(short, name="never", base_moments=True, optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(InputError, match=r"base=.* do not fit .*: leave base_moments out"):
        pretrain(muon)
    published = replace(bases.load(str(whole)), step=None)
    with pytest.raises(InputError, match="is no run, and has no moments"):
        pretraining.base_moments(placement, published)
    with pytest.raises(InputError, match="base_moments=True, and there is no base"):
        replace(muon, base=None, model=LlamaConfig())


@pytest.mark.slow
def test_a_finished_run_is_made_longer(
    config: PretrainConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is evaluated and saved on the way, as often as one that was as long from the start."""
    shutil.copytree(whole, tmp_path / whole.name)
    train = replace(config.train, steps=3 * STEPS, num_evals=6, patience=20)
    longer = replace(config, runs=tmp_path, train=replace(train, patience=None))
    directory = pretrain(longer)
    assert f"extending the finished run from step {STEPS}" in capsys.readouterr().out
    assert list(losses(directory)) == [0, 2, 4, 6, 8, 10, 12]
    assert max(list_steps(directory / "checkpoints")) == 3 * STEPS
    pretrain(longer)
    assert "complete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_phase_goes_on_when_its_base_has_gone_on_or_is_gone(
    other: PretrainConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its parameters are its own; of a base that is another, or none, it is said."""
    base = tmp_path / "base"
    shutil.copytree(whole, base)
    phase = replace(other, name="phase", runs=tmp_path, base=str(base))
    directory = pretrain(phase)
    began = restore.peek(directory / "checkpoints")
    trained = read_config(base, PretrainConfig)
    pretrain(replace(trained, runs=tmp_path, name="base", train=replace(trained.train, steps=6)))
    longer = replace(phase, train=replace(phase.train, steps=STEPS + 1, num_evals=1))
    with pytest.raises(InputError, match=r"base_sha256 \w+.* add --accept-changes, or give"):
        pretrain(longer)
    pretrain(replace(longer, accept_changes=True))
    assert f"extending the finished run from step {STEPS}" in capsys.readouterr().out
    shutil.rmtree(base)
    longer = replace(phase, train=replace(phase.train, steps=STEPS + 2, num_evals=1))
    with pytest.raises(InputError, match=r"there is no folder .* add --accept-changes: the run"):
        pretrain(longer)
    pretrain(replace(longer, accept_changes=True))
    assert "without the base: there is no folder" in capsys.readouterr().out
    read = pretrained.open_pretrained(directory)
    assert max(list_steps(directory / "checkpoints")) == STEPS + 2
    assert restore.peek(directory / "checkpoints")["base_sha256"] == began["base_sha256"]
    assert read.config.model == read_config(whole, PretrainConfig).model
    with pytest.raises(InputError, match="there is no folder") as never_begun:
        pretrain(replace(longer, name="new", accept_changes=True))
    assert "accept-changes" not in str(never_begun.value)


@pytest.mark.slow
def test_epochs_and_evaluations_count_every_data_set(
    config: PretrainConfig, other: PretrainConfig, whole: Path
) -> None:
    """In whatever order they are named."""
    pretrain(replace(other, name="first"))  # prepares the other text
    paths = (*config.data.paths, *other.data.paths)
    rows = [open_prepared(path).info.rows for path in paths]
    assert rows[0]["train"] != rows[1]["train"]
    train = replace(config.train, steps=None, epochs=0.5, num_evals=1, eval_rows=None)
    found = []
    for name, order in (("forth", paths), ("back", paths[::-1])):
        data = replace(config.data, paths=order)
        directory = pretrain(replace(config, name=name, data=data, prepare=None, train=train))
        read = pretrained.open_pretrained(directory, 0)
        batches = [*pretrained.eval_rows([open_prepared(path) for path in order], 16)]
        seen = sum(int((batch["lengths"] > 0).sum()) for batch in batches)
        assert seen == rows[0]["validation"] + rows[1]["validation"]
        assert losses(directory)[0] == pytest.approx(
            evaluate(read.placement, read.state, batches)["loss"], abs=1e-5
        )
        found.append(max(losses(directory)))
    assert found == [math.ceil(0.5 * (rows[0]["train"] + rows[1]["train"]) / 16)] * 2


def test_who_may_go_on_from_another_base(config: PretrainConfig) -> None:
    """Adapters are worth nothing without the encoder that they were trained on."""
    changed = replace(config, accept_changes=True)
    data = LabelledConfig(train=Table(path="x.csv"))
    tuned = FinetuneConfig(name="x", base="b", data=data, train=config.train, accept_changes=True)
    adapted = replace(tuned, tuning=LoraConfig())
    facts = {"data": ["a"], "tokenizer_sha256": "b", "monitor": "loss"}
    saved, now = (resume.make_cursor(config, base_sha256=x, **facts) for x in ("c", "d"))
    for whole in (changed, tuned):
        resume.check_same(whole, saved, now)
        with pytest.raises(InputError, match=r"base_sha256 c .* restore it, add --accept-changes,"):
            resume.check_same(replace(whole, accept_changes=False), saved, now)
    with pytest.raises(InputError, match="restore it, or give the run another --name"):
        resume.check_same(adapted, saved, now)


def test_a_run_of_minutes_is_made_longer(config: PretrainConfig) -> None:
    """What is done is counted anew: the share of the new minutes, not of the old."""
    minutes = replace(config, train=replace(config.train, steps=None, minutes=1.0))
    facts = {"data": ["a"], "tokenizer_sha256": "b", "base_sha256": None, "monitor": "loss"}
    start = resume.make_cursor(minutes, **facts)
    done = {"share": 1.0, "elapsed_s": 60.0, "evals_done": 2, "best": 3.0, "since_best": 1}
    done |= {"examples_seen": 8}
    longer = replace(minutes, train=replace(minutes.train, minutes=4.0))
    cursor = resume.resume_cursor(longer, start | done, resume.make_cursor(longer, **facts))
    assert (cursor["share"], cursor["since_best"], cursor["best"]) == (0.25, 0, 3.0)
    assert "evals_done" not in cursor
    untrained = start | done | {"examples_seen": 0, "elapsed_s": 120.0}
    cursor = resume.resume_cursor(longer, untrained, resume.make_cursor(longer, **facts))
    assert cursor["share"] == 0.0  # the warm-up is yet to come
    same = resume.resume_cursor(minutes, start | done, start)
    assert same == start | done
    accepting = replace(minutes, accept_changes=True)
    for what in ({"monitor": "accuracy"}, {"data": ["b"]}):
        other = resume.make_cursor(minutes, **facts | what)
        changed = resume.resume_cursor(accepting, start | done, other)
        assert not {"best", "since_best"} & changed.keys()  # of another metric, or other data
        assert changed["share"] == 1.0


TUNED = FinetuneConfig(
    name="tuned",
    base="b",
    model=BertConfig(),
    data=LabelledConfig(train=Table(path="x.csv")),
    task=Classification(pooling="mean"),
    tuning=LoraConfig(),
    train=TrainConfig(steps=1),
)
EMBEDS = replace(TUNED, task=Embedding())
XLNET = XlnetConfig(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32)


@pytest.mark.parametrize(
    ("of", "change", "compares"),
    [
        (None, {"task": MaskedLm(eval_masking=MaskingConfig(rate=0.3))}, False),
        (None, {"task": MaskedLm(isolate_documents=True)}, False),
        (None, {"task": CausalLm()}, False),
        (None, {"train": {"eval_rows": 64}}, False),
        (None, {"model": {"epsilon": 1e-6}}, False),
        (None, {"task": MaskedLm(masking=MaskingConfig(rate=0.3))}, True),
        (None, {"task": MaskedLm(eval_masking=MaskingConfig(rate=0.15))}, True),
        (None, {"model": {"dropout_rate": 0.0, "remat": "full"}}, True),
        (None, {"optimizer": OptimizerConfig(peak_lr=1e-5), "data": {"batch_size": 32}}, True),
        (TUNED, {"task": Classification(pooling="max")}, False),
        (TUNED, {"data": {"max_length": 16}}, False),
        (TUNED, {"tuning": LoraConfig(alpha=1.0)}, False),
        (TUNED, {"task": Classification(pooling="mean", label_smoothing=0.1)}, True),
        (TUNED, {"tuning": LoraConfig(dropout_rate=0.1)}, True),
        (TUNED, {"data": {"batch_size": 16}, "train": {"eval_rows": 64}}, True),
        (EMBEDS, {"data": {"batch_size": 16}}, False),
        (EMBEDS, {"task": Embedding(temperature=1.0)}, False),
    ],
)
def test_what_is_evaluated_otherwise_does_not_compare(
    config: PretrainConfig, of: FinetuneConfig | None, change: dict[str, Any], compares: bool
) -> None:
    """The best so far is kept exactly where today's evaluation would measure the same."""
    before = replace(of or config, accept_changes=True)
    parts = {
        name: replace(vars(before)[name], **part) if isinstance(part, dict) else part
        for name, part in change.items()
    }
    facts = {"data": ["a"], "tokenizer_sha256": "b", "base_sha256": None, "monitor": "loss"}
    saved = resume.make_cursor(before, **facts) | {"best": [0.0, 3.0, 3.0], "since_best": 1}
    after = replace(before, **parts)
    start = resume.make_cursor(after, **facts)
    cursor = resume.resume_cursor(after, saved, start)
    assert ("best" in cursor, "since_best" in cursor) == (compares, compares)
    assert cursor["evaluation"] == start["evaluation"]
    del saved["evaluation"]  # of an older version, where it is not known
    assert "best" in resume.resume_cursor(after, saved, start)


def test_evaluations_have_the_fingerprints_of_before(config: PretrainConfig) -> None:
    """Those of runs that exist: in whatever Python, and whatever fields are new by then."""
    facts = {"data": ["a"], "tokenizer_sha256": "b", "base_sha256": None, "monitor": "loss"}
    found = [resume.make_cursor(x, **facts)["evaluation"][:8] for x in (config, TUNED, EMBEDS)]
    assert found == ["2e2175bb", "d758ab2f", "a667dc6e"]
    whole = replace(EMBEDS, task=Embedding(temperature=1.0))
    number = replace(EMBEDS, task=Embedding(temperature=1.0))
    object.__setattr__(number.task, "temperature", 1)  # as a config file may say it
    one, other = (resume.make_cursor(x, **facts)["evaluation"] for x in (whole, number))
    assert one == other


@pytest.mark.parametrize(
    ("model", "changed", "is_how"),
    [
        (replace(BERT, attention=None), {"attention": "blockwise"}, True),
        (XLNET, {"attention": "uni"}, False),
    ],
)
def test_attention_may_change_where_it_is_how_and_not_what_sees_what(
    config: PretrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    changed: dict[str, Any],
    is_how: bool,
) -> None:
    before, after = (replace(config, model=one) for one in (model, replace(model, **changed)))
    facts = {"data": ["a"], "tokenizer_sha256": "b", "base_sha256": None, "monitor": "loss"}
    saved, start = (resume.make_cursor(x, **facts) for x in (before, after))
    assert (saved == start) == is_how
    monkeypatch.setattr(resume, "read_config", lambda *_: before)
    saved |= {"examples_seen": 8, "share": 0.5}
    if is_how:
        resume.check_config(Path("x"), after, saved)
    else:
        with pytest.raises(InputError, match=r"model\.attention=bi there and uni here"):
            resume.check_config(Path("x"), after, saved)


def test_a_run_with_changes_goes_on_where_a_batch_begins() -> None:
    said: list[str] = []
    begin = lambda seen: -(-seen // 8) * 8
    there = {"examples_seen": 16, "seed": 0}
    assert resume.at_a_batch(there, begin, said.append) == there
    assert not said
    moved = resume.at_a_batch({"examples_seen": 1001, "seed": 0}, begin, said.append)
    assert moved == {"examples_seen": 1008, "seed": 0}
    (line,) = said
    assert re.search(r"no batch begins after 1,001 examples: .* after 1,008", line)


@pytest.mark.slow
def test_a_run_that_trained_nothing_says_so_each_time(
    config: PretrainConfig, tmp_path: Path
) -> None:
    """6 ms are over when the step is compiled. The same command does not call it complete."""
    train = replace(config.train, steps=None, minutes=1e-4)
    timed = replace(config, runs=tmp_path, name="timed", train=train)
    for _ in range(2):
        with pytest.raises(InputError, match="nothing was trained"):
            pretrain(timed)
    longer = replace(timed, train=replace(train, minutes=None, steps=STEPS))
    assert max(list_steps(pretrain(longer) / "checkpoints")) == STEPS


@pytest.mark.slow
def test_an_unfinished_run_keeps_its_length(
    config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    """Its learning rate follows the length from the first step on."""
    shutil.copytree(whole, tmp_path / whole.name)
    shutil.rmtree(tmp_path / whole.name / "checkpoints" / str(STEPS))
    longer = replace(config, runs=tmp_path, train=replace(config.train, steps=3 * STEPS))
    with pytest.raises(InputError, match=r"train\.steps=4 there and 12 here"):
        pretrain(longer)
    pretrain(replace(longer, accept_changes=True))
