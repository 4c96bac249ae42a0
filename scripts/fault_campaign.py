"""Kill and damage training runs at random, and see whether anything is lost.

    python scripts/fault_campaign.py
    python scripts/fault_campaign.py --kills 20 --processes 2

Tiny runs, of pretraining and of LoRA, save at every fifth step; their names hold brackets, spaces
and an accent. One of each that nothing disturbs is the reference. Others are killed (SIGKILL) at
random moments of training, every second time while a checkpoint is being written, and started again
until they end; others find their newest checkpoint truncated, without a file or with
a flipped bit, or the disk full or read-only. After each fault every finished checkpoint must be the
reference's of that step, and every run must end in the reference's last checkpoint, bit by bit.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from rich.console import Console

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.data.loader import DataConfig
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles
from jaxlm.errors import InputError, report_input_errors
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs.folder import CHECKPOINTS
from jaxlm.runtime import distributed
from jaxlm.runtime.console import make_console
from jaxlm.train.loop import TrainConfig
from jaxlm.train.restore import list_steps

SCRIPTS = {"pretraining": "pretrain.py", "LoRA": "finetune.py"}
STEPS, SAVE_EVERY = 400, 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How often each thing is done."""

    kills: int = 50
    """SIGKILLs at random moments, of each kind of run."""
    damages: int = 10
    """Newest checkpoints that are damaged, of each kind."""
    processes: int = 1
    """Processes of each run; with several, a random one of them is killed."""
    seed: int = 0
    """Seed of the moments and of what is damaged."""

    def __post_init__(self) -> None:
        for name in ("kills", "damages"):
            if vars(self)[name] < 0:
                raise InputError(f"--{name} {vars(self)[name]} is below 0")
        if self.processes < 1:
            raise InputError(f"--processes {self.processes} is below 1")


@dataclass
class Row:
    """What became of the runs that had one kind of fault."""

    fault: str
    times: int = 0
    completed: int = 0
    """Runs that ended in the reference's last checkpoint."""
    wrong: int = 0
    """Finished checkpoints, or ends of runs, that were not the reference's."""
    lost: int = 0
    """Runs that could not be resumed."""
    refused: int = 0
    """Damaged checkpoints that were found out, or faults that ended a run with one sentence."""


@dataclass
class Campaign:
    """The folder of the runs, and what is known of the reference."""

    job: str
    """Kind of run: a key of SCRIPTS."""
    folder: Path
    processes: int
    random: random.Random
    known: dict[int, dict[str, int]] = field(default_factory=dict)
    """The checksum of every array, in each of the reference's checkpoints."""

    @property
    def command(self) -> list[str]:
        """What starts a run, but for its name."""
        script = Path(__file__).with_name(SCRIPTS[self.job])
        return [sys.executable, str(script), str(self.folder / f"{self.job}.json")]

    def checkpoints(self, name: str) -> Path:
        """The folder of a run's checkpoints."""
        return self.folder / "runs" / name / CHECKPOINTS

    def start(self, name: str, *options: str) -> list[subprocess.Popen[str]]:
        """The processes of a run."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        started = []
        for index in range(self.processes):
            joins = {distributed.ADDRESS: address, distributed.COUNT: str(self.processes)}
            command = [*self.command, "--name", name, *options]
            started.append(
                subprocess.Popen(
                    command,
                    env=os.environ | joins | {distributed.INDEX: str(index)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started

    def learn(self, name: str) -> None:
        """Make ``known`` from a run that nothing disturbs."""
        for process in self.start(name, "--train.keep", str(STEPS)):
            output = process.communicate()[0]
            if process.returncode:
                raise InputError(f"the run that nothing disturbs failed: {output}")
        self.known = self.saved(name)

    def saved(self, name: str) -> dict[int, dict[str, int]]:
        """As ``known``, of a run's finished checkpoints.

        One that cannot be read is left out: a kill may leave an old one half deleted.
        """
        found = {}
        for step in list_steps(self.checkpoints(name)):
            meta = self.checkpoints(name) / str(step) / "meta" / "metadata"
            with contextlib.suppress(OSError, ValueError):
                found[step] = checksums_in(meta.read_text())
        return found

    def check(self, name: str, row: Row) -> None:
        """Count checkpoints that are not the reference's, and a newest that cannot be read."""
        saved, steps = self.saved(name), list_steps(self.checkpoints(name))
        row.wrong += sum(self.known[step] != sums for step, sums in saved.items())
        row.wrong += bool(steps) and steps[-1] not in saved

    def finish(self, name: str, row: Row) -> str:
        """Let a run go to its end without faults; what process 0 printed."""
        started = self.start(name)
        outputs = [process.communicate()[0] for process in started]
        ends = self.saved(name).get(STEPS)
        row.lost += any(process.returncode for process in started)
        row.completed += ends == self.known[STEPS]
        row.wrong += ends != self.known[STEPS]
        return outputs[0]


