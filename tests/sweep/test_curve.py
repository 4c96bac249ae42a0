"""Learning curves: which runs there are, and what is drawn of them, without any training."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from sweep_runs import leave_run

from jaxlm import config as configs
from jaxlm.config import Config, FinetuneConfig
from jaxlm.errors import InputError
from jaxlm.sweep.curve import curve, load

BILSTM = """
config = dataclasses.replace(
    config, name="scratch", base=None, tuning=Full(), model=BilstmConfig()
)
"""


@pytest.fixture
def argv(config: FinetuneConfig, tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.json").write_text(configs.to_json(config))
    text = "\n".join(
        (
            "import dataclasses\nfrom pathlib import Path\nfrom jaxlm.config import read_file",
            "from jaxlm.models.bilstm import BilstmConfig\nfrom jaxlm.peft.tuning import Full",
            'config = read_file(Path(__file__).with_name("tiny.json"))',
        )
    )
    (tmp_path / "scratch.py").write_text(text + BILSTM)
    return [str(tmp_path / "tiny.json"), str(tmp_path / "scratch.py"), "--sizes", "32", "8"]


def train(config: Config) -> None:
    """An accuracy that grows with the examples and falls with the seed."""
    assert isinstance(config, FinetuneConfig)
    accuracy = 0.5 + config.data.few_shot / 100 - config.data.split_seed / 10
    leave_run(config, {3: {"loss": 0.5, "accuracy": accuracy}}, 3)


def test_every_config_size_and_seed_is_a_run(argv: list[str], tmp_path: Path) -> None:
    seen: list[FinetuneConfig] = []

    def run_trial(config: Config) -> None:
        seen.append(config)
        train(config)

    rest = ["--seeds", "2", "--steps", "3", "--base", "elsewhere", "--", "--data.batch-size", "4"]
    asked, plans = load([*argv, *rest])
    directory = curve(asked, plans, run_trial, Console(file=StringIO()))
    assert directory == tmp_path / "runs" / "learning_curve"
    assert len(seen) == 8
    assert {c.base for c in seen if c.directory.parent.name == "tiny"} == {"elsewhere"}
    assert {c.base for c in seen if c.directory.parent.name == "scratch"} == {None}
    for config in seen:
        assert config.train.seed == config.data.split_seed
        assert (config.train.steps, config.train.epochs, config.data.batch_size) == (3, None, 4)
    scores = json.loads((directory / "curve.json").read_text())["accuracy"]
    assert scores["tiny"] == scores["scratch"]
    assert scores["tiny"]["8"] == pytest.approx([0.58, 0.48])
    assert scores["tiny"]["32"] == pytest.approx([0.82, 0.72])
    assert "| tiny | 0.5300 ± 0.0707 | 0.7700 ± 0.0707 |" in (directory / "curve.md").read_text()
    assert (directory / "curve.png").stat().st_size > 10_000
    curve(asked, plans, run_trial, Console(file=StringIO()))
    assert len(seen) == 8  # what is finished is not run again


def test_what_fails_is_left_out(argv: list[str]) -> None:
    def run_trial(config: Config) -> None:
        assert isinstance(config, FinetuneConfig)
        if config.data.few_shot == 32:
            raise InputError("too few")
        train(config)

    asked, plans = load([*argv, "--seeds", "1"])
    out = StringIO()
    directory = curve(asked, plans, run_trial, Console(file=out, width=200))
    assert "too few" in out.getvalue()
    assert list(json.loads((directory / "curve.json").read_text())["accuracy"]["tiny"]) == ["8"]


def test_a_config_that_fails_does_not_end_the_others(argv: list[str]) -> None:
    def run_trial(config: Config) -> None:
        if config.directory.parent.name == "tiny":
            raise InputError("out of memory")
        train(config)

    asked, plans = load([*argv, "--seeds", "2"])
    directory = curve(asked, plans, run_trial, Console(file=StringIO(), width=200))
    scores = json.loads((directory / "curve.json").read_text())["accuracy"]
    assert (scores["tiny"], sorted(scores["scratch"])) == ({}, ["32", "8"])
    text = (directory / "curve.md").read_text()
    assert "Failed trials, which are in no mean:" in text
    assert "- tiny/few_shot=8_seed=0 failed: out of memory" in text

    def fail(config: Config) -> None:
        raise InputError("no disk")

    for one in directory.rglob("result.json"):
        one.unlink()
    with pytest.raises(InputError, match=r"all 8 trials failed, the first: .*few_shot=8.*no disk"):
        curve(asked, plans, fail, Console(file=StringIO(), width=200))


def test_another_encoder_under_another_seed_is_refused(argv: list[str]) -> None:
    def run_trial(config: Config) -> None:
        leave_run(config, {3: {"loss": 0.5, "accuracy": 0.5}}, 3, base=f"{config.train.seed}")

    with pytest.raises(InputError, match=r"seed=1 began with another encoder"):
        curve(*load([*argv, "--seeds", "2"]), run_trial, Console(file=StringIO()))


def test_refuses_what_cannot_be_drawn(argv: list[str]) -> None:
    with pytest.raises(InputError, match="--seeds 0"):
        load([*argv, "--seeds", "0"])
    with pytest.raises(InputError, match=r"two of the configs are named .*tiny"):
        load([argv[0], *argv])
    with pytest.raises(InputError, match="config files"):
        load(["--sizes", "8"])
    with pytest.raises(InputError, match="--sizes 0"):
        load([*argv, "0"])
    for given in (["--name", ""], ["--", "--name", ""]):
        with pytest.raises(InputError, match="name='': the run folder needs a name"):
            load([*argv, *given])


def test_a_bucket_is_refused_before_a_folder_of_that_name_is_made(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"gs:/b/learning_curve is in a bucket"):
        curve(*load([*argv, "--", "--runs", "gs://b"]), train)
    assert not (tmp_path / "gs:").exists()
