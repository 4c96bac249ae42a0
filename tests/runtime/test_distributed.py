"""Runs of several real processes, each with fake devices: joined, stopped, killed, resumed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from addresses import free_address
from tiny_runs import make_config
from xla_flags import xla_flags

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.prepare import prepare
from jaxlm.optim import OptimizerConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs.finetuning import finetune
from jaxlm.runs.folder import CHECKPOINTS
from jaxlm.runs.pretraining import pretrain
from jaxlm.runtime import distributed
from jaxlm.train.loop import TrainConfig
from jaxlm.train.metrics import read_jsonl
from jaxlm.train.restore import list_steps

SCRIPT = Path(__file__).parents[1] / "support" / "faulty_run.py"
STEPS = 6
HANG_S = 900  # far more than a slow machine takes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("hosts")
    made = make_config(folder, steps=STEPS, num_layers=1)
    prepare(made.prepare, folder / "prepared")
    return made


def start_all(
    commands: dict[int, list[str]], processes: int, environment: dict[int, dict[str, str]]
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of commands, by the number of the process."""
    running = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with free_address() as address:
        for index, command in commands.items():
            joins = {
                "JAX_PLATFORMS": "cpu",
                distributed.ADDRESS: address,
                distributed.COUNT: str(processes),
                distributed.INDEX: str(index),
            }
            env = os.environ | joins | environment.get(index, {})
            running.append(
                subprocess.Popen([sys.executable, *command], env=env, text=True, **pipes)
            )
        outputs = [process.communicate(timeout=HANG_S)[0] for process in running]
    return [process.returncode for process in running], outputs