def checksums_in(meta: str) -> dict[str, int]:
    """Checksum of every array, by path, from a checkpoint's metadata."""
    return {path: leaf["checksum"] for path, leaf in json.loads(meta)["leaves"].items()}


def main(options: Options) -> None:
    """Print a table of what was lost."""
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="jaxlm-faults-") as place:
        # One that is compiled is read by all that follow.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{place}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        folder, rng = Path(place), random.Random(options.seed)
        write_configs(folder)
        rows, campaigns = [], {}
        for job in SCRIPTS:
            campaigns[job] = Campaign(job, folder, options.processes, rng)
            with console.status(f"{job} that nothing disturbs"):
                campaigns[job].learn(job)
            rows.append(kills(campaigns[job], options.kills, console))
        campaign = campaigns["pretraining"]
        for fault, damage in DAMAGES.items():
            rows.append(damages(campaign, fault, damage, options.damages, console))
        if not shutil.which("unshare") or subprocess.run([*OWN_DISKS, "true"]).returncode:
            console.print("disks were left alone: unshare may make no file systems here")
        else:
            alone = replace(campaign, processes=1)
            if options.processes > 1:  # the sum over two devices differs in its last bits
                alone.learn("alone")
            rows += [disk(alone, fault, script) for fault, script in DISKS.items()]
    console.print(to_markdown(rows), highlight=False, soft_wrap=True)
    if any(row.wrong or row.lost for row in rows):
        raise InputError("something was lost or wrong: see the table")


def write_configs(folder: Path) -> None:
    """Tiny runs on random words: the second starts from the first, which nothing disturbs."""
    rng = random.Random(0)
    words = ["red", "green", "blue", "cat", "dog"]
    lines = (" ".join(rng.choices(words, k=12)) for _ in range(400))
    (folder / "text.txt").write_text("\n".join(lines))
    config = configs.read_file(Path(__file__).parents[1] / "configs" / "quickstart.py")
    assert isinstance(config, PretrainConfig)
    assert config.model is not None
    sizes = {"hidden_dim": 32, "mlp_dim": 64, "max_length": 16}
    config = replace(
        config,
        name="pretraining",
        runs=folder / "runs",
        data=DataConfig(paths=(str(folder / "prepared"),), batch_size=16),
        prepare=PrepareConfig(
            source=TextFiles(glob=str(folder / "text.txt"), document="line"),
            tokenizer=TokenizerConfig(vocab_size=60),
            row_length=16,
            validation_fraction=0.1,
        ),
        model=replace(config.model, **sizes),
        train=TrainConfig(steps=STEPS, num_evals=2, save_every=SAVE_EVERY),
    )
    (folder / "pretraining.json").write_text(configs.to_json(config))
    rows = (f"{' '.join(rng.choices(words, k=9))} {i},{i % 2}" for i in range(400))
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    tuning = FinetuneConfig(
        name="LoRA",
        runs=config.runs,
        base=str(folder / "runs" / "pretraining"),
        data=LabelledConfig(
            train=Table(path=str(folder / "rows.csv")), batch_size=16, max_length=16, num_buckets=1
        ),
        tuning=LoraConfig(rank=2),
        train=config.train,
    )
    (folder / "LoRA.json").write_text(configs.to_json(tuning))


def kills(campaign: Campaign, times: int, console: Console) -> Row:
    """SIGKILL one process, again and again, until runs end."""
    row, runs = Row(f"SIGKILL, {campaign.job}"), 0
    with console.status("") as status:
        while row.times < times:
            runs, name = runs + 1, f"{campaign.job} [{runs}] tué"
            while row.times < times and STEPS not in list_steps(campaign.checkpoints(name)):
                status.update(f"SIGKILL {row.times + 1} of {times}")
                started = campaign.start(name)
                wait_for_moment(campaign, name, started, while_saving=row.times % 2 == 1)
                alive = all(process.poll() is None for process in started)
                if alive:
                    campaign.random.choice(started).send_signal(signal.SIGKILL)
                    row.times += 1
                for process in started:
                    process.communicate()
                campaign.check(name, row)
                if not alive:  # it ended, or cannot be resumed: finish() tells
                    break
            campaign.finish(name, row)
    return row


