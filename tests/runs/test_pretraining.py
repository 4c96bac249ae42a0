"""Whole runs, tiny: from text to a run folder, interrupted and resumed, evaluated and used."""

import itertools
import shutil
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_models import BERT
from tiny_runs import make_config
from tokenizers import Tokenizer, pre_tokenizers

from jaxlm import tree
from jaxlm.config import PretrainConfig
from jaxlm.data import tokenizers
from jaxlm.data.loader import eval_batches
from jaxlm.data.prepare import TokenizerConfig, prepare
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.data.sources import TextFiles
from jaxlm.decode.fill_mask import FillMask
from jaxlm.errors import InputError
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.optim import OptimizerConfig
from jaxlm.runs import pretrained
from jaxlm.runs.base import Base
from jaxlm.runs.folder import CHECKPOINTS
from jaxlm.runs.pretraining import open_data, pretrain
from jaxlm.sharding import MeshConfig
from jaxlm.train.loop import evaluate
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import best_step, list_steps
from jaxlm.train.view import View

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    # In bfloat16; test_finetuning.py resumes in float32. The batch grows after two steps.
    config = make_config(tmp_path_factory.mktemp("pretrain"), steps=STEPS)
    data = replace(config.data, ramp_sizes=(8,), ramp_steps=(2,))
    return replace(config, data=data, model=replace(config.model, dtype="bfloat16"))


@pytest.fixture(scope="module")
def console() -> Console:
    """What the run below writes to."""
    return Console(file=StringIO(), width=200)


@pytest.fixture(scope="module")
def whole(config: PretrainConfig, console: Console) -> Path:
    """A run that nothing interrupted."""
    return pretrain(config, console=console)


def final_state(config: PretrainConfig) -> dict[str, np.ndarray]:
    read = pretrained.open_pretrained(config.directory, STEPS)
    return {path: np.asarray(leaf) for path, leaf in tree.leaves_with_path(read.variables)}


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add = View.add

    def add_and_stop(view: View, now: int, *rest: Any) -> None:
        add(view, now, *rest)
        if now == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(View, "add", add_and_stop)


def test_run_folder_is_self_contained(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "checkpoints", "metrics.jsonl", "loss.png"}
    assert list((whole / "tensorboard").glob("events.*"))
    lines = read_jsonl(whole / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == STEPS
    assert {line["step"] for line in lines if "eval/loss" in line} == {0, 3, STEPS}
    tokens = [0.0, *(line["tokens"] for line in lines if "tokens" in line)]
    rows = [(after - before) / 16 for before, after in itertools.pairwise(tokens)]  # nearly full
    assert rows == pytest.approx([8, 8, 16, 16, 16, 16], abs=2)
    wanted = {"lr", "grad_norm", "overflow", "skipped", "tokens", "tokens_per_s", "train/accuracy"}
    assert wanted <= lines[1].keys()


def test_a_run_says_how_it_attends(whole: Path, console: Console) -> None:
    assert isinstance(console.file, StringIO)
    line = "attention: plain, rows of up to 16 tokens have small squares of scores"
    assert line in console.file.getvalue()


def test_interrupted_and_resumed_is_bit_identical(
    config: PretrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_b = replace(config, name="interrupted")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        pretrain(config_b)
    (stopped,) = [s for s in list_steps(config_b.directory / "checkpoints") if s > 0]
    assert stopped < STEPS
    pretrain(config_b)
    a, b = final_state(config), final_state(config_b)
    assert all(np.array_equal(a[path], b[path]) for path in a)
    losses = [
        [(line["step"], line["train/loss"]) for line in read_jsonl(folder / "metrics.jsonl")
         if "train/loss" in line]
        for folder in (whole, config_b.directory)
    ]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4, tensor=2), "pmap"], ids=str)
