"""A published model, or any base, as if it were a run that has trained nothing: to be evaluated."""

import jax
from rich.console import Console

from jaxlm.config import PretrainConfig, PretrainingTask
from jaxlm.data import tokenizers
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepared import Prepared
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, is_two_stream
from jaxlm.nn.choose import Wanted
from jaxlm.runs import base as bases
from jaxlm.runs import phase, pretrained
from jaxlm.runs.attention import settle
from jaxlm.runs.pretrained import Pretrained
from jaxlm.runs.pretraining import base_params
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.vocabulary import make_vocabulary
from jaxlm.train.loop import TrainConfig

_ROWS = 32  # of a batch, by device


def open_published(
    name: str,
    data: Prepared,
    *,
    attention: Wanted = "auto",
    task: PretrainingTask | None = None,
    step: int | None = None,
) -> Pretrained:
    """A folder in Hugging Face's layout, a name on the hub, or a run, for some data.

    Where these were cut by a tokenizer with more tokens than its own, as it would begin on them.
    ``task``: what is evaluated; None: what its head is for. ``step``: that of a run.
    Raises :class:`InputError` where it has no head that scores the vocabulary.
    """
    base = bases.load(name, step=step)
    if not phase.continues(base.tokenizer, data):
        raise InputError(
            f"{data.directory} was prepared with another tokenizer than that of {name}: prepare it "
            f"again, into another folder, with scripts/prepare.py --tokenizer.path "
            f"{base.tokenizer_path}"
        )
    pretrained.check_rows(name, base.config, data)
    config = PretrainConfig(
        name="published",
        base=name,
        data=DataConfig(paths=(str(data.directory),), batch_size=_ROWS * jax.device_count()),
        task=task or _task(base.config),
        train=TrainConfig(steps=1),
        attention=attention,
    )
    config = pretrained.resolve(config, [data.info], jax.default_backend(), base.config)
    config, attends = settle(config, data.info.row_length, jax.devices(), trains=False)
    tokenizer = tokenizers.load(data.tokenizer_path)
    vocabulary = make_vocabulary(tokenizer, data.info.special)
    placement = pretrained.make_placement(config, vocabulary)
    params = base_params(config, placement, base, tokenizer, Console(quiet=True))
    shapes = placement.abstract_state.trainable["params"]
    if params.keys() != shapes.keys():
        raise InputError(
            f"{name} has no head that scores the vocabulary: take a folder with one, as "
            "AutoModelForMaskedLM saves it"
        )
    placed = placement.put_params(params)
    cursor = {"tokenizer_sha256": data.info.tokenizer_sha256}
    at = base.step or 0
    return Pretrained(config, tokenizer, at, {"params": placed}, cursor, placement, (at,), attends)


def _task(model: ModelConfig) -> PretrainingTask:
    if model.is_causal:
        return CausalLm()
    return PermutationLm() if is_two_stream(model) else MaskedLm()