def wait_for_moment(
    campaign: Campaign,
    name: str,
    started: list[subprocess.Popen[str]],
    *,
    while_saving: bool = False,
    saves: int = 1,
) -> None:
    """Until a random moment of training after some saves, or until a process has ended."""
    last = max(list_steps(campaign.checkpoints(name)), default=-1)
    while len([step for step in list_steps(campaign.checkpoints(name)) if step > last]) < saves:
        if any(process.poll() is not None for process in started):
            return
        time.sleep(0.01)
    time.sleep(campaign.random.uniform(0, 3))
    while while_saving and not list(campaign.checkpoints(name).glob("*.orbax-checkpoint-tmp*")):
        if any(process.poll() is not None for process in started):
            return
        time.sleep(0.0005)


def truncate(path: Path, rng: random.Random) -> None:
    """Cut off at a random place."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_bit(path: Path, rng: random.Random) -> None:
    """One, at a random place."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path: Path, _: random.Random) -> None:
    """Remove the file."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated file": truncate,
    "deleted file": delete,
    "flipped bit": flip_bit,
}

# In a file system of their own, which needs Linux: run with the fault, and once more without it.
# $D is the folder of runs, $N the name of the run.
FULL = """
mount -t tmpfs -o size=3m tmpfs $D
"$@" --train.keep 400; echo EXIT $?
mount -o remount,size=99m $D
"""
READ_ONLY = """
mount -t tmpfs -o size=99m tmpfs $D
"$@" & while kill -0 $! && ! ls $D/$N/checkpoints | grep -qE '^[1-9][0-9]{2}$'; do sleep 0.1; done
kill -KILL $!; wait
mount -o remount,ro $D
"$@"; echo EXIT $?
mount -o remount,rw $D
"""
OWN_DISKS = ["unshare", "--user", "--map-root-user", "--mount"]
DISKS = {"full disk": FULL, "read-only disk": READ_ONLY}


def damages(
    campaign: Campaign,
    fault: str,
    damage: Callable[[Path, random.Random], None],
    times: int,
    console: Console,
) -> Row:
    """Damage a file of the newest checkpoint of a run that was killed, then resume it."""
    row = Row(fault)
    with console.status("") as status:
        while row.times < times:
            status.update(f"{fault} {row.times + 1} of {times}")
            name = re.sub(r"\W", "_", f"{fault}{row.times}")
            started = campaign.start(name)
            wait_for_moment(campaign, name, started, saves=2)  # one to fall back on
            for process in started:
                process.kill()
                process.communicate()
            row.times += 1
            if not (steps := list_steps(campaign.checkpoints(name))):
                row.lost += 1
                continue
            newest = campaign.checkpoints(name) / str(steps[-1])
            sizes = {p: p.stat().st_size for p in sorted(newest.rglob("*")) if p.is_file()}
            files = [path for path, size in sizes.items() if size]
            # Any bit is as likely to flip as any other; any file as likely to be cut or lost.
            weights = [sizes[path] if damage is flip_bit else 1 for path in files]
            damage(campaign.random.choices(files, weights)[0], campaign.random)
            row.refused += "is damaged" in campaign.finish(name, row)
    return row


def disk(campaign: Campaign, fault: str, script: str) -> Row:
    """A run whose disk fails, and recovers."""
    row, name = Row(fault, times=1), re.sub(r"\W", "_", fault)
    folder = campaign.folder / name
    folder.mkdir()
    command = [*campaign.command, "--name", name, "--runs", str(folder)]
    script += f'"$@"; cat $D/$N/{CHECKPOINTS}/{STEPS}/meta/metadata'
    done = subprocess.run(
        [*OWN_DISKS, "sh", "-c", script, "sh", *command],
        env=os.environ | {"D": str(folder), "N": name},
        capture_output=True,
        text=True,
        check=False,
    )
    said = re.findall(r"^error: .*$", done.stderr, re.MULTILINE)
    row.refused = int(len(said) == 1 and "EXIT 2" in done.stdout and "Traceback" not in done.stderr)
    try:
        ends = checksums_in(done.stdout.splitlines()[-1])
    except (IndexError, ValueError, TypeError):
        row.lost = 1
        return row
    row.completed = int(ends == campaign.known[STEPS])
    row.wrong = 1 - row.completed
    return row


def to_markdown(rows: list[Row]) -> str:
    """One line for each kind of fault."""
    lines = [
        "| fault | times | found and said in one sentence | runs completed | lost runs | wrong |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        refused = "" if row.fault.startswith("SIGKILL") else row.refused
        cells = row.fault, row.times, refused, row.completed, row.lost, row.wrong
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with report_input_errors():
        main(tyro.cli(Options, description=__doc__))