def test_resumed_elsewhere_sees_the_same(
    config: PretrainConfig, whole: Path, monkeypatch: pytest.MonkeyPatch, mesh: MeshConfig | str
) -> None:
    config = replace(
        config,
        model=replace(config.model, dtype="float32", dropout_rate=0.0, attention_dropout_rate=0.0),
        optimizer=OptimizerConfig(peak_lr=1e-3),
    )
    reference = replace(config, name="reference")
    pretrain(reference)
    moved = replace(config, name=f"moved-{mesh}"[:11])
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        pretrain(moved)
    there = {"placement": "pmap"} if mesh == "pmap" else {"mesh": mesh}
    pretrain(replace(moved, **there))  # pyright: ignore[reportArgumentType]
    a, b = final_state(reference), final_state(moved)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=1e-5, err_msg=path)


def test_complete_run_is_left_alone(
    config: PretrainConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "metrics.jsonl").read_text()
    pretrain(config)
    assert "complete" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_text() == before


def test_no_resume_refuses_a_used_folder(config: PretrainConfig, whole: Path) -> None:
    with pytest.raises(InputError, match="holds a run"):
        pretrain(replace(config, resume=False))


def test_resume_with_other_data_or_seed_is_refused(config: PretrainConfig, whole: Path) -> None:
    saved = (whole / "config.json").read_text()
    other = replace(config.prepare, tokenizer=TokenizerConfig(vocab_size=300, kind="bpe"))
    path = str(Path(config.data.paths[0]).with_name("other"))
    with pytest.raises(InputError, match="tokenizer_sha256"):
        pretrain(replace(config, prepare=other, data=replace(config.data, paths=(path,))))
    other_seed = replace(config, train=replace(config.train, seed=1, log_every=2))
    with pytest.raises(InputError, match=r"settings: train\.seed=0 there and 1 here; change"):
        pretrain(other_seed)
    assert (whole / "config.json").read_text() == saved


@pytest.mark.slow
def test_changes_are_accepted_when_asked_for(
    config: PretrainConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / whole.name)
    longer = replace(config, runs=tmp_path, train=replace(config.train, seed=1, steps=STEPS + 1))
    pretrain(replace(longer, accept_changes=True))
    assert f"extending the finished run from step {STEPS}" in capsys.readouterr().out
    assert max(list_steps(tmp_path / whole.name / CHECKPOINTS)) == STEPS + 1
    pretrain(longer)  # the run has the new settings now
    assert "complete" in capsys.readouterr().out


@pytest.mark.slow
def test_the_best_is_of_what_was_evaluated_alike(
    config: PretrainConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / whole.name)
    task = replace(config.task, eval_masking=MaskingConfig(rate=0.9))
    longer = replace(config, runs=tmp_path, train=replace(config.train, steps=STEPS + 2))
    pretrain(replace(longer, task=task, accept_changes=True))
    assert "the best checkpoint is chosen anew" in capsys.readouterr().out
    assert best_step(tmp_path / whole.name / CHECKPOINTS) > STEPS


def test_resume_with_another_model_names_the_shapes(config: PretrainConfig, whole: Path) -> None:
    model = replace(config.model, mlp_dim=64)
    with pytest.raises(InputError, match=r"32.*64|64.*32"):
        pretrain(replace(config, model=model))


def test_evaluate_and_fill_mask(config: PretrainConfig, whole: Path) -> None:
    read = pretrained.open_pretrained(whole)
    data = open_prepared(config.data.paths[0])
    metrics = evaluate(read.placement, read.state, eval_batches(data, read.config.data.batch_size))
    recorded = [line for line in read_jsonl(whole / "metrics.jsonl") if "eval/loss" in line]
    assert metrics["loss"] == pytest.approx(min(line["eval/loss"] for line in recorded), abs=1e-5)

    rough = evaluate(
        read.placement,
        read.quantized().state,
        eval_batches(data, read.config.data.batch_size),
    )
    assert 0 < abs(rough["loss"] - metrics["loss"]) < 0.01

    fill = FillMask(read.model.apply, read.variables, read.tokenizer, 32)
    (blanks, single) = fill(["red [MASK] blue [MASK]", "a [MASK]"], top_k=3)
    assert [len(blank) for blank in blanks] == [3, 3]
    assert "[MASK]" not in blanks[0][0].text
    assert blanks[0][0].probability >= blanks[0][1].probability
    (alone,) = fill(["a [MASK]"], top_k=3)  # in another batch: the same numbers
    assert [f.token for f in alone[0]] == [f.token for f in single[0]]
    assert alone[0][0].probability == pytest.approx(single[0][0].probability, abs=1e-6)
    with pytest.raises(InputError, match="no blank"):
        list(fill(["no blank at all"]))
    with pytest.raises(InputError, match="more than the model's 32"):
        list(fill(["red " * 40 + "[MASK]"]))