def start(
    config: PretrainConfig | FinetuneConfig,
    *options: str,
    processes: int = 2,
    indices: Sequence[int] | None = None,
    devices: int = 4,
    faults: dict[int, str] | None = None,
    differing: Sequence[str] = (),
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of the processes, or of those of them that ``indices`` name.

    ``differing`` options are those of process 1 alone.
    """
    file = config.runs.parent / f"{config.name}.json"
    file.write_text(configs.to_json(config))
    commands, environments = {}, {}
    for index in range(processes) if indices is None else indices:
        more = differing if index == 1 else ()
        commands[index] = [str(SCRIPT), str(file), *options, *more]
        fault = (faults or {}).get(index, "")
        environments[index] = {"XLA_FLAGS": xla_flags(devices), "FAULT": fault}
    return start_all(commands, processes, environments)


@pytest.fixture(scope="module")
def whole(config: PretrainConfig) -> Path:
    """A run of two processes with four devices each that nothing interrupted."""
    codes, outputs = start(config)
    assert codes == [0, 0], outputs
    assert "step 6/6" in outputs[0]
    assert not re.search(r"step \d", outputs[1])  # one progress bar
    return config.directory


def losses(directory: Path) -> dict[tuple[int, str], float]:
    return {
        (row["step"], name): row[name]
        for row in read_jsonl(directory / "metrics.jsonl")
        for name in ("train/loss", "train/accuracy", "tokens", "eval/loss")
        if name in row
    }


def leaves(directory: Path) -> dict[str, int]:
    """The checksum of every array of the last checkpoint."""
    meta = directory / CHECKPOINTS / str(STEPS) / "meta" / "metadata"
    return {path: leaf["checksum"] for path, leaf in json.loads(meta.read_text())["leaves"].items()}


def same_numbers(directory: Path, whole: Path) -> None:
    found, wanted = losses(directory), losses(whole)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step(config: PretrainConfig, whole: Path) -> None:
    codes, outputs = start(config, "--name", "stopped", faults={1: "SIGTERM:2"})
    assert codes == [0, 0], outputs
    directory = config.runs / "stopped"
    (step,) = re.findall(r"stopped at step (\d+) and saved", outputs[0])
    assert list_steps(directory / CHECKPOINTS)[-1] == int(step) < STEPS
    assert start(config, "--name", "stopped")[0] == [0, 0]
    assert losses(directory) == losses(whole)  # equal to the last bit
    assert leaves(directory) == leaves(whole)


@pytest.mark.slow
def test_one_may_compile_for_long(config: PretrainConfig, whole: Path) -> None:
    # Without distributed.connect the other one gives up after 30 s.
    codes, outputs = start(config, "--name", "late", faults={1: "late:40"})
    assert codes == [0, 0], outputs
    assert losses(config.runs / "late") == losses(whole)


@pytest.mark.slow
def test_killed_and_resumed_in_one_process(config: PretrainConfig, whole: Path) -> None:
    codes, _ = start(config, "--name", "killed", faults={0: "SIGKILL:5"})
    assert all(codes)
    pretrain(replace(config, name="killed"))  # on the eight devices of this process
    same_numbers(config.runs / "killed", whole)


@pytest.mark.slow
def test_an_error_in_one_ends_all(config: PretrainConfig, whole: Path) -> None:
    codes, outputs = start(config, "--name", "failed", faults={1: "error:4"})
    assert codes == [1, 1]
    # Which says that it was told, and did not wait until JAX missed the other, after 100 s.
    assert "error: process 1 of 2" in outputs[0]
    assert "made to fail" in outputs[0]
    assert "Traceback" in outputs[1]
    assert "Traceback" not in outputs[0]


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        ("InputError('a bad row')", 2, "a bad row"),
        pytest.param("SystemExit(3)", 3, "exit code 3", marks=pytest.mark.slow),
    ],
)
def test_all_of_three_say_who_failed(failure: str, code: int, said: str) -> None:
    source = f"""
import os, time
from jaxlm.runtime import distributed
from jaxlm.errors import InputError
with distributed.joined():
    if os.environ["{distributed.INDEX}"] == "1":
        raise {failure}
    time.sleep({HANG_S})
"""
    codes, outputs = start_all({index: ["-c", source] for index in range(3)}, 3, {})
    assert codes == [1, code, 1], outputs
    for output in (outputs[0], outputs[2]):
        assert re.search(rf"error: process 1 of 3 .*{said}", output), outputs


@pytest.mark.slow
def test_resumed_in_four_processes(config: PretrainConfig, whole: Path) -> None:
    assert all(start(config, "--name", "four", faults={0: "SIGKILL:5"})[0])
    assert start(config, "--name", "four", processes=4, devices=2)[0] == [0] * 4
    same_numbers(config.runs / "four", whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGKILL", "error"])
@pytest.mark.parametrize("index", [0, 1])
def test_whoever_fails_the_others_end_and_nothing_is_lost(
    config: PretrainConfig, whole: Path, kind: str, index: int
) -> None:
    name = f"{kind}{index}"
    codes, outputs = start(config, "--name", name, faults={index: f"{kind}:5"})
    assert all(codes), outputs
    if (kind, index) == ("SIGKILL", 1):
        assert "process 1 has given no sign of life" in outputs[0]
    assert start(config, "--name", name)[0] == [0, 0]
    assert losses(config.runs / name) == losses(whole)
    assert leaves(config.runs / name) == leaves(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--mesh.fsdp", "2", "--mesh.tensor", "2"],
        ["--mesh.fsdp", "4", "--mesh.sequence", "2"],
        ["--mesh.tensor", "2", "--mesh.sequence", "4"],  # one part of the batch for both processes
    ],
    ids=" ".join,
)
def test_other_layouts_give_the_same(
    config: PretrainConfig, whole: Path, options: list[str]
) -> None:
    name = "".join(options).replace("--", "")
    codes, outputs = start(config, "--name", name, *options)
    assert codes == [0, 0], outputs
    same_numbers(config.runs / name, whole)


@pytest.mark.slow
def test_pmap_in_two_processes(config: PretrainConfig) -> None:
    # Under pmap each device draws its own dropout masks.
    dry = replace(config.model, dropout_rate=0.0, attention_dropout_rate=0.0)
    alone = replace(config, name="dry", model=dry)
    pretrain(alone)
    pmapped = replace(alone, name="pmapped", placement="pmap")
    assert start(pmapped, faults={0: "SIGTERM:2"})[0] == [0, 0]
    assert start(pmapped)[0] == [0, 0]
    same_numbers(pmapped.directory, alone.directory)


@pytest.mark.slow
def test_lora_in_two_processes(config: PretrainConfig, whole: Path) -> None:
    folder = config.runs.parent
    rng = np.random.default_rng(0)
    for name, rows in (("train", 96), ("dev", 30)):
        lines = ["text,label"]
        for row in range(rows):
            words = ["red", "cat"] if row % 2 else ["blue", "dog"]
            lines.append(f"{' '.join(rng.choice(words, rng.integers(3, 12)))},{row % 2}")
        (folder / f"{name}.csv").write_text("\n".join(lines))
    lora = FinetuneConfig(
        name="lora",
        runs=config.runs,
        base=str(whole),
        data=LabelledConfig(
            train=Table(path=str(folder / "train.csv")),
            validation=Table(path=str(folder / "dev.csv")),
            batch_size=16,
            max_length=16,
            num_buckets=2,
        ),
        tuning=LoraConfig(targets=("(query|value)/kernel",), rank=2),
        optimizer=OptimizerConfig(peak_lr=1e-2),
        train=TrainConfig(steps=STEPS, num_evals=2, log_every=1),
    )
    codes, outputs = start(lora, faults={1: "SIGTERM:2"})
    assert codes == [0, 0], outputs
    codes, outputs = start(lora)
    assert codes == [0, 0], outputs
    assert "resuming from step" in outputs[0]
    finetune(replace(lora, name="alone"))
    same_numbers(lora.directory, config.runs / "alone")


# Bad input.


def test_another_command_in_one_process(config: PretrainConfig) -> None:
    codes, outputs = start(config, "--name", "two", differing=["--optimizer.peak-lr", "0.02"])
    assert codes == [1, 2]
    assert "error: optimizer.peak_lr is 0.02 here, and 0.01 in process 0" in outputs[1]
    assert "process 1 of 2" in outputs[0]
    assert not (config.runs / "two").exists()


def test_an_absent_process(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(distributed.JOIN_TIMEOUT, "3")
    codes, outputs = start(config, "--name", "absent", indices=[0])
    assert codes == [2]
    assert "after 3 s, 2 processes have not all joined at localhost:" in outputs[0]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({distributed.COUNT: "2"}, distributed.INDEX),
        ({distributed.COUNT: "2", distributed.INDEX: "one", distributed.ADDRESS: "here:1"}, "one"),
        (
            {distributed.COUNT: "2", distributed.INDEX: "2", distributed.ADDRESS: "here:1"},
            "from 0 to",
        ),
        (
            {distributed.COUNT: "2", distributed.INDEX: "1", distributed.ADDRESS: "here"},
            "HOST:PORT",
        ),
        (
            {
                distributed.COUNT: "2",
                distributed.INDEX: "1",
                distributed.ADDRESS: "here:1",
                distributed.JOIN_TIMEOUT: "soon",
            },
            "JAXLM_JOIN_TIMEOUT=soon is not a whole number",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(
    values: dict[str, str],
    match: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), distributed.joined():
        pass
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a,b"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in a batch script, or salloc's shell: not under srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"JOB_COMPLETION_INDEX": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", distributed.COUNT: "1"}, False),
    ],
    ids=str,
)
def test_launchers_are_found(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: bool
) -> None:
    names = (
        distributed.ADDRESS,
        distributed.COUNT,
        distributed.INDEX,
        "SLURM_NTASKS",
        "SLURM_STEP_NODELIST",
    )
    for name in (*names, "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._settings() == ({} if found else None)


def test_importing_leaves_jax_to_be_joined() -> None:
    check = "from jax._src import xla_bridge as b; assert not b.backends_are_initialized()"
    for command in (
        f"from jaxlm.runs import finetuning; {check}",
        f"import jax; jax.devices(); {check}",
    ):
        code = subprocess.run([sys.executable, "-c", command], stderr=subprocess.DEVNULL).returncode
        assert bool(code) == ("devices" in command)  # the second is the control


def test_alone_nothing_is_joined() -> None:
    with distributed.joined(), distributed.first("nothing"):
        distributed.check_same("nothing", {"a": 1})
    assert not jax.distributed.is_initialized()
