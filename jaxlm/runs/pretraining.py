"""Pretraining from a configuration: the whole way from text to a run folder."""

import dataclasses
from contextlib import nullcontext

import jax
from rich.console import Console

from jaxlm import tree
from jaxlm.config import Config, PretrainConfig
from jaxlm.data import tokenizers
from jaxlm.data.loader import eval_batches, train_batches
from jaxlm.data.prepare import prepare
from jaxlm.data.prepared import Prepared, open_prepared
from jaxlm.errors import InputError
from jaxlm.runs import run
from jaxlm.runtime import distributed
from jaxlm.runtime.storage import StoragePath, locate, mirrored, on_disk
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.loop import evaluate, fit
from jaxlm.train.metrics import Throughput, WandbWriter, Writer
from jaxlm.train.progress import Progress
from jaxlm.train.restore import list_steps
from jaxlm.train.state import TrainState
from jaxlm.train.view import RECORDS, View


def pretrain(config: PretrainConfig) -> StoragePath:
    """Prepare what is missing, train, and leave a self-contained run folder; returns it.

    An unfinished run in the folder is resumed.
    """
    main_process = jax.process_index() == 0
    console = Console(quiet=not main_process, highlight=False)
    run.check_processes(config, config.directory / run.CHECKPOINTS)
    datasets = open_data(config, console)
    info = datasets[0].info
    config = run.resolve(config, info, jax.default_backend())
    tokenizer = tokenizers.load(datasets[0].tokenizer_path)
    vocabulary = run.make_vocabulary(tokenizer)
    placement = run.make_placement(config, vocabulary)
    directory = config.directory
    resuming = bool(list_steps(directory / run.CHECKPOINTS))
    if resuming and not config.resume:
        raise InputError(f"{directory} holds a run: give another --name, or leave out --no-resume")
    console.print(
        f"{config.name}: {tree.num_params(placement.abstract_state.trainable):,} parameters, "
        f"{sum(d.info.tokens['train'] for d in datasets) / 1e6:.2f} M tokens in rows "
        f"of {info.row_length}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    )

    throughput = Throughput(
        run.flops_per_token(config, info.row_length),
        jax.devices()[0].device_kind,
        jax.device_count(),
    )
    checkpoints = directory / run.CHECKPOINTS
    with (
        Progress(config.train.steps, visible=main_process, console=console) as progress,
        Checkpointer(checkpoints, keep=config.train.keep, report=progress.warn) as checkpointer,
    ):
        fingerprints = [dataset.info.fingerprint for dataset in datasets]
        start = run.make_cursor(config.train.seed, fingerprints, info.tokenizer_sha256)
        # The order of resuming: 1. the run's own newest undamaged checkpoint; 2. from scratch.
        if resuming:
            # Before the checkpoint: with another vocabulary its shapes would not fit either.
            own = {"tokenizer_sha256": tokenizers.fingerprint(run.read_tokenizer(directory))}
            run.check_same(directory, start | own, start)
            run.check_config(directory, config)
            restored = checkpointer.restore(placement.abstract_state.learned)
            state, cursor = restored.state, run.resume_cursor(config, restored.cursor, start)
            progress.print(f"resuming from step {restored.step} of {directory}")
        else:
            state, cursor = placement.init(jax.random.key(config.train.seed)), start
        if main_process:
            run.write_folder(directory, config, tokenizer)

        def evaluation(state: TrainState) -> dict[str, float]:
            batches = eval_batches(
                datasets[0],
                config.data.batch_size,
                max_rows=config.train.eval_rows,
                batch_rows=placement.batch_rows,
            )
            return evaluate(placement, state, batches)

        with (
            mirrored(directory, *RECORDS) if main_process else nullcontext() as records,
            View(
                records,
                progress,
                throughput,
                step=int(state.step),
                tokens_seen=cursor["tokens_seen"],
                log_every=config.train.log_every,
                reference={"unigram entropy": info.unigram_entropy},
                more_writers=writers(config) if main_process else (),
            ) as view,
        ):
            fit(
                config.train,
                placement,
                state,
                train_batches(
                    datasets,
                    config.data,
                    seed=config.train.seed,
                    examples_seen=cursor["examples_seen"],
                    batch_rows=placement.batch_rows,
                ),
                evaluation,
                checkpointer,
                cursor,
                view,
                batch_size=config.data.batch_size,
            )
    return directory


def open_data(config: PretrainConfig, console: Console) -> list[Prepared]:
    """All prepared data of a run; the first is made where it is missing and the config says how."""
    first = locate(config.data.paths[0])
    if config.prepare is not None:
        with distributed.first("prepare"):  # the others find it, or make it on a disk of their own
            prepare(config.prepare, first, console=console)
    datasets = [open_prepared(path) for path in config.data.paths]
    found = {str(d.directory): [d.info.fingerprint, d.info.tokenizer_sha256] for d in datasets}
    distributed.check_same(
        "data", {f"the content of {path}": value for path, value in found.items()}
    )
    return datasets


def writers(config: Config) -> tuple[Writer, ...]:
    """Weights & Biases, where the config asks for it."""
    if config.wandb is None:
        return ()
    settings = dataclasses.asdict(config)
    return (WandbWriter(on_disk(config.directory), project=config.wandb, config=settings),)
