"""A run assembled from its configuration: what training, evaluation and prediction share."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm import optim, sharding
from jaxlm.config import C, Config, FinetuneConfig, PretrainConfig
from jaxlm.data import tokenizers
from jaxlm.data.prepared import PreparedInfo
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import MaskedLm, MlmHead
from jaxlm.objectives import masked_lm
from jaxlm.objectives.masking import MaskingConfig, Vocabulary
from jaxlm.runtime import distributed
from jaxlm.runtime.storage import StoragePath, locate, whole, write_whole
from jaxlm.sharding import MeshConfig
from jaxlm.train import restore
from jaxlm.train.placement import Placement, jit_placement, pmap_placement
from jaxlm.train.restore import Cursor
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_eval_step, make_train_step
from jaxlm.typing import Loss, PRNGKey, Variables

CONFIG, TOKENIZER, CHECKPOINTS = "config.json", "tokenizer.json", "checkpoints"
# Fields that may change when a run resumes: where things lie (contents have fingerprints), how they
# are computed, and what is kept and shown.
_FREE = (
    r"name|runs|resume|accept_changes|wandb|placement|base|mesh\..*|prepare(\..*)?|data\.paths"
    r"|data\.(train|validation)\.(path|data_dir)|model\.(remat|unroll)"
    r"|train\.(num_micro_batches|save_every|keep|log_every|max_skipped)"
)
Known = TypeVar("Known", PretrainConfig, FinetuneConfig)
EVAL_SEED = 0  # of what evaluation hides: the same for every run, so that losses compare


def resolve(config: PretrainConfig, info: PreparedInfo, platform: str) -> PretrainConfig:
    """Fill in what the config leaves to the data and the platform; raise where they clash."""
    vocab_size = resolve_vocab_size(config.model.vocab_size, info.vocab_size, config.mesh)
    dtype = config.model.dtype or default_dtype(platform)
    model = dataclasses.replace(config.model, vocab_size=vocab_size, dtype=dtype)
    if info.row_length > model.max_length:
        raise InputError(
            f"the data's rows of {info.row_length} tokens are longer than the model's "
            f"max_length={model.max_length}: raise it, or prepare shorter rows"
        )
    train = config.train.with_steps(info.rows["train"], config.data.batch_size)
    return dataclasses.replace(config, model=model, train=train)


def default_dtype(platform: str) -> Literal["float32", "bfloat16"]:
    """Dtype of matrix products and activations on a platform."""
    return "float32" if platform == "cpu" else "bfloat16"


def resolve_vocab_size(given: int | None, tokenizer_size: int, mesh: MeshConfig) -> int:
    """The model's: as given, else padded. Raises where some token would have no row."""
    vocab_size = given or padded_vocab_size(tokenizer_size, mesh)
    if vocab_size < tokenizer_size:  # lookups would clip ids, without a word
        raise InputError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's vocabulary of "
            f"{tokenizer_size}: leave it None, or set it to that or more"
        )
    return vocab_size


def padded_vocab_size(size: int, mesh: MeshConfig) -> int:
    """Rounded up to a multiple of 64, for speed, and of the parts that the mesh makes of it."""
    multiple = math.lcm(64, max(mesh.tensor, 1))
    return math.ceil(size / multiple) * multiple


def check_batch(batch_size: int, num_micro_batches: int, mesh: Mesh) -> None:
    """The batch must split evenly over micro-batches, and each of those over devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    pieces = devices * num_micro_batches
    if batch_size % pieces:
        raise InputError(
            f"data.batch_size={batch_size} is not divisible by {devices} devices (data * fsdp) "
            f"times train.num_micro_batches={num_micro_batches}: the next that is, is "
            f"{(batch_size // pieces + 1) * pieces}"
        )


def check_pmap(mesh: Mesh) -> None:
    """``pmap`` knows one axis."""
    if mesh.shape["data"] != mesh.size:
        raise InputError(
            "placement=pmap is data parallel only: leave the mesh as it is, or use jit"
        )


def make_model(config: BertConfig) -> MaskedLm:
    """The encoder with its masked-language-model head."""
    head = MlmHead(config.epsilon, jnp.dtype(config.dtype or "float32"), config.initializer_std)
    return MaskedLm(config.make(), head)


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """What masking has to know of the tokenizer."""
    special = tokenizers.SpecialTokens.of(tokenizer)
    is_ordinary = np.ones(tokenizers.vocab_size(tokenizer), bool)
    is_ordinary[list(dataclasses.asdict(special).values())] = False
    return Vocabulary(
        mask_id=special.mask,
        start_id=special.cls,
        ordinary=jnp.asarray(np.flatnonzero(is_ordinary)),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=jnp.asarray(tokenizers.word_starts(tokenizer)),
    )


def make_loss(config: PretrainConfig, vocabulary: Vocabulary, masking: MaskingConfig) -> Loss:
    """The objective on the config's model."""
    return masked_lm.make_loss(
        make_model(config.model).apply,
        vocabulary,
        masking,
        isolate_documents=config.objective.isolate_documents,
    )