def test_another_tokenizer_in_the_run_folder(
    config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    tokenizer = TokenizerConfig(vocab_size=300, kind="bpe")
    prepare(replace(config.prepare, tokenizer=tokenizer), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(InputError, match="is not the tokenizer that the checkpoint was trained"):
        pretrained.open_pretrained(folder)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        pretrained.open_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"batch_size": 12}}, r"=12 is not divisible by 8 .* 16; with --accept-changes"),
        ({"data": {"ramp_sizes": (20,)}}, r"data.ramp_sizes=20 is not divisible by 8 .* is 24"),
        ({"model": {"max_length": 8}}, r"rows of 16 tokens.*max_length=8"),
        ({"model": {"vocab_size": 20}}, r"vocab_size=20 is smaller than the tokenizer's"),
        ({"mesh": {"fsdp": 3}}, r"fsdp=3.* does not fit 8 devices"),
        ({"mesh": {"tensor": 8}}, r"heads of size 2 cannot be split over tensor=8"),
    ],
    ids=str,
)
def test_impossible_combinations(
    config: PretrainConfig, change: dict[str, Any], message: str
) -> None:
    parts = {name: replace(getattr(config, name), **fields) for name, fields in change.items()}
    with pytest.raises(InputError, match=message):
        pretrain(replace(config, name="never", **parts))
    assert not (config.runs / "never" / "config.json").exists()


def test_rows_that_are_too_long_are_not_prepared_first(config: PretrainConfig, tmp_path: Path):
    new = tmp_path / "prepared"
    data = replace(config.data, paths=(str(new),))
    with pytest.raises(InputError, match=r"\(--prepare.row-length 8 and another"):
        pretrain(
            replace(config, name="never", data=data, model=replace(config.model, max_length=8))
        )
    assert not new.exists()


