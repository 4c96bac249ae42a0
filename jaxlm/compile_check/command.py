"""The command lines of scripts/compile_check.py and scripts/weak_scaling.py."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console

from jaxlm.compile_check import report, scaling, search, topology
from jaxlm.compile_check.check import Report, check, to_json
from jaxlm.compile_check.step import Assumed
from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.runs import command_line
from jaxlm.runs.base import read_model
from jaxlm.sharding import MeshConfig

Check = Callable[[Config, Assumed, topology.Topology], Report]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Compile a config's train step for chips that you do not have, and see whether it fits.

    All options of the config itself can follow, such as --mesh.fsdp 8; its script's --help lists
    them. No data, no weights and no TPU or GPU are needed.
    """

    config: tyro.conf.Positional[Path]
    """A config file of pretraining or fine-tuning."""
    topology: str
    """Kind of TPU and chips along each axis of a slice: v5e:16x16, v5p:8x8x8, v4:4x4x4, v6e:8x8.
    Or kind of GPU, hosts, and GPUs of each: h100:4x8, a100:8, h200:8, b200:8."""
    assumed: Annotated[Assumed, tyro.conf.arg(name="")] = field(default_factory=Assumed)
    search: bool = False
    """Try the meshes that make sense, and mark the best; the config's own mesh is not used."""
    json: Path | None = None
    """Append a JSON line for each compile to this file."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Compile for more and more chips, with the same rows on each; compare what is sent; draw it.

    All options of the config itself can follow, such as --mesh.fsdp 8; `data` grows.
    """

    config: tyro.conf.Positional[Path]
    """A config file of pretraining or fine-tuning."""
    topologies: tuple[str, ...] = (
        "v5p:2x2x2",
        "v5p:4x4x4",
        "v5p:4x8x8",
        "v5p:8x8x16",
        "v5p:16x16x16",
    )
    """Topologies to compile for, in turn; v5e:16x16*4 is four slices."""
    rows: int = 32
    """Rows of the batch for each device."""
    assumed: Annotated[Assumed, tyro.conf.arg(name="")] = field(default_factory=Assumed)
    json: Path | None = None
    """Append a JSON line for each compile to this file."""
    plot: Path = Path("weak_scaling.png")
    """File for the plot; the table is written beside it, in Markdown."""


A = TypeVar("A", CheckConfig, ScalingConfig)


def load(kind: type[A], argv: Sequence[str] | None = None) -> tuple[A, Config]:
    """What is asked, and the config with its own options."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = Path(sys.argv[0]).name
    asked, changes = tyro.cli(
        kind,
        prog=prog,
        args=argv,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = command_line.read(asked.config)
    return asked, command_line.changed(config, changes, prog=f"{prog} {asked.config}")


def run_check(
    asked: CheckConfig, config: Config, console: Console, compile_one: Check = check
) -> bool:
    """Compile, once or for every mesh, and print; returns whether it (or any of them) fits."""
    target = topology.read(asked.topology, config.mesh.num_slices)
    _tell_assumed(config, console)
    if not asked.search:
        found = compile_one(config, asked.assumed, target)
        _append(asked.json, found)
        console.print(report.memory_table(found))
        if found.traffic:
            console.print(report.traffic_table(found))
        said = [found.attention] if found.attention else []
        for line in (*said, *report.times(found), report.verdict(found, config)):
            console.print(line, soft_wrap=True)
        return found.fits
    reports: list[Report] = []
    for mesh in search.candidates(config, asked.assumed, target):
        changed = dataclasses.replace(config, mesh=mesh)
        try:
            found = compile_one(changed, asked.assumed, target)
        except InputError as error:  # one mesh at which the compiler fails is no answer for all
            console.print(f"fsdp={mesh.fsdp} tensor={mesh.tensor}: {error}", soft_wrap=True)
            continue
        reports.append(found)
        _append(asked.json, found)
        console.print(f"{_options(found)}: {report.verdict(found, changed)}", soft_wrap=True)
    chosen = search.best(reports)
    console.print(report.table(reports, chosen))
    console.print(report.ESTIMATE, soft_wrap=True)
    if chosen is not None:
        console.print(f"best: {_options(chosen)}")
    return chosen is not None


def run_scaling(
    asked: ScalingConfig, config: Config, console: Console, compile_one: Check = check
) -> None:
    """Compile for every topology, print the table, and draw it."""
    reports = []
    if not asked.plot.parent.is_dir():
        raise InputError(f"--plot {asked.plot}: the folder does not exist")
    for name in asked.topologies:
        if not re.fullmatch(r"[^*]+(\*[1-9]\d*)?", name):
            raise InputError(f"--topologies {name}: write v5e:16x16, or v5e:16x16*2 for two slices")
    _tell_assumed(config, console)
    for name in asked.topologies:
        kind, _, slices = name.partition("*")
        target = topology.read(kind, int(slices or 1))
        mesh: MeshConfig = dataclasses.replace(config.mesh, data=None, num_slices=target.num_slices)
        rows = asked.rows * target.num_devices
        data = dataclasses.replace(config.data, batch_size=rows)
        found = compile_one(
            dataclasses.replace(config, mesh=mesh, data=data), asked.assumed, target
        )
        reports.append(found)
        _append(asked.json, found)
        console.print(f"{name}: {report.verdict(found, config)}", soft_wrap=True)
    console.print(report.table(reports))
    console.print(report.ESTIMATE, soft_wrap=True)
    asked.plot.with_suffix(".md").write_text(report.markdown(reports), encoding="utf-8")
    scaling.plot(reports, asked.plot)


def _tell_assumed(config: Config, console: Console) -> None:
    if config.base and read_model(config.base) is None:
        console.print(
            f"the base {config.base} cannot be read here: assuming the encoder of --encoder; "
            "for another architecture, a folder with its config.json is enough as --base",
            soft_wrap=True,
        )


def _options(found: Report) -> str:
    return f"--mesh.fsdp {found.mesh['fsdp']} --mesh.tensor {found.mesh['tensor']}"


def _append(path: Path | None, found: Report) -> None:
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(found) + "\n")
    except OSError as error:
        raise InputError(f"--json {path} cannot be written: {error.strerror}") from error