def make_placement(
    config: PretrainConfig, vocabulary: Vocabulary, devices: Sequence[Any] | None = None
) -> Placement:
    """The run's steps on all devices, or on ``devices``."""
    objective, train = config.objective, config.train
    model = make_model(config.model)
    optimizer = optim.make_optimizer(config.optimizer)

    def init(key: PRNGKey) -> TrainState:
        return TrainState.create(model.init(key, jnp.zeros((1, 8), jnp.int32)), {}, optimizer)

    axis_name = "data" if config.placement == "pmap" else None
    train_step = make_train_step(
        make_loss(config, vocabulary, objective.masking),
        optimizer,
        optim.make_schedule(config.optimizer),
        seed=train.seed,
        num_micro_batches=train.num_micro_batches,
        axis_name=axis_name,
    )
    eval_loss = make_loss(config, vocabulary, objective.eval_masking)
    eval_step = make_eval_step(eval_loss, seed=EVAL_SEED, axis_name=axis_name)
    mesh = sharding.make_mesh(config.mesh, devices)
    check_batch(config.data.batch_size, train.num_micro_batches, mesh)
    if axis_name is None:
        return jit_placement(init, train_step, eval_step, mesh)
    check_pmap(mesh)
    return pmap_placement(init, train_step, eval_step, axis_name, devices)


def flops_per_token(config: PretrainConfig, row_length: int) -> float:
    """Floating-point operations of one training step per token read (forward and backward)."""
    num_predicted = config.objective.masking.num_predicted(row_length)
    return 3 * config.model.forward_flops(row_length, num_predicted) / row_length


@dataclass(frozen=True)
class Run:
    """A trained run, read from its folder."""

    config: PretrainConfig
    tokenizer: Tokenizer
    step: int
    variables: Variables
    cursor: Cursor
    placement: Placement

    @property
    def state(self) -> TrainState:
        """What ``placement.eval_step`` takes."""
        return TrainState(jnp.asarray(self.step), self.variables, {}, ())


def open_run(directory: StoragePath | str, step: int | None = None) -> Run:
    """Read a run folder: its best checkpoint, or that of ``step``.

    Raises :class:`InputError` where the folder, a file in it, or the step is missing or damaged.
    """
    directory = locate(directory)
    config = read_config(directory, PretrainConfig)
    tokenizer = read_tokenizer(directory)
    config = for_evaluation(config)
    placement = make_placement(for_evaluation(config), make_vocabulary(tokenizer))
    checkpoints = directory / CHECKPOINTS
    restored = restore.restore_part(
        checkpoints,
        {"trainable": placement.abstract_state.trainable},
        restore.best_step(checkpoints, report=restore.warn) if step is None else step,
    )
    check_tokenizer(directory, restored.cursor, tokenizer)
    return Run(
        config, tokenizer, restored.step, restored.state["trainable"], restored.cursor, placement
    )


def is_run(directory: StoragePath) -> bool:
    """Whether it is a run folder of ours: other frameworks, too, write a ``config.json``."""
    path = directory / CONFIG
    return path.is_file() and '"type":' in path.read_bytes()[:40].decode(errors="replace")


def read_config(directory: StoragePath, kind: type[C]) -> C:
    """The config in a run folder of that kind."""
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory} is not a run folder: it has no {CONFIG}")
    if not is_run(directory):
        raise InputError(
            f"{directory} is not a run folder: its {CONFIG} is of another kind; a published or "
            "merged model is something to fine-tune from, with --base"
        )
    config = configs.read_file(directory / CONFIG)
    if not isinstance(config, kind):
        raise InputError(
            f"{directory} holds the run of a {type(config).__name__}, where one of a "
            f"{kind.__name__} is expected"
        )
    return config