def test_too_long_rows_of_a_folder_that_the_config_does_not_prepare(config: PretrainConfig) -> None:
    """Shorter ones that it would prepare were of other text than the folder holds."""
    model = replace(config.model, max_length=8)
    own = replace(config, prepare=None, data=replace(config.data, paths=("mine",)))
    with pytest.raises(InputError) as refused:
        pretrained.require_length(own, model, 16)
    assert "mine again, into another folder, with scripts/prepare.py" in str(refused.value)
    assert "--row-length 8 --tokenizer.path mine" in str(refused.value)
    assert "--prepare." not in str(refused.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            "one split",
            r"no validation split, .* scripts/prepare\.py --validation-fraction 0\.05",
        ),
        (
            "short",
            r"row_length 16 and .* 8: .* scripts/prepare\.py --row-length 16 --tokenizer.path .*/t",
        ),
        (
            "tokens",
            r"tokenizer_sha256 \w{12} and .* \w{12}: .* scripts/prepare\.py --row-length 16 "
            r"--tokenizer.path .*\.json$",
        ),
        ("no mask", r"no token \[MASK\] or <mask>: prepare .* \(leave tokenizer\.path out\)"),
        ("no words", r"where words begin is not known .* task\.masking\.unit"),
        ("unprepared", r"no validation split, .* with --prepare\.validation-fraction 0\.05"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_before_anything_is_made(
    config: PretrainConfig,
    whole: Path,
    other: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jaxlm.runs.pretraining.train", None)  # it is not called
    assert config.prepare is not None
    own, folder = tokenizers.load(whole), tmp_path / other
    changes: dict[str, Any] = {}
    if other in ("tokens", "no mask", "no words"):
        if other == "no words":
            own = tokenizers.train("bpe", ["red green blue"], 280)
            own.pre_tokenizer = pre_tokenizers.Whitespace()
        text = own.to_str()
        own = Tokenizer.from_str(text.replace("[MASK]", "[M]") if other == "no mask" else text)
        own.add_tokens(["purple"])
    tokenizers.save(own, tmp_path / "tokenizer.json")
    changes["tokenizer"] = TokenizerConfig(path=tmp_path)
    changes["row_length"] = 8 if other == "short" else 16
    changes["validation_fraction"] = 0.1 if other.startswith(("no ", "sh", "to")) else 0.0
    wanted = replace(config.prepare, **changes)
    if other != "unprepared":
        prepare(wanted, folder)
    first = (config.data.paths[0],) if other in ("short", "tokens") else ()
    run = replace(
        config,
        runs=tmp_path / "runs",
        data=replace(config.data, paths=(*first, str(folder))),
        prepare=wanted if other == "unprepared" else None,
    )
    if other == "no words":
        unit = replace(run.task.masking, unit="word")
        run = replace(run, task=replace(run.task, masking=unit))
    with pytest.raises(InputError, match=message):
        pretrain(run)
    assert not run.runs.exists()
    assert folder.exists() == (other != "unprepared")


@pytest.mark.parametrize(
    ("has_base", "way_out"),
    [
        (False, "without --prepare.tokenizer.path, --prepare.tokenizer.kind bpe knows all"),
        (True, "choose a base whose tokenizer knows them"),
    ],
)
def test_what_preparing_advises_is_possible_here(
    config: PretrainConfig, has_base: bool, way_out: str, tmp_path: Path
) -> None:
    tokenizer, path = tokenizers.train("wordpiece", ["red green"], 60), tmp_path / "tokenizer.json"
    tokenizers.save(tokenizer, path)
    (tmp_path / "in.txt").write_text("\n".join(f"красный red {i}" for i in range(99)))
    source = TextFiles(glob=str(tmp_path / "in.txt"), document="line")
    base = Mock(spec=Base, tokenizer_path=path, tokenizer=tokenizer) if has_base else None
    assert config.prepare is not None
    run = replace(
        config,
        data=replace(config.data, paths=(str(tmp_path / "out"),)),
        prepare=replace(config.prepare, source=source, tokenizer=TokenizerConfig(path=path)),
    )
    said = StringIO()
    open_data(run, base, Console(file=said, width=999))
    assert way_out in said.getvalue()


def test_not_finite_gradients_stop_with_the_step_named(
    config: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with a way out that works."""
    mad = replace(
        config,
        name="mad",
        optimizer=OptimizerConfig(peak_lr=1e30, clip_norm=None, warmup_share=0.0),
        train=replace(config.train, steps=8, max_skipped=3, num_evals=1),
    )
    said = r"not finite in 3 steps in a row, .* step \d+: lower .*peak_lr, with --accept-changes,"
    with pytest.raises(InputError, match=said):
        pretrain(mad)
    calm = replace(mad, optimizer=replace(mad.optimizer, peak_lr=1e-3))
    with pytest.raises(InputError, match=r"optimizer\.peak_lr=1e\+30 there"):
        pretrain(calm)
    pretrain(replace(calm, accept_changes=True))
    assert "resuming from step 0 " in capsys.readouterr().out
    assert max(list_steps(mad.directory / CHECKPOINTS)) == 8


def test_jax_sees_eight_devices() -> None:
    assert jax.device_count() == 8


def test_rows_that_a_trained_model_cannot_read() -> None:
    """Which has as many positions as it was trained with: unlike one to be trained, no other."""
    data = Mock(spec=Prepared, directory="prepared/x", info=Mock(row_length=65))
    pretrained.check_rows("runs/x", replace(BERT, max_length=65), data)
    with pytest.raises(
        InputError, match=r"x reads 64 at most: .* with scripts/prepare\.py --row-length 64"
    ):
        pretrained.check_rows("runs/x", replace(BERT, max_length=64), data)
