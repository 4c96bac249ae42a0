"""The one driver: begin a run or resume it, and train it to its end."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
from rich.console import Console
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import tokenizers
from jaxlm.errors import InputError
from jaxlm.runs import resume
from jaxlm.runs.folder import (
    CHECKPOINTS,
    SOURCE_TOKENIZER,
    TOKENIZER,
    cursor_name,
    read_tokenizer,
    write_folder,
)
from jaxlm.runtime import distributed
from jaxlm.runtime.storage import StoragePath, mirrored, on_disk
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.loop import Clock, fit
from jaxlm.train.metrics import Throughput, WandbWriter, Writer
from jaxlm.train.placement import Placement
from jaxlm.train.plots import Reference
from jaxlm.train.progress import Progress
from jaxlm.train.restore import Cursor, Monitor, list_steps, peek
from jaxlm.train.state import TrainState
from jaxlm.train.view import RECORDS, View
from jaxlm.typing import HostBatch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What makes a run this one: pretraining and fine-tuning differ in nothing else."""

    config: Config
    """Resolved: it is written into the run folder."""
    tokenizer: Tokenizer
    placement: Placement
    init: Callable[[], TrainState]
    """The state at step 0, on the placement's devices: from a base, or from nothing."""
    cursor: Cursor
    """Where the run stands at step 0, with fingerprints of what it stands on."""
    batches: Callable[[int], Iterator[HostBatch]]
    """The batches that follow after so many examples."""
    examples_after: Callable[[int, int], int]
    """How many examples are seen where there were some before, and so many batches followed."""
    next_begin: Callable[[int], int]
    """How many examples are seen where a batch begins: after so many, or next."""
    evaluate: Callable[[TrainState], dict[str, float]]
    """``loss`` and other metrics on the validation data."""
    monitor: Monitor
    """Which checkpoint is best."""
    reference: Reference
    """What the run's losses are compared with."""
    flops_per_token: float | None = None
    """Operations of a training step for each token."""
    files: Mapping[str, str]
    """More files of the run folder, with their texts."""


def train(job: Job, console: Console) -> StoragePath:
    """Train, and leave a self-contained run folder; returns it.

    Where the folder holds an unfinished run, it resumes.
    """
    config, placement = job.config, job.placement
    configs.from_json(configs.to_json(config))  # a folder that could not be read is not begun
    directory, main_process = config.directory, jax.process_index() == 0
    checkpoints = directory / CHECKPOINTS
    resuming = bool(list_steps(checkpoints))
    if resuming and not config.resume:
        raise InputError(f"{directory} holds a run: give another --name, or leave out --no-resume")
    throughput = Throughput(job.flops_per_token, jax.devices()[0].device_kind, jax.device_count())
    with (
        Progress(config.train.steps, visible=main_process, console=console) as progress,
        Checkpointer(
            checkpoints,
            keep=config.train.keep,
            average=config.train.average,
            monitor=job.monitor,
            report=progress.warn,
        ) as checkpointer,
    ):
        distributed.check_same("run", job.cursor)
        # The order of resuming: 1. the run's own newest undamaged checkpoint; 2. its base, or from
        # scratch, which is init's business.
        if resuming:
            state, cursor = _resume(job, checkpointer, progress.print)
        else:
            state, cursor = job.init(), job.cursor
        if main_process:
            write_folder(directory, config, job.tokenizer, job.files)
        with (
            mirrored(directory, *RECORDS) if main_process else nullcontext() as records,
            View(
                records,
                progress,
                throughput,
                step=int(state.step),
                tokens_seen=cursor["tokens_seen"],
                log_every=config.train.log_every,
                reference=job.reference,
                more_writers=_writers(config) if main_process else (),
            ) as view,
        ):
            fit(
                config.train,
                placement,
                state,
                job.batches(cursor["examples_seen"]),
                job.evaluate,
                checkpointer,
                cursor,
                view,
                examples_after=partial(job.examples_after, cursor["examples_seen"]),
            )
    return directory


def _resume(
    job: Job, checkpointer: Checkpointer, say: Callable[[str], None]
) -> tuple[TrainState, Cursor]:
    """The newest checkpoint's state and cursor, if the run is still the one that was begun."""
    config, placement, directory = job.config, job.placement, job.config.directory
    # Before the checkpoint: with another vocabulary its shapes would not fit either.
    own = {
        cursor_name(name): tokenizers.fingerprint(read_tokenizer(directory, name))
        for name in (TOKENIZER, SOURCE_TOKENIZER)
        if name == TOKENIZER or (directory / name).is_file()
    }
    resume.check_same(config, job.cursor | own, job.cursor)
    resume.check_config(directory, config, peek(directory / CHECKPOINTS))
    restored = checkpointer.restore(placement.abstract_state.learned)
    saved = resume.with_length(directory, config, restored.cursor)
    cursor = resume.resume_cursor(config, saved, job.cursor)
    if saved.get("best") is not None and "best" not in cursor:
        say("what was measured before does not compare: the best checkpoint is chosen anew")
    if config.accept_changes:
        cursor = resume.at_a_batch(cursor, job.next_begin, say)
    state = restored.state
    if jax.tree.leaves(placement.abstract_state.frozen):
        state = replace(state, frozen=job.init().frozen)
    extended = saved["share"] >= 1 and Clock(config.train, cursor).share(restored.step) < 1
    doing = "extending the finished run" if extended else "resuming"
    say(f"{doing} from step {restored.step} of {directory}")
    return state, cursor


def _writers(config: Config) -> tuple[Writer, ...]:
    """Weights & Biases, where the config asks for it."""
    if config.wandb is None:
        return ()
    settings: dict[str, Any] = asdict(config)
    return (WandbWriter(on_disk(config.directory), project=config.wandb, config=settings),)