def for_evaluation(config: Known) -> Known:
    """Shardings on all local devices, whatever the run was trained on."""
    devices = jax.device_count()
    rows = math.ceil(config.data.batch_size / devices) * devices
    return dataclasses.replace(
        config,
        mesh=sharding.MeshConfig(),
        placement="jit",
        data=dataclasses.replace(config.data, batch_size=rows),
        train=dataclasses.replace(config.train, num_micro_batches=1),
    )


def read_tokenizer(directory: StoragePath) -> Tokenizer:
    """The run folder's own."""
    if not (directory / TOKENIZER).is_file():
        raise InputError(f"{directory} is not a run folder: it has no {TOKENIZER}")
    return tokenizers.load(directory / TOKENIZER)


def check_tokenizer(directory: StoragePath, saved: Cursor, tokenizer: Tokenizer) -> None:
    """The run folder's tokenizer must be the one it was trained with."""
    found, trained = tokenizers.fingerprint(tokenizer), saved["tokenizer_sha256"]
    if found != trained:
        raise InputError(
            f"{directory / TOKENIZER} (sha256 {found[:12]}) is not the tokenizer that the "
            f"checkpoint was trained with ({trained[:12]}): restore it"
        )


def write_folder(directory: StoragePath, config: Config, tokenizer: Tokenizer) -> None:
    """Start a run folder: the resolved config, and the tokenizer."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / CONFIG, configs.to_json(config))
        with whole(directory / TOKENIZER) as unfinished:
            tokenizers.save(tokenizer, unfinished)
    except OSError as error:
        raise InputError(f"the run folder {directory} cannot be written: {error}") from error


def make_cursor(seed: int, data: Sequence[str], tokenizer_sha256: str) -> Cursor:
    """Where a run stands at its start, and what it stands on: fingerprints of ``data``."""
    return {
        "examples_seen": 0,
        "tokens_seen": 0.0,
        "elapsed_s": 0.0,
        "share": 0.0,
        "seed": seed,
        "data": list(data),
        "tokenizer_sha256": tokenizer_sha256,
    }


def check_processes(config: Config, checkpoints: StoragePath) -> None:
    """All processes of a run must be about to do the same, and see the same checkpoints."""
    if jax.process_count() == 1:
        return
    distributed.check_same(
        "program",
        {
            "the version of jax": jax.__version__,
            "the source code": distributed.code_hash(),
            "the number of devices": jax.local_device_count(),
            "the list of checkpoints": restore.list_steps(checkpoints),
            **configs.flatten(config),
        },
    )


def check_config(directory: StoragePath, config: Config) -> None:
    """A resumed run has the settings that it began with, as far as they decide what is learned."""
    saved, now = configs.flatten(read_config(directory, type(config))), configs.flatten(config)
    changed = [
        f"{path}={saved.get(path)} there and {now.get(path)} here"
        for path in sorted({*saved, *now})
        if saved.get(path) != now.get(path) and not re.fullmatch(_FREE, path)
    ]
    if changed and not config.accept_changes:
        raise InputError(
            f"{directory} holds a run that began with other settings: {'; '.join(changed)}; change "
            "them back, add --accept-changes, or give the run another --name"
        )


def check_same(
    directory: StoragePath, saved: Cursor, now: Cursor, *, accept_changes: bool = False
) -> None:
    """A resumed run has the tokenizer, data, seed, labels and base that it began with.

    With ``accept_changes`` data and seed may be others.
    """
    for name in ("tokenizer_sha256", "data", "seed", "labels", "base_sha256"):
        if accept_changes and name in ("data", "seed"):
            continue
        if saved.get(name) != now.get(name):
            way = ", add --accept-changes," if name in ("data", "seed") else ","
            difference = _difference(saved[name], now[name])
            raise InputError(
                f"the run in {directory} was trained with {name} {difference}: restore it{way} or "
                "give the run another --name"
            )


def resume_cursor(config: Config, saved: Cursor, start: Cursor) -> Cursor:
    """Where a run resumes that was ``saved`` and would now ``start`` with these data."""
    check_same(config.directory, saved, start, accept_changes=config.accept_changes)
    return saved | {name: start[name] for name in ("data", "seed")}


def _difference(before: object, after: object) -> str:
    """What is not the same, and where in a list."""
    if isinstance(before, list) and isinstance(after, list):
        pairs = itertools.zip_longest(before, after)
        number = next(i for i, (a, b) in enumerate(pairs) if a != b)
        one, other = (_short(x[number]) if number < len(x) else "none" for x in (before, after))
        return f"whose number {number + 1} was {one}, and would now be {other}"
    return f"{_short(before)} and would now be {_short(after)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:16]}…"
