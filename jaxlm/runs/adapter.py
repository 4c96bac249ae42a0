"""A run's adapter as a folder in PEFT's format, and such a folder as a run."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxlm import tree
from jaxlm.config import FinetuneConfig
from jaxlm.convert import folder, hub, peft_load, peft_save, task_model
from jaxlm.convert.architecture import check_distinct
from jaxlm.convert.peft_save import TASK_TYPES, Adapter
from jaxlm.convert.peft_tensors import Ours
from jaxlm.convert.task_model import Kind, TaskModel
from jaxlm.data import tokenizers
from jaxlm.data.workspace import building
from jaxlm.errors import InputError
from jaxlm.models.model import example_inputs
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import lora
from jaxlm.peft.ia3 import Ia3Config
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import base as bases
from jaxlm.runs import beginning, best, finetuned, finetuning, resume, steps
from jaxlm.runs.finetuned import LABELS, FinetunedRun
from jaxlm.runs.folder import CHECKPOINTS, CONFIG, is_run, read_json, write_folder
from jaxlm.runtime.storage import StoragePath, locate, on_disk, write_whole
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.tagging import Tagging
from jaxlm.tasks.task import Labels, Task
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.stored import read

KINDS: Mapping[type, Kind] = {
    Classification: "SequenceClassification",
    Tagging: "TokenClassification",
    QuestionAnswering: "QuestionAnswering",
    MultipleChoice: "MultipleChoice",
    Embedding: "FeatureExtraction",
    Instruction: "CausalLM",
    Seq2Seq: "Seq2SeqLM",
}
BASE = "base"
"""Folder beside an adapter that holds its base, where that is a run of ours."""


def export(
    run: FinetunedRun,
    out: Path,
    *,
    base: str | None = None,
    say: Callable[[str], object] = print,
) -> str:
    """Write what a run has learned for PEFT; returns the name of its base there.

    A base that is a run of ours is written, too, into a folder in ``out``, which appears when it is
    complete; what of it has no place there is said.
    """
    config, tuning = run.config, run.config.tuning
    if not isinstance(tuning, LoraConfig | Ia3Config):
        raise InputError(
            f"the run was tuned with tuning={type(tuning).__name__}, which has no adapters: "
            "merge_lora.py writes its encoder"
        )
    out = on_disk(out)
    if out.exists():
        raise InputError(f"{out} exists: name a new folder")
    given = base or config.base
    assert given is not None  # adapters have one
    with building(out) as unfinished:
        named, left = _write(run, tuning, given, unfinished, out)
    if left:
        say(f"{given} is in {named}{left}")
    return named


def _write(
    run: FinetunedRun, tuning: LoraConfig | Ia3Config, given: str, unfinished: Path, out: Path
) -> tuple[str, str]:
    """The name of the base there, and what of it is left behind."""
    name, loaded = given, bases.load(given)
    if is_run(locate(given)):
        bases.save(loaded, unfinished / BASE)
        path, given = unfinished / BASE, str((out / BASE).resolve())
    else:
        path = hub.find(given)
    variables = jax.device_get(run.variables)
    model = _task_model(path, run.task, len(run.labels) or None, variables["params"])
    task_model.check_base(path, model, name)
    start = None
    if isinstance(tuning, LoraConfig) and tuning.init == "pissa":
        start = _taken_out(run, loaded, variables["params"])
    params = _in_their_unit(variables["params"], run.task)
    every = dict(tree.leaves_with_path(params))
    trained = [path for path, _ in tree.leaves_with_path(run.state.trainable.get("params", {}))]
    adapter = Adapter(
        tuning=tuning,
        collection=variables["lora" if isinstance(tuning, LoraConfig) else "ia3"],
        saved=unflatten_dict({path: every[path] for path in trained}, sep="/"),
    )
    peft_save.save(unfinished, adapter, params, model, given, start=start)
    if run.labels:
        (unfinished / LABELS).write_text(json.dumps(list(run.labels)) + "\n", encoding="utf-8")
    write_whole(unfinished / "README.md", _card(model, given, run.labels))
    return given, loaded.left_behind


def _task_model(path: Path, task: Task, labels: int | None, params: Ours) -> TaskModel:
    kernel = params.get("head", {}).get("classifier", {}).get("kernel")
    labels = labels if kernel is None else kernel.shape[-1]
    return task_model.read(path, KINDS[type(task)], vars(task).get("pooling"), labels)


def _in_their_unit(params: Ours, task: Task) -> Ours:
    """With a head that gives numbers as the data have them, where ours gives multiples."""
    if not isinstance(task, Classification) or task.scale is None:
        return params
    mean, deviation = task.scale
    kernel = np.asarray(params["head"]["classifier"]["kernel"])
    bias = np.asarray(params["head"]["classifier"].get("bias", np.zeros(1)))
    new = {"kernel": kernel * deviation, "bias": bias * deviation + mean}
    new = {name: value.astype(np.float32) for name, value in new.items()}
    return params | {"head": params["head"] | {"classifier": new}}


def _taken_out(run: FinetunedRun, base: bases.Base, params: Ours) -> Ours:
    """The factors that PiSSA has taken out of the base."""
    config, tuning = run.config, run.config.tuning
    assert config.model is not None
    assert isinstance(tuning, LoraConfig)
    inputs, module = example_inputs(config.model), finetuned.make_model(config, run.labels)
    sites = find_sites(lambda variables: module.apply(variables, *inputs), {"params": params})
    body = sites.only(lambda path: not path.startswith("head/"))
    given = beginning.given(config, module, base)
    given.pop("head", None)
    before = jax.tree.map(jnp.asarray, read(given))
    return jax.device_get(lora.init_at(jax.random.key(0), before, body, tuning))


def _card(model: TaskModel, base: str, labels: Labels) -> str:
    """What a folder says to people."""
    more = f", num_labels={len(labels)}" if labels else ""
    if labels and model.kind != "MultipleChoice":
        more += f", id2label={dict(enumerate(labels))!r}"
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\n---\n\nAn adapter trained with jaxlm.\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {model.auto}\n\n"
        f"model = {model.auto}.from_pretrained({base!r}{more})\n"
        'model = PeftModel.from_pretrained(model, "THIS FOLDER").eval()\n```\n'
    )


def load(
    name_or_path: Path | str, config: FinetuneConfig, *, base: str | None = None
) -> StoragePath:
    """Make a run folder, at step 0, of an adapter in PEFT's format; returns it.

    The adapter is in a folder, or on the hub.
    ``config`` has the task, the data and the name; ``base`` is another place of the model that the
    adapter was made for.
    """
    path = hub.find(name_or_path)
    settings = peft_load.read_settings(path)
    if config.directory.exists():
        raise InputError(f"{config.directory} exists: give another --name")
    kind = KINDS[type(config.task)]
    if settings.task_type not in (None, TASK_TYPES.get(kind)):
        raise InputError(
            f"{path / peft_save.CONFIG}: task_type={settings.task_type!r} is not what "
            f"task={type(config.task).__name__} trains ({TASK_TYPES.get(kind)}): choose another "
            "config file or --task"
        )
    name = base or settings.base
    if base is None and not locate(name).exists() and (path / BASE / folder.CONFIG).is_file():
        name = str(path / BASE)  # the folder was moved with its base
    if is_run(locate(name)):
        raise InputError(f"base={name!r} is a run: give a folder in Hugging Face's layout")
    loaded = bases.load(name)
    where = hub.find(name)
    number = peft_load.num_labels(path, task_model.read(where, kind))
    task = config.task
    is_number = isinstance(task, Classification) and task.fields.target == "number"
    labels = () if is_number else _labels(path, where, kind, number)
    config = replace(
        config, base=bases.lasting(name), model=None, tokenizer=None, tuning=LoraConfig()
    )
    config = finetuning.resolve(config, loaded, loaded.tokenizer, jax.default_backend())
    module = finetuned.make_model(config, labels)
    given = read(beginning.given(config, module, loaded))
    whole = jax.jit(partial(beginning.make_params, config, module))
    params = jax.device_get(whole(jax.random.key(config.train.seed), given))
    model = _task_model(where, config.task, len(labels) or None, params)
    adapter = peft_load.load(path, params, model)
    config = replace(config, tuning=adapter.tuning, frozen_dtype="float32")
    here = steps.for_evaluation(config).config
    placement = finetuned.make_placement(here, labels, finetuned.make_init(here, labels))
    state = finetuned.make_state(here, labels, loaded, placement)
    own = "lora" if isinstance(adapter.tuning, LoraConfig) else "ia3"
    learned = {own: adapter.collection, "params": adapter.saved}
    found = dict(tree.leaves_with_path(learned))
    for leaf, _ in tree.leaves_with_path(state.trainable):
        is_base = leaf.startswith("params/encoder/")  # a bias that is as it was
        is_base |= leaf.startswith("params/head/pooler/") and loaded.pooler is not None
        if leaf not in found and not is_base:
            raise InputError(
                f"{path} lacks {model.rows[leaf.removeprefix('params/')].theirs}, which {name} has "
                "not either: it was drawn at random in training and not saved (name its module in "
                "modules_to_save, and train again)"
            )
    put = lambda p, leaf: (
        jnp.asarray(found[p], leaf.dtype).reshape(leaf.shape) if p in found else leaf
    )
    state = replace(state, trainable=tree.map_with_path(put, state.trainable))
    cursor = resume.make_cursor(
        config,
        data=[],
        tokenizer_sha256=tokenizers.fingerprint(loaded.tokenizer),
        base_sha256=loaded.fingerprint,
        monitor=best.monitor(config).name,
    )
    learned = steps.put_state(state, placement).learned
    with building(config.directory, CONFIG) as unfinished:
        write_folder(unfinished, config, loaded.tokenizer, {LABELS: json.dumps(labels)})
        with Checkpointer(unfinished / CHECKPOINTS, monitor=best.monitor(config)) as checkpointer:
            checkpointer.save(0, learned, cursor | {"labels": list(labels)})
    return config.directory


def _labels(path: Path, base: Path, kind: Kind, number: int | None) -> Labels:
    """Names of what the head distinguishes: beside the adapter, in the base, or numbers."""
    if kind not in ("SequenceClassification", "TokenClassification"):
        return ()
    if (path / LABELS).is_file():
        found, source = read_json(path / LABELS), path / LABELS
    else:
        named = folder.read_config(base).get("id2label") or {}
        found, source = list(named.values()), base / folder.CONFIG
        if number is None or len(found) != number:
            found = [f"LABEL_{i}" for i in range(number or 0)]
    if not isinstance(found, list) or (number is not None and len(found) != number):
        raise InputError(f"{source} does not hold a list of the {number} labels of the head")
    check_distinct(labels := tuple(map(str, found)), str(source))
    return labels
