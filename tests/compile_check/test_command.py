import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from jaxlm.compile_check import command, search, topology
from jaxlm.compile_check.chip import GIB
from jaxlm.compile_check.command import CheckConfig, ScalingConfig
from jaxlm.compile_check.report import markdown, verdict
from jaxlm.compile_check.step import Assumed
from jaxlm.errors import InputError
from jaxlm.models import t5
from jaxlm.sharding import MeshConfig

BERT_BASE = str(Path(__file__).parent.parent.parent / "configs" / "bert_base.py")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


def printed(console):
    return " ".join(console.file.getvalue().split())


def test_options_of_the_check_and_of_the_config_mix():
    argv = [BERT_BASE, "--mesh.fsdp", "8", "--topology", "v5e:16x16", "--mesh.tensor", "4"]
    more = ["--length", "128", "--encoder.num-layers", "3", "--model.remat", "full", "--search"]
    asked, config = command.load(CheckConfig, argv + more)
    assert (asked.topology, asked.search, asked.assumed.length) == ("v5e:16x16", True, 128)
    assert asked.assumed.encoder.num_layers == 3
    assert (config.mesh, config.model.remat) == (MeshConfig(fsdp=8, tensor=4), "full")


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.load(CheckConfig, [BERT_BASE, "--topology", "v5e:4x4", "--mesh.nothing", "8"])
    assert "nothing" in capsys.readouterr().err


def test_one_compile(config, report, console, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = CheckConfig(config=Path(BERT_BASE), topology="v5e:4x4", json=out)
    config = replace(config, mesh=MeshConfig(num_slices=2))

    def compile_one(given, assumed, place):
        assert (given, place) == (config, topology.read("v5e:4x4", 2))
        return report

    assert command.run_check(asked, config, console, compile_one)
    text = printed(console)
    assert "fits: 4.00 of 16.00 GiB on each of 32 devices" in text
    assert "all-gather 24 20 2.000 3.000" in text
    assert "all-reduce over slices 2 2 1.000 1.000" in text
    assert "moments 2,048.0 12.5%" in text
    assert "1.00 TFLOP a step: 2.000 ms at the peak" in text
    assert json.loads(out.read_text())["num_devices"] == 32


def test_a_base_that_is_not_here_is_told(report, console):
    path = Path(BERT_BASE).with_name("sst2_lora.py")
    asked, config = command.load(
        CheckConfig, [str(path), "--topology", "v5e:4x4", "--base", "no/where"]
    )
    command.run_check(asked, config, console, lambda *_: report)
    assert "the base no/where cannot be read here: assuming" in printed(console)


def test_what_would_help(config, report, console):
    state = {"parameters": 6 * GIB, "moments": 12 * GIB, "frozen": 0.0, "batch": 0.0}
    large = replace(report, fits=False, needed=48 * GIB, memory=state, traffic=())
    asked = CheckConfig(config=Path(BERT_BASE), topology="v5e:4x4")
    assert not command.run_check(asked, config, console, lambda *_: large)
    assert (
        "does not fit: 32.00 GiB more than the 16.00 GiB of each of 32 devices; try --mesh.fsdp 8, "
        "or --model.remat full --model.unroll 1, or --train.num-micro-batches 16, or "
        "--data.batch-size 16" in printed(console)
    )
    # Nothing is advised that is done already, or cannot be.
    done = replace(config, model=replace(config.model, remat="full"))
    small = replace(large, batch_size=16, mesh=large.mesh | {"data": 2, "fsdp": 8})
    assert verdict(small, done).endswith("try more devices, or a smaller model")


def test_search_marks_the_fastest_that_fits(config, report, console, tmp_path):
    asked = CheckConfig(
        config=Path(BERT_BASE), topology="v5e:4x4", search=True, json=tmp_path / "out.jsonl"
    )

    def compile_one(given, assumed, place):
        fsdp, tensor = given.mesh.fsdp, given.mesh.tensor
        if (fsdp, tensor) == (4, 2):
            raise InputError("the TPU compiler ended with SIGSEGV")
        mesh = {"data": 16 // fsdp // tensor, "fsdp": fsdp, "tensor": tensor, "sequence": 1}
        return replace(report, mesh=mesh, fits=fsdp > 1, compute_s=1 / fsdp, num_devices=16)

    assert command.run_check(asked, config, console, compile_one)
    assert "fsdp=4 tensor=2: the TPU compiler ended with SIGSEGV" in printed(console)
    assert printed(console).endswith("best: --mesh.fsdp 16 --mesh.tensor 1")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == len(search.candidates(config, Assumed(), topology.read("v5e:4x4"))) - 1


def test_candidates_divide_what_they_split(config):
    pod = topology.read("v5e:16x16")
    meshes = search.candidates(config, Assumed(), pod)
    pairs = [(mesh.fsdp, mesh.tensor) for mesh in meshes]
    assert pairs[:5] == [(1, 1), (4, 1), (16, 1), (64, 1), (256, 1)]
    assert {tensor for _, tensor in pairs} == {1, 2, 4}  # 12 heads are not divisible by 8
    decoder = replace(config, model=t5.SMALL_V1_1)  # of 6 heads, and 8 layers of 512 and 1024
    pairs = [(m.fsdp, m.tensor) for m in search.candidates(decoder, Assumed(), pod)]
    assert pairs == [
        (1, 1),
        (4, 1),
        (16, 1),
        (64, 1),
        (256, 1),
        (1, 2),
        (4, 2),
        (16, 2),
        (64, 2),
        (128, 2),
    ]
    # 512 devices have no rows of 256 each, unless two share them.
    more = search.candidates(config, Assumed(), topology.read("v5p:8x8x8"))
    assert {mesh.tensor for mesh in more} == {2, 4}
    with pytest.raises(InputError, match="no mesh of 4096 devices divides"):
        search.candidates(config, Assumed(), topology.read("v5p:16x16x16"))
    with pytest.raises(InputError, match="--search varies the mesh"):
        search.candidates(replace(config, placement="pmap"), Assumed(), topology.read("v5e:4x4"))


def test_weak_scaling_keeps_the_rows_of_a_device(config, report, console, tmp_path):
    asked = ScalingConfig(
        config=Path(BERT_BASE),
        topologies=("v5e:2x4", "v5e:4x4*2"),
        rows=16,
        plot=tmp_path / "out.png",
    )
    seen = []

    def compile_one(given, assumed, place):
        seen.append((given.data.batch_size, given.mesh.num_slices, place.num_devices))
        return replace(report, num_devices=place.num_devices, batch_size=given.data.batch_size)

    command.run_scaling(asked, config, console, compile_one)
    assert seen == [(128, 1, 8), (512, 2, 32)]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out.md").read_text().count("\n") == 4


def test_tables_in_markdown(report):
    large = replace(report, fits=False, needed=None)
    text = markdown([report, large])
    assert "| bert_base | v5e:4x4 x 2 | data=4 fsdp=4 tensor=2 | 256 x 512 | 4.00 | yes |" in text
    assert "| ? | no |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1
