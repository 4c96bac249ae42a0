"""A run that goes on with new tokens: trained, used, fine-tuned, written for other libraries."""

import importlib
import io
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import make_config

from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.data import tokenizers
from jaxlm.data.extension import pieces_of_new
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.prepared import open_prepared
from jaxlm.data.sources import TextFiles
from jaxlm.errors import InputError
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import finetuned, pretrained
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.pretraining import pretrain
from jaxlm.runs.published import open_published
from jaxlm.train.loop import TrainConfig, evaluate
from jaxlm.train.metrics import read_jsonl

WORDS = ("catalog", "reddog", "bluegreen")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    config = make_config(tmp_path_factory.mktemp("adapted"), steps=2, num_layers=1)
    pretrain(config)
    return config


@pytest.fixture(scope="module")
def config(base: PretrainConfig) -> PretrainConfig:
    assert base.prepare is not None
    folder = base.runs.parent
    words = np.random.default_rng(1).choice(["dog", "red", *WORDS], (300, 12))
    (folder / "field.txt").write_text("\n".join(" ".join(line) for line in words))
    source = TextFiles(glob=str(folder / "field.txt"), document="line")
    return replace(
        base,
        name="adapted",
        base=str(base.directory),
        model=None,
        data=replace(base.data, paths=(str(folder / "field"),)),
        prepare=replace(base.prepare, source=source, extend_vocab=5),
        train=replace(base.train, num_evals=1),  # so that step 0 is kept
    )


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def adapted(config: PretrainConfig, said: io.StringIO) -> Path:
    return pretrain(config, console=Console(file=said, width=300))


@pytest.fixture(scope="module")
def exported(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        importlib.import_module("merge_lora").main(adapted, folder)
    return folder


@pytest.mark.slow
def test_new_tokens_begin_as_their_pieces_and_are_learned(
    base: PretrainConfig, adapted: Path
) -> None:
    old, new = (pretrained.open_pretrained(x, s) for x, s in ((base.directory, None), (adapted, 0)))
    pieces = pieces_of_new(old.tokenizer, new.tokenizer)
    assert pieces is not None
    assert {new.tokenizer.id_to_token(i) for i in pieces} == set(WORDS)
    before, after = old.variables["params"], new.variables["params"]
    for i, ids in pieces.items():
        for path in (("encoder", "token_embed", "embedding"), ("head", "bias")):
            one, other = before, after
            for name in path:
                one, other = one[name], other[name]
            np.testing.assert_allclose(other[i], one[jnp.array(ids)].mean(0), rtol=1e-5)
    lines = read_jsonl(adapted / "metrics.jsonl")
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0]
    (answer,) = pretrained.open_pretrained(adapted).answer(["catalog [MASK] reddog"], top_k=60)
    assert "error" not in answer
    assert set(WORDS) <= {filling["token"] for filling in answer["blanks"][0]}


@pytest.mark.slow
def test_what_it_says(adapted: Path, said: io.StringIO) -> None:
    text = said.getvalue()
    assert "vocabulary: 3 new tokens of 5 (no more words are there 5 times), such as" in text
    assert "encoder and head; 3 new tokens are the means of the pieces that they were" in text


@pytest.mark.slow
def test_the_folder_for_others_is_the_same_model(
    config: PretrainConfig, adapted: Path, exported: Path
) -> None:
    data = open_prepared(config.data.paths[0])
    run, read = pretrained.open_pretrained(adapted), open_published(str(exported), data)
    assert read.tokenizer.to_str() == run.tokenizer.to_str()
    one, other = (
        evaluate(x.placement, x.state, pretrained.eval_rows([data], 32)) for x in (run, read)
    )
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    headless = exported.with_name("headless")
    published = huggingface.load(exported)
    huggingface.save(headless, published.params, published.config, published.tokenizer)
    with pytest.raises(InputError, match="no head that scores the vocabulary"):
        open_published(str(headless), data)


@pytest.mark.slow
def test_a_base_is_evaluated_on_new_tokens_as_a_run_from_it_begins(
    base: PretrainConfig, config: PretrainConfig, adapted: Path
) -> None:
    data = open_prepared(config.data.paths[0])
    read = open_published(str(base.directory), data)
    losses = evaluate(read.placement, read.state, pretrained.eval_rows([data], 32))
    first = next(line for line in read_jsonl(adapted / "metrics.jsonl") if "eval/loss" in line)
    assert losses["loss"] == pytest.approx(first["eval/loss"], abs=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        script = importlib.import_module("evaluate")
    given = (base.directory, data.directory, "validation", None, None, None, False, "auto")
    assert script.evaluate_pretrained(*given)["loss"] == pytest.approx(losses["loss"], abs=1e-5)


@pytest.mark.slow
def test_transformers_reads_the_folder(adapted: Path, exported: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForMaskedLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    run = pretrained.open_pretrained(adapted)
    text = "red catalog dog reddog bluegreen"
    theirs = tokenizer(text, return_tensors="pt")
    ids = run.tokenizer.encode(text).ids
    assert theirs["input_ids"][0].tolist() == ids
    assert len(ids) == 7
    with torch.no_grad():
        wanted = model(**theirs).logits.numpy()
    found = run.model.apply(run.variables, jnp.array([ids]))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
def test_lora_learns_on_it(adapted: Path, tmp_path: Path) -> None:
    rng, lines = np.random.default_rng(0), ["text,label"]
    for row in range(96):
        words = [*rng.choice(["red", "dog"], 3), WORDS[row % 2]]
        lines.append(f"{' '.join(rng.permutation(words))},{row % 2}")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    tuned = FinetuneConfig(
        name="lora",
        runs=tmp_path,
        base=str(adapted),
        data=LabelledConfig(
            train=Table(path=str(tmp_path / "train.csv")), batch_size=16, max_length=8
        ),
        tuning=LoraConfig(targets=(r"(query|key|value|out|up|down)/kernel",), rank=4),
        optimizer=OptimizerConfig(peak_lr=3e-2),
        train=TrainConfig(steps=24, num_evals=2),
    )
    loaded = finetuned.open_finetuned(finetune(tuned))
    assert set(WORDS) <= loaded.tokenizer.get_vocab().keys()
    assert tokenizers.fingerprint(loaded.tokenizer) == tokenizers.fingerprint(
        pretrained.open_pretrained(adapted).tokenizer
    )
    table = loaded.variables["params"]["encoder"]["token_embed"]["embedding"]
    assert jax.tree.leaves(table)[0].shape[0] == 64
