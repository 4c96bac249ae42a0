"""Fields of a config that nothing reads, as its other fields are."""

import dataclasses
from typing import Any

from jaxlm.config import Config, FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.models.model import is_attentive
from jaxlm.objectives.masking import ChoiceConfig
from jaxlm.peft.lora import LoraConfig


def idle(config: Config) -> dict[str, str]:
    """The paths of such fields, each with why it has no effect."""
    found: dict[str, str] = {}

    def put(why: str, path: str, *names: str) -> None:
        found.update({f"{path}.{name}" if path else name: why for name in names})

    optimizer = config.optimizer
    if optimizer.schedule != "wsd":
        put(f"optimizer.schedule is {optimizer.schedule}, not wsd", "optimizer", "decay_share")
    if optimizer.schedule in ("inverse_sqrt", "constant"):
        why = f"optimizer.schedule={optimizer.schedule} has its own end"
        put(why, "optimizer", "final_lr_share")
    if optimizer.warmup_steps is not None:
        put("optimizer.warmup_steps takes its place", "optimizer", "warmup_share")
    if optimizer.name != "muon":
        put(f"optimizer.name is {optimizer.name}, not muon", "optimizer", "momentum")
    if optimizer.name == "adafactor":
        put("optimizer.name is adafactor, which has none", "optimizer", "b2", "epsilon")
    if config.model is not None and is_attentive(config.model):
        put("attention (auto, or what it is told) takes its place", "model", "attention")
        if not config.model.attends.has_window:
            put("no layer of the model has a window", "model", "window", "local_rope_base")
    if isinstance(config, PretrainConfig):
        _of_pretraining(config, put)
    else:
        _of_fine_tuning(config, put)
    return found


def _of_pretraining(config: PretrainConfig, put: Any) -> None:
    if config.base is not None:
        names = [field.name for field in dataclasses.fields(TokenizerConfig)]
        put("the base has its own tokenizer", "prepare.tokenizer", *names)
    elif config.prepare is not None and config.prepare.tokenizer.path is not None:
        why = "prepare.tokenizer.path names one that is trained already"
        put(why, "prepare.tokenizer", "kind", "vocab_size", "num_documents")
    for name, choice in vars(config.task).items():
        if isinstance(choice, ChoiceConfig) and choice.unit != "span":
            put(f"task.{name}.unit is {choice.unit}, not span", f"task.{name}", "mean_span")
    if len(config.data.paths) == 1:
        put("data.paths is one folder", "data", "weights")


def _of_fine_tuning(config: FinetuneConfig, put: Any) -> None:
    put("fine-tuning evaluates on all of its examples", "train", "eval_rows")
    if config.data.validation is not None:
        why = "data.validation (which can be None) names the examples"
        put(why, "data", "validation_fraction")
        if config.data.few_shot is None:
            put(f"{why}, and few_shot is None", "data", "split_seed")
    tokenizers = {"tokenizer": config.tokenizer, "source_tokenizer": config.source_tokenizer}
    for name, tokenizer in tokenizers.items():
        if tokenizer is not None and tokenizer.path is not None:
            why = f"{name}.path names one that is trained already"
            put(why, name, "kind", "vocab_size", "num_documents")
    if config.data.pack:
        put("data.pack gives batches one shape", "data", "num_buckets")
    fields = config.task.fields
    if isinstance(fields, TextFields):
        names = ("separator", "names", "as_written")
        if fields.label is None:
            names = ("target", "decimal_commas", *names)
            put("task.fields.label is None", "task.fields", *names)
        elif fields.target == "number":
            put("task.fields.target is number", "task.fields", *names)
        else:
            put(f"task.fields.target is {fields.target}", "task.fields", "decimal_commas")
            if fields.target == "class" and "," not in fields.label:
                put("task.fields.target is class", "task.fields", "separator")
    if config.dropout_rate is not None and config.model is not None:
        rates = [name for name in vars(config.model) if name.endswith("dropout_rate")]
        put(f"dropout_rate={config.dropout_rate} takes its place", "model", *rates)
    if config.dtype is not None:
        put(f"dtype={config.dtype} takes its place", "model", "dtype")
    if isinstance(config.tuning, LoraConfig) and config.tuning.ranks is not None:
        put("tuning.ranks are given", "tuning", "rank")
