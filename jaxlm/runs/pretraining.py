"""Pretraining from a configuration: the whole way from text to a run folder."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console
from tokenizers import Tokenizer

from jaxlm import tree
from jaxlm.config import PretrainConfig
from jaxlm.data import tokenizers
from jaxlm.data.loader import check_alike, check_before, train_batches
from jaxlm.data.prepare import TokenizerConfig, prepare
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig
from jaxlm.runs import attention, folder, phase, pretrained, resume, steps
from jaxlm.runs import base as bases
from jaxlm.runs.base import Base
from jaxlm.runs.finite import require_finite_loss
from jaxlm.runs.folder import CHECKPOINTS
from jaxlm.runs.train import Job, train
from jaxlm.runtime import distributed
from jaxlm.runtime.console import make_console
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.tasks.vocabulary import make_vocabulary
from jaxlm.train import restore
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.placement import Placement
from jaxlm.train.plots import Reference
from jaxlm.train.restore import Monitor
from jaxlm.train.state import TrainState
from jaxlm.train.view import METRICS
from jaxlm.typing import HostBatch

_SAMPLE = 256  # rows that are looked at before training


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> StoragePath:
    """Prepare what is missing, train, and leave a self-contained run folder; returns it.

    Where the folder holds an unfinished run, it resumes.
    """
    console = console or make_console(quiet=jax.process_index() > 0)
    resume.check_processes(config, config.directory / CHECKPOINTS)
    base, base_model = open_base(config, console)
    config = replace(config, base=config.base and bases.lasting(config.base))
    model = config.model or base_model
    if config.prepare is not None and model is not None:
        # Before what takes hours.
        pretrained.require_length(config, model, config.prepare.row_length)
    datasets = open_data(config, base, console)
    before = pretrained.tokens_before(config.task)
    check_before(datasets, before)
    infos = [dataset.info for dataset in datasets]
    info = infos[0]
    own = folder.begun(config)
    config = pretrained.resolve(config, infos, jax.default_backend(), base_model, own and own.model)
    config, attends = attention.settle(config, info.row_length, jax.devices())
    tokenizer = tokenizers.load(datasets[0].tokenizer_path)
    vocabulary = make_vocabulary(tokenizer, info.special)
    placement = pretrained.make_placement(config, vocabulary)
    for dataset in datasets:
        rows = dataset.source("train")
        sample = rows.read(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(int))
        if doubt := config.task.warning(sample["tokens"], vocabulary):
            console.print(f"warning: {doubt}", style="yellow", markup=False, soft_wrap=True)
    given = {} if base is None else base_params(config, placement, base, tokenizer, console)
    console.print(
        f"{config.name}: {tree.num_params(placement.abstract_state.trainable):,} parameters, "
        f"{sum(info.tokens['train'] for info in infos) / 1e6:.2f} M tokens in rows "
        f"of {info.row_length}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    if attends:
        console.print(attends, soft_wrap=True, markup=False)

    if config.data.ramp_sizes:
        console.print(_ramp(config, info.row_length), soft_wrap=True)

    def init() -> TrainState:
        state = placement.init(jax.random.key(config.train.seed), placement.put_params(given))
        if base is None or not config.base_moments:
            return state
        return replace(state, opt_state=base_moments(placement, base))

    def batches(examples_seen: int) -> Iterator[HostBatch]:
        return train_batches(
            datasets,
            config.data,
            seed=config.train.seed,
            examples_seen=examples_seen,
            batch_rows=placement.batch_rows,
            before=before,
        )

    def evaluation(state: TrainState) -> dict[str, float]:
        rows = pretrained.eval_rows(
            datasets,
            config.data.batch_size,
            max_rows=config.train.eval_rows,
            batch_rows=placement.batch_rows,
            before=before,
        )
        found = pretrained.measure(placement, state, rows, config.task, infos, "validation")
        if int(state.step) == 0:  # of a base; later ones are not updated by what is not finite
            require_finite_loss(found, state.variables)
        return found

    known = {} if base is None else loss_of_base(config, base, tokenizer)
    monitor = Monitor()
    job = Job(
        config=config,
        tokenizer=tokenizer,
        placement=placement,
        init=init,
        cursor=resume.make_cursor(
            config,
            data=[info.fingerprint for info in infos],
            tokenizer_sha256=info.tokenizer_sha256,
            base_sha256=base and base.fingerprint,
            monitor=monitor.name,
        ),
        batches=batches,
        examples_after=lambda seen, steps: config.data.after(seen, steps)[0],
        next_begin=lambda seen: seen,
        evaluate=evaluation,
        monitor=monitor,
        reference=Reference(known or pretrained.unlearned(config.task, infos)),
        flops_per_token=pretrained.flops_per_token(config, info.row_length),
        files={},
    )
    return train(job, console)


def _ramp(config: PretrainConfig, row_length: int) -> str:
    """How the batch grows, in steps and tokens."""
    data, stages, end = config.data, [], 0
    for size, of_stage in zip(data.ramp_sizes, data.ramp_steps, strict=True):
        end += of_stage
        stages.append(f"{size:,} to step {end:,}")
    rows = data.after(0, end)[0]
    said = f"rows of a batch: {', '.join(stages)}, then {data.batch_size:,} (after {rows:,} rows, "
    said += f"{rows * row_length / 1e6:.2f} M tokens)"
    if config.train.steps is not None and config.train.steps <= end:
        said += f"; the run's {config.train.steps:,} steps end before"
    return said


def open_base(config: PretrainConfig, console: Console) -> tuple[Base | None, ModelConfig | None]:
    """The base, if there is one, and its model.

    A run that resumes has all parameters: where changes are accepted, it does without a base that
    cannot be read, and its model is its own.
    """
    if config.base is None:
        return None, None
    try:
        base = bases.load(config.base)
    except InputError as error:
        if not restore.list_steps(config.directory / CHECKPOINTS):
            raise
        if not config.accept_changes:
            raise InputError(
                f"{error}; or add --accept-changes: the run in {config.directory} has all its "
                "parameters, and goes on without its base"
            ) from error
        console.print(f"without the base: {error}", markup=False, soft_wrap=True)
        return None, folder.read_config(config.directory, PretrainConfig).model
    return base, base.config


def open_data(config: PretrainConfig, base: Base | None, console: Console) -> list[Prepared]:
    """All prepared data of a run; the first is made where it is missing and the config says how.

    With a base, its tokenizer is the one that cuts the text; where that is gone, nothing is made.
    """
    first, wanted = locate(config.data.paths[0]), config.prepare
    if wanted is not None and wanted.validation_fraction == 0 and len(config.data.paths) == 1:
        raise _nothing_held_out(first, "--prepare.")
    if wanted is not None and (base is not None or config.base is None):
        if base is not None:
            own = TokenizerConfig(path=base.tokenizer_path)  # pyright: ignore[reportArgumentType]
            wanted = replace(wanted, tokenizer=own)
        with distributed.first("prepare"):  # the others find it, or make it on their own disks
            way_out = "name a new folder, or train on this one as it is, with --prepare None"
            option = "--prepare.tokenizer" if base is None else None
            prepare(wanted, first, console=console, way_out=way_out, option=option)
    datasets = [open_prepared(path) for path in config.data.paths]
    found = {str(d.directory): [d.info.fingerprint, d.info.tokenizer_sha256] for d in datasets}
    check_alike(datasets)
    if not any("validation" in dataset.info.rows for dataset in datasets):
        raise _nothing_held_out(first, "scripts/prepare.py --" if wanted is None else "--prepare.")
    distributed.check_same("data", {f"the content of {path}": x for path, x in found.items()})
    if base is not None and not phase.continues(base.tokenizer, datasets[0]):
        raise InputError(
            f"{first} was prepared with another tokenizer than that of base={base.name}: prepare "
            f"it again, into another folder, with scripts/prepare.py --tokenizer.path "
            f"{base.tokenizer_path}"
        )
    return datasets


def _nothing_held_out(directory: StoragePath, prefix: str) -> InputError:
    return InputError(
        f"{directory} has no validation split, on which a run is evaluated: prepare the text anew, "
        f"into another folder, with {prefix}validation-fraction 0.05 (more for few documents), or "
        "name a folder that has one in --data.paths, too"
    )


def base_params(
    config: PretrainConfig,
    placement: Placement,
    base: Base,
    tokenizer: Tokenizer,
    console: Console,
) -> dict[str, PyTree]:
    """The base's encoder, and its head and what else the task's model has, where shapes agree.

    Says what is taken, and what is new.
    """
    assert config.model is not None  # resolved
    head = {} if base.lm_head is None else {"head": base.lm_head}
    parts = {"encoder": base.encoder, **head, **base.others}
    new = phase.new_tokens(base.tokenizer, tokenizer)
    if new:
        parts = phase.with_tokens(parts, new)
    encoder = phase.with_positions(parts.pop("encoder"), config.model)
    given: dict[str, Any] = {"encoder": steps.with_rows(encoder, config.model)}
    wanted = placement.abstract_state.trainable["params"]
    parts = {name: _with_bias(part, config.model) for name, part in parts.items()}
    shapes_of = lambda params, name: tree.shapes(params.get(name, {}))
    names = ["head", *sorted(wanted.keys() - {"encoder", "head"})]
    known = [name for name in names if shapes_of(wanted, name) in ({}, shapes_of(parts, name))]
    given |= {name: parts[name] for name in known if name in wanted}
    what = _joined(["encoder", *known])
    if fresh := [name for name in names if name not in known]:
        what += f"; its {_joined(fresh)} {'is' if len(fresh) == 1 else 'are'} new"
    if left := sorted(parts.keys() - wanted.keys()):
        what += f"; its {_joined(left)}, for which this task has no place, is left behind"
    if new:
        what += f"; {len(new):,} new tokens are the means of the pieces that they were"
    if changed := phase.differences(base.config, config.model):
        what += f"; other than there: model.{', model.'.join(changed)}"
    console.print(f"from {base.name}: {what}", soft_wrap=True)
    return given


def loss_of_base(config: PretrainConfig, base: Base, tokenizer: Tokenizer) -> dict[str, float]:
    """By name, what a base that is a run has reached on the same text with the same task."""
    if base.step is None or phase.new_tokens(base.tokenizer, tokenizer):
        return {}
    directory = locate(base.name)
    if not isinstance(directory, Path):
        return {}
    before = folder.read_config(directory, PretrainConfig)
    texts = [one.prepare and one.prepare.source for one in (before, config)]
    is_mean = before.train.average is not None  # of checkpoints, each of which was measured
    if None in texts or texts[0] != texts[1] or before.task != config.task or is_mean:
        return {}
    lines = read_jsonl(directory / METRICS)
    losses = [
        line["eval/loss"] for line in lines if line["step"] == base.step and "eval/loss" in line
    ]
    return {f"{before.name} at step {base.step:,}": loss for loss in losses[-1:]}


def base_moments(placement: Placement, base: Base) -> PyTree:
    """The optimizer's state where the base's parameters are from."""
    way_out = "leave base_moments out, and give the phase a warm-up"
    if base.step is None:
        raise InputError(f"base={base.name} is no run, and has no moments: {way_out}")
    target = {"opt_state": placement.abstract_state.opt_state}
    try:
        read = restore.restore_part(locate(base.name) / CHECKPOINTS, target, base.step)
    except InputError as error:
        raise InputError(
            f"the moments of base={base.name} do not fit ({error}): {way_out}"
        ) from error
    return read.state["opt_state"]


def _with_bias(part: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """A head, or a generator with one, for as many rows as the model has."""
    if "head" not in part:
        return steps.with_bias(part, model)
    return part | {"head": steps.with_bias(part["head"], model)}


def _joined(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
