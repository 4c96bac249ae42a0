"""Every task, tuning and architecture through every script: trained, evaluated, used, merged.

One test for the whole table. One way through it is tried each time; the whole product is slow.
"""

import functools
import importlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_models import BERT
from tiny_runs import make_config

from jaxlm.compile_check.step import Assumed, make_step
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import JsonLines
from jaxlm.decode.beam import BeamConfig
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.model import EncoderDecoderConfig, TwoStreamConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.objectives.span_corruption import SpanConfig
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import BitFit, Full, HeadOnly
from jaxlm.runs.base import load
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.pretraining import pretrain
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.tasks.tagging import Tagging
from jaxlm.train.loop import TrainConfig

WORDS = ["red", "green", "blue", "cat", "dog"]
NUMBER = TextFields(target="number")
SEVERAL = TextFields(target="labels")
PAIR = TextFields(pair="pair")
TASKS: dict[str, Any] = {
    "class": Classification(pooling="mean"),
    "labels": Classification(fields=SEVERAL, pooling="mean"),
    "number": Classification(fields=NUMBER, pooling="mean"),
    "pair": Classification(fields=PAIR),
    "tags": Tagging(entities=False),
    "answer": QuestionAnswering(doc_stride=2),
    "choice": MultipleChoice(),
    "embedding": Embedding(),
    "instruction": Instruction(num_samples=1),
    "seq2seq": Seq2Seq(num_samples=1, num_scored=2, sample_tokens=4),
}
KERNELS = (r".*/kernel",)
TUNINGS: dict[str, Any] = {
    "full": Full(),
    "head": HeadOnly(),
    "biases": BitFit(),
    "lora": LoraConfig(targets=KERNELS, rank=2),
    "dora": LoraConfig(targets=KERNELS, rank=2, kind="dora"),
    "pissa": LoraConfig(targets=KERNELS, rank=2, init="pissa"),
    "ia3": Ia3Config(outputs=KERNELS, inputs=()),
}
MODELS: dict[str, Any] = {
    "bert": replace(BERT, vocab_size=None, num_layers=1, max_length=32),
    "bilstm": BilstmConfig(embed_dim=16, hidden_dim=16),
    "gpt2": Gpt2Config(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=24, max_length=32),
    "t5": T5Config(num_layers=1, hidden_dim=16, num_heads=2, head_dim=8, mlp_dim=24, tied=False),
    "xlnet": XlnetConfig(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=24),
    "modernbert": ModernBertConfig(
        num_layers=2, hidden_dim=16, num_heads=2, mlp_dim=24, max_length=32, window=2
    ),
}


NOTHING = {"head": ("embedding", "instruction", "seq2seq"), "biases": ("seq2seq",)}
"""Tasks by the tunings that leave nothing to learn: their heads have no parameters of their own."""


