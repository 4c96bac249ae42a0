"""Run folders that earlier code wrote are opened, used and trained to their end.

Where one no longer can be, the change log has to say how to move; golden/make_old_runs_golden.py
says which code wrote these.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_xlnet

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Record, Table
from jaxlm.data.loader import eval_batches
from jaxlm.data.prepared import open_prepared
from jaxlm.decode.fill_mask import FillMask
from jaxlm.models.model import example_inputs
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.peft import tuning
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import BitFit, Tuning
from jaxlm.runs import finetuned, pretrained
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.folder import CHECKPOINTS, CONFIG
from jaxlm.runs.pretraining import pretrain
from jaxlm.train import restore
from jaxlm.train.loop import TrainConfig, evaluate
from jaxlm.train.metrics import read_jsonl

ARCHIVE = Path(__file__).parents[1] / "golden" / "old_runs.tar.xz"
BLANKS = ["red [MASK] blue [MASK]", "a [MASK]"]
TEXTS = ["red red cat", "dog blue", "green"]


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What that code computed; its folders are in the working directory, where the configs look."""
    shutil.unpack_archive(ARCHIVE, tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_a_pretraining_run_is_evaluated_and_fills_in(expected: dict[str, Any]) -> None:
    read = pretrained.open_pretrained("runs/whole")
    batches = eval_batches(open_prepared("prepared"), read.config.data.batch_size)
    loss = evaluate(read.placement, read.state, batches)["loss"]
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    fill = FillMask(read.model.apply, read.variables, read.tokenizer, 16)
    for found, wanted in zip(fill(BLANKS, top_k=3), expected["blanks"], strict=True):
        for blank, tokens in zip(found, wanted, strict=True):
            assert [one.token for one in blank] == [token for token, _ in tokens]
            probabilities = [probability for _, probability in tokens]
            assert [one.probability for one in blank] == pytest.approx(probabilities, abs=1e-5)


def test_adapters_are_read_with_their_base(expected: dict[str, Any]) -> None:
    answers = finetuned.open_finetuned("runs/lora").answer(
        [Record(fields={"text": text}, origin="here") for text in TEXTS]
    )
    for answer, wanted in zip(answers, expected["probabilities"], strict=True):
        assert answer["probabilities"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("tuned", [BitFit(), LoraConfig(bias="all", init="pissa")], ids=type)
def test_biases_of_queries_stay_frozen_where_a_run_began_so(
    tuned: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_xlnet.tokenizer()
    sizes: Any = {"num_layers": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 16}
    model = XlnetConfig(vocab_size=tokenizers.vocab_size(tokenizer), **sizes)
    shapes = jax.eval_shape(model.make().init, jax.random.key(0), *example_inputs(model))["params"]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    huggingface.save(tmp_path / "base", {"encoder": drawn}, model, tokenizer)
    rows = [f"{a} {b},{a}" for a in "ab" for b in "cdefgh"]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    config = FinetuneConfig(
        name="run",
        runs=tmp_path,
        base=str(tmp_path / "base"),
        data=LabelledConfig(train=Table(path=str(tmp_path / "data.csv")), batch_size=8),
        tuning=tuned,
        train=TrainConfig(steps=1, num_evals=1),
    )
    checkpoints = config.directory / CHECKPOINTS
    with monkeypatch.context() as before:
        before.setattr(tuning, "is_bias", lambda path: path.endswith("/bias"))
        wanted = finetuned.open_finetuned(finetune(config), step=1).answer(["a c", "b d"])
    loaded = finetuned.open_finetuned(config.directory, step=1)
    assert loaded.answer(["a c", "b d"]) == wanted
    finetune(replace(config, train=replace(config.train, steps=2)))
    assert restore.list_steps(checkpoints)[-1] == 2
    trained = restore.trained(checkpoints)
    assert not [path for path in trained if path.endswith("_bias")]
    assert "params/encoder/layers/attention/query/bias" not in trained  # it has none
    assert "params/encoder/layers/mlp/up/bias" in trained
    merged = finetuned.open_finetuned(config.directory, step=2).merged()["encoder"]["layers"]
    own = drawn["layers"]["attention"]["content_bias"]
    np.testing.assert_array_equal(merged["attention"]["content_bias"], own)
    assert (merged["mlp"]["up"]["bias"] != drawn["layers"]["mlp"]["up"]["bias"]).any()


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_its_end(expected: dict[str, Any]) -> None:
    config = configs.read_file(Path("runs/stopped") / CONFIG)
    assert isinstance(config, PretrainConfig)
    pretrain(replace(config, prepare=None))
    found = losses(read_jsonl(Path("runs/stopped/metrics.jsonl")))
    assert found == pytest.approx(losses(expected["losses"]), abs=1e-5)


def losses(lines: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name]
        for line in lines
        for name in ("train/loss", "eval/loss")
        if name in line
    }