def row(task: str, rng: np.random.Generator, i: int) -> dict[str, Any]:
    """An example, whatever it says."""
    words = rng.choice(WORDS, 4).tolist()
    text, pair = " ".join(words), " ".join(reversed(words))
    match task:
        case "tags":
            return {"tokens": words, "tags": [word[0].upper() for word in words]}
        case "answer":
            answers = {"text": [words[1]], "answer_start": [text.index(words[1])]}
            return {"question": "where ?", "context": text, "answers": answers, "id": str(i)}
        case "choice":
            return {"context": text, "choices": words[:2], "label": i % 2}
        case "labels":
            return {"text": text, "label": sorted({words[0], words[1]})}
        case "number":
            return {"text": text, "label": 10.0 + i % 7}
        case "instruction":
            return {"prompt": text, "response": pair}
        case "seq2seq":
            return {"source": text, "target": pair}
        case "embedding":
            return {"text": text, "pair": f"{pair} {i}"}
        case _:
            return {"text": text, "pair": pair, "label": "ab"[i % 2]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Any architecture, pretrained for a step when it is first asked for."""
    folder = tmp_path_factory.mktemp("journeys")
    config: Any = make_config(folder, steps=1)
    once = TrainConfig(steps=1, num_evals=1, eval_rows=16)

    @functools.cache
    def base(name: str) -> Path:
        model, own = MODELS[name], config
        task = CausalLm() if model.is_causal else MaskedLm()
        task = PermutationLm() if isinstance(model, TwoStreamConfig) else task
        if isinstance(model, EncoderDecoderConfig):
            task = SpanCorruption(spans=SpanConfig(noise_density=0.3, mean_span=2.0))
            tokenizer = replace(config.prepare.tokenizer, sentinels=8)
            own = replace(
                config,
                data=replace(config.data, paths=(str(folder / "holes"),)),
                prepare=replace(config.prepare, tokenizer=tokenizer),
            )
        return pretrain(replace(own, name=name, model=model, task=task, train=once))

    return base


def journeys() -> list[Any]:
    """All of them; all but one are slow."""
    usual = ("answer", "lora", "bert")
    return [
        pytest.param(*way, marks=() if way == usual else pytest.mark.slow, id="-".join(way))
        for way in itertools.product(TASKS, TUNINGS, MODELS)
    ]


@pytest.mark.parametrize(("task", "tuning", "model"), journeys())
def test_every_script_does_its_part(
    task: str,
    tuning: str,
    model: str,
    base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    evaluate, predict, merge_lora = map(
        importlib.import_module, ("evaluate", "predict", "merge_lora")
    )
    rng = np.random.default_rng(0)
    rows = [row(task, rng, i) for i in range(32)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    config = FinetuneConfig(
        name="run",
        runs=tmp_path,
        base=str(base(model)),
        data=LabelledConfig(
            train=JsonLines(path=str(path)),
            validation_fraction=0.25,
            batch_size=8,
            max_length=16,
            num_buckets=1,
        ),
        task=TASKS[task],
        tuning=TUNINGS[tuning],
        train=TrainConfig(steps=2, num_evals=1),
    )
    if (task == "seq2seq") != isinstance(MODELS[model], EncoderDecoderConfig):
        refused = r"is one of them alone|reads one text, and a model of T5Config reads a source"
        with pytest.raises(InputError, match=refused):
            finetune(config, console=Console(quiet=True))
        return
    if task == "instruction" and not MODELS[model].is_causal:
        with pytest.raises(InputError, match="sees all of a text: name a base that reads one way"):
            finetune(config, console=Console(quiet=True))
        return
    if task in NOTHING.get(tuning, ()):
        with pytest.raises(InputError, match=r"leaves nothing to learn: .* tune the encoder"):
            finetune(config, console=Console(quiet=True))
        return
    run = finetune(config, console=Console(quiet=True))

    capsys.readouterr()
    evaluate.main(run, data=path)
    evaluated = capsys.readouterr().out
    assert all(name in evaluated for name in ("loss", config.monitor or config.task.monitor))

    out = tmp_path / "answers.jsonl"
    predict.main(run, config.task.verb, file=path, out=out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == len(rows)
    first = rows[0][config.task.text_fields[0]]  # a text, or words
    assert (" ".join(first) if isinstance(first, list) else first) in str(answers[0])

    if task == "instruction":  # by beam search, and so does its base
        beam = BeamConfig(size=2, n_best=2, max_new_tokens=4)
        runs: Any = ((run, config.task.verb), (base(model), CausalLm().verb))
        for searched, verb in runs:
            out = tmp_path / f"{verb}.jsonl"
            lines = [json.dumps({"text": one["prompt"], **one}) + "\n" for one in rows[:4]]
            (tmp_path / "asked.jsonl").write_text("".join(lines))
            predict.main(searched, verb, file=tmp_path / "asked.jsonl", out=out, beam=beam)
            for line in out.read_text().splitlines():
                first, second = json.loads(line)["n_best"]
                assert first["score"] >= second["score"]
            capsys.readouterr()
            predict.main(searched, verb, "red green", beam=beam)
            assert len(capsys.readouterr().out.splitlines()) == 2

    merged = tmp_path / "merged"
    if isinstance(MODELS[model], BilstmConfig):
        with pytest.raises(InputError, match="cannot be saved for other libraries"):
            merge_lora.main(run, merged)
        assert not merged.exists()
    else:
        merge_lora.main(run, merged)
        assert load(str(merged)).config.hidden_dim == BERT.hidden_dim

    step = make_step(config, Assumed(vocab_size=64), jax.devices())
    step.placement.train_step.lower(step.placement.abstract_state, step.batch, np.float32(0))
