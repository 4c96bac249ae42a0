import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config

SCRIPTS = Path(__file__).parents[1] / "scripts"

FAKE_WORKER = """
import time
from benchmark_protocol import read_work, serve

print("a library's greeting")
serve(
    read_work(), versions="fake 1", device_name="Fake H100", compiles=True,
    step=lambda: time.sleep(0.002), finish=lambda handle: 1.5, device_peak_bytes=lambda: 3 * 2**20,
)
"""


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew


def load(name):
    return importlib.import_module(name)


def make_work(**changes):
    work = load("benchmark_protocol").Work(
        task="mlm",
        recipe="tuned",
        dtype="float32",
        device="cpu",
        num_layers=12,
        hidden_dim=768,
        num_heads=12,
        mlp_dim=3072,
        vocab_size=30522,
        batch_size=16,
        row_length=128,
    )
    return replace(work, **changes)


def make_result(label, rounds, *, is_torch=True, contaminated=(), work=None):
    protocol, report = load("benchmark_protocol"), load("benchmark_report")
    chunks = [
        protocol.Chunk(
            step_seconds=[seconds, seconds, 9 * seconds],
            others_share=0.5 if i in contaminated else 0.01,
            steal_share=0.0,
            peak_mib=100.0 + i,
        )
        for i, seconds in enumerate(rounds)
    ]
    ready = protocol.Ready(
        versions="fake 1",
        device_name="",
        compile_seconds=None if is_torch else 1.25,
        step_seconds=1.0,
        loss=10.0,
        peak_mib=1500.0,
    )
    return report.Result(
        label=label,
        is_torch=is_torch,
        work=work or make_work(),
        allocator="default",
        ready=ready,
        chunks=chunks,
    )


def test_flops_per_token_of_bert_base():
    flops = load("benchmark_report").step_flops
    # 6 per weight of the encoder's 84,934,656, attention's 12 S H N, the head at 20 of 128.
    expected = 6 * 84_934_656 + 12 * 128 * 768 * 12 + 20 / 128 * 6 * (768**2 + 768 * 30522)
    assert flops(make_work()) / (16 * 128) == pytest.approx(expected, rel=1e-12)
    shipped, tuned = flops(make_work(recipe="shipped")), flops(make_work())
    assert shipped - tuned == 3 * 16 * 108 * 2 * (768**2 + 768 * 30522)


def test_flops_of_modernbert():
    flops = load("benchmark_report").step_flops
    weights, attention = 12 * (4 * 768**2 + 3 * 768 * 3072), 12 * 128 * 768 * 12
    head = 39 / 128 * 6 * (768**2 + 768 * 30522)
    work = make_work(task="modern", mask_rate=0.3)
    assert flops(work) / (16 * 128) == pytest.approx(6 * weights + attention + head, rel=1e-12)


def test_flops_of_gpt2():
    work = make_work(task="clm")
    config = Gpt2Config(
        num_layers=work.num_layers,
        hidden_dim=work.hidden_dim,
        mlp_dim=work.mlp_dim,
        vocab_size=work.vocab_size,
    )
    expected = 3 * work.batch_size * config.forward_flops(128, 128)
    assert load("benchmark_report").step_flops(work) == pytest.approx(expected, rel=1e-12)


def test_flops_of_fine_tuning():
    flops = load("benchmark_report").step_flops
    tokens, weights, attention = 16 * 128, 84_934_656, 12 * 128 * 768 * 12
    head = 16 * 6 * (768**2 + 768 * 2)
    full = tokens * (6 * weights + attention) + head
    assert flops(make_work(task="full")) == pytest.approx(full, rel=1e-12)
    # No gradients of frozen weights; two adapters a layer, of two factors each.
    lora = tokens * (4 * weights + attention + 6 * 12 * 2 * 2 * 768 * 8) + head
    assert flops(make_work(task="lora")) == pytest.approx(lora, rel=1e-12)


def test_masked_positions_of_a_row():
    assert make_work().num_masked == 20
    assert make_work(row_length=512).num_masked == 77
    assert make_work(recipe="shipped").num_projected == 128


def test_ratios_compare_steps_of_the_same_round():
    report = load("benchmark_report")
    # The machine is half as fast in round 1: medians differ, ratios do not.
    reference, fast = make_result("a", [4.0, 8.0]), make_result("b", [1.0, 2.0])
    assert report.round_ratios(fast, reference) == [4.0, 4.0]
    assert report.round_ratios(reference, reference) == [1.0, 1.0]


def test_contaminated_rounds_count_only_if_all_are():
    report = load("benchmark_report")
    reference = make_result("a", [4.0, 4.0, 4.0], contaminated={0})
    fast = make_result("b", [1.0, 2.0, 100.0], contaminated={2})
    assert report.round_ratios(fast, reference) == [2.0]
    assert report.median_seconds(fast) == 1.5
    hopeless = make_result("c", [1.0, 2.0, 3.0], contaminated={0, 1, 2})
    assert report.round_ratios(hopeless, reference) == pytest.approx([4.0, 2.0, 4 / 3])
    assert report.median_seconds(hopeless) == 2.0


def test_strongest_is_the_fastest_of_torch_only():
    report = load("benchmark_report")
    results = [make_result("slow", [4.0]), make_result("fast", [2.0])]
    ours = make_result("ours", [1.0], is_torch=False)
    assert report.strongest_torch([*results, ours]).label == "fast"


def test_table_has_a_row_a_variant():
    report = load("benchmark_report")
    results = [
        make_result("HF as shipped, float32", [4.0, 4.0], work=make_work(recipe="shipped")),
        make_result("tuned", [2.0, 2.0]),
        make_result("ours", [1.0, 1.25], is_torch=False),
    ]
    rows = report.summarize(results, peak=1e12)
    assert rows[0]["× HF as shipped"] == "1.00 (1.00–1.00)"
    assert rows[2]["× HF as shipped"] == "3.60 (3.20–4.00)"
    assert rows[2]["× strongest torch"] == "1.80 (1.60–2.00)"
    assert rows[2]["tokens/s"] == "1,820"
    assert rows[0]["compile s"] == "–"
    assert (rows[2]["peak MiB"], rows[2]["steady MiB"]) == ("1,500", "101")
    assert rows[1]["MFU"] == f"{report.step_flops(make_work()) / 2e12:.1%}"
    assert "MFU" not in report.summarize(results, peak=None)[0]
    assert [row["memory ratio"] for row in rows] == ["1.00"] * 3
    lines = report.to_markdown(rows).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {len(rows[0]) + 1}
    assert lines[1].startswith("| ---")


def test_ratios_are_to_the_first_variant():
    report = load("benchmark_report")
    results = [make_result("peft as shipped, float32", [4.0]), make_result("ours", [1.0])]
    small = replace(results[1].ready, peak_mib=50.0)
    light = replace(results[1], ready=small, chunks=[replace(results[1].chunks[0], peak_mib=600.0)])
    rows = report.summarize([results[0], light], peak=None)
    assert rows[1]["× peft as shipped"] == "4.00 (4.00–4.00)"
    assert rows[1]["memory ratio"] == "0.40"
    unknown = replace(light, ready=replace(small, peak_mib=None), chunks=light.chunks[:0])
    unknown = replace(unknown, chunks=[replace(light.chunks[0], peak_mib=None)])
    assert report.summarize([results[0], unknown], peak=None)[1]["memory ratio"] == "–"


@pytest.mark.parametrize(
    ("device", "dtype", "labels"),
    [
        ("cpu", "float32", ["HF as shipped, float32", "HF + gathered head, float32"]),
        (
            "cpu",
            "bfloat16",
            [
                "HF as shipped, float32",
                "HF as shipped, bf16 autocast",
                "HF + gathered head, bf16 autocast",
            ],
        ),
        (
            "cuda",
            "bfloat16",
            [
                "HF as shipped, bf16 autocast",
                "HF + gathered head, bf16 autocast",
                "HF + gathered head + compile, bf16 autocast",
            ],
        ),
        (
            "cuda",
            "float32",
            [
                "HF as shipped, float32",
                "HF + gathered head, TF32",
                "HF + gathered head + compile, TF32",
            ],
        ),
    ],
)
def test_variants_of_a_table(device, dtype, labels):
    benchmark = load("benchmark")
    variants = benchmark.make_variants(benchmark.Mlm(), "mlm", "mini", dtype, device)
    own = "TF32" if (device, dtype) == ("cuda", "float32") else dtype
    assert [v.label for v in variants] == [*labels, f"jaxlm, {own}"]
    assert [v.is_torch for v in variants] == [True] * len(labels) + [False]
    assert variants[0].env == {}


def test_fine_tuning_is_measured_with_both_allocators(monkeypatch):
    benchmark = load("benchmark")
    monkeypatch.setattr(benchmark, "allocator", lambda: ({"LD_PRELOAD": "t.so"}, "tcmalloc"))

    def rows(task, dtype, device="cpu"):
        variants = benchmark.make_variants(benchmark.Finetune(), task, "base", dtype, device)
        assert {v.work.task for v in variants} == {task}
        return [(v.label, v.allocator) for v in variants]

    ours = [("jaxlm, float32", "tcmalloc"), ("jaxlm, float32", "glibc's huge pages")]
    assert rows("lora", "float32") == [
        ("peft as shipped, float32", "default"),
        ("peft tuned, float32", "tcmalloc"),
        *ours,
    ]
    assert rows("full", "float32") == [
        ("HF as shipped, float32", "default"),
        ("HF tuned, float32", "tcmalloc"),
        *ours,
    ]
    assert rows("lora", "bfloat16", "cuda")[-2:] == [
        ("peft tuned + compile, bf16 autocast", "torch"),
        ("jaxlm, bfloat16", "jax"),
    ]
    monkeypatch.setattr(benchmark, "allocator", lambda: benchmark.HUGE_PAGES)
    assert rows("lora", "float32")[2:] == ours[1:]


@pytest.mark.parametrize("task", ["mlm", "modern", "clm", "full", "lora"])
def test_the_work_of_jaxlm(task):
    work = make_work(
        task=task,
        num_layers=1,
        hidden_dim=16,
        num_heads=2,
        mlp_dim=32,
        vocab_size=1200,
        batch_size=2,
        row_length=16,
    )
    state, sums = load("benchmark_jaxlm").make_step(work)()
    learning = {path for path, _ in tree.leaves_with_path(state.trainable)}
    chance = math.log(1200 if work.pretrains else 2)
    assert sums.means()["loss"] == pytest.approx(chance, rel=0.05)
    assert ("lora/encoder/layers/attention/query/a" in learning) == (task == "lora")
    assert ("params/encoder/token_embed/embedding" in learning) == (task != "lora")
    assert (
        "params/encoder/token_embed/embedding" in dict(tree.leaves_with_path(state.frozen))
    ) == (task == "lora")


def make_variant(tmp_path, source, **changes):
    script = tmp_path / "worker.py"
    script.write_text(source)
    return load("benchmark").Variant(
        label="fake",
        command=[sys.executable, str(script)],
        work=make_work(**changes),
        env={},
        allocator="default",
        is_torch=True,
    )


def take_any_turn(monkeypatch, benchmark):
    """Tests run on busy machines, and time nothing."""
    monkeypatch.setattr(benchmark, "ATTEMPTS", 1)
    monkeypatch.setattr(benchmark, "wait_until_quiet", lambda limit_seconds: None)


def test_workers_take_turns(tmp_path, monkeypatch):
    benchmark = load("benchmark")
    take_any_turn(monkeypatch, benchmark)
    variants = [
        make_variant(tmp_path, FAKE_WORKER),
        make_variant(tmp_path, FAKE_WORKER, device="cuda"),
    ]
    cpu, gpu = benchmark.measure(variants, rounds=2, chunk_seconds=0.02)
    assert [len(r.chunks) for r in (cpu, gpu)] == [2, 2]
    steps = math.ceil(0.02 / cpu.ready.step_seconds)  # which a busy machine makes long
    assert [len(chunk.step_seconds) for chunk in cpu.chunks] == [max(2, steps)] * 2
    assert len(gpu.chunks[0].step_seconds) == 1
    assert all(s >= 0.002 for r in (cpu, gpu) for c in r.chunks for s in c.step_seconds)
    assert gpu.chunks[0].peak_mib == 3.0
    assert (cpu.ready.loss, gpu.ready.device_name) == (1.5, "Fake H100")


def test_a_worker_that_fails_is_named(tmp_path):
    variant = make_variant(tmp_path, "raise SystemExit('No module named torch')")
    with pytest.raises(InputError, match=r"fake: .* \(No module named torch\).*--python-torch"):
        load("benchmark").measure([variant], rounds=1, chunk_seconds=0.01)


def test_measurements_are_written(tmp_path, monkeypatch, capsys):
    benchmark = load("benchmark")
    variants = [make_variant(tmp_path, FAKE_WORKER, device="cuda")]
    take_any_turn(monkeypatch, benchmark)
    monkeypatch.setattr(benchmark, "make_variants", lambda *_: variants)
    output = tmp_path / "benchmark.json"
    options = benchmark.Finetune(rounds=1, chunk_seconds=0.01, device="cuda", output=output)
    benchmark.run(options)
    lora, full = json.loads(output.read_text())["groups"]
    assert ("LoRA" in lora["title"], "full" in full["title"]) == (True, True)
    assert len(full["results"][0]["chunks"]) == 1
    assert " MFU |" in capsys.readouterr().out


def test_bad_options(tmp_path):
    benchmark = load("benchmark")
    with pytest.raises(InputError, match="--rounds"):
        benchmark.run(benchmark.Mlm(rounds=0))
    with pytest.raises(InputError, match="missing"):
        benchmark.run(benchmark.Mlm(output=tmp_path / "missing" / "b.json"))


@pytest.mark.slow
def test_encoding_gives_the_vectors_of_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    encode = load("benchmark_encode")
    texts = tmp_path / "texts.txt"
    lines = [" ".join(["a short text of words"] * (1 + i % 7)) for i in range(40)]
    texts.write_text("\n".join(lines))
    encode.main(encode.Options(texts=texts, rounds=1, batch_size=16))
    shown = capsys.readouterr().out
    assert shown.index("HF as shipped") < shown.index("jaxlm")
    lowest = float(re.search(r"40 texts of \d+ words .*lowest cosine ([\d.]+)", shown)[1])
    assert lowest > 0.99999


def test_a_text_to_encode_is_all_of_a_line(tmp_path):
    encode = load("benchmark_encode")
    (tmp_path / "texts.txt").write_bytes("a\u2028b\x85c\x0cd\n\ne f\r\n".encode())
    found = encode.read_texts(encode.Options(texts=tmp_path / "texts.txt"))
    assert found == ["a\u2028b\x85c\x0cd", "e f"]


def test_tables_of_a_gpu_come_one_after_the_other_whatever_fails(tmp_path):
    """With a stand-in for Python that prints what it is told, and fails or takes too long."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$*" in\n*lora*) echo "no memory" >&2; exit 3 ;;\n'
        "*modern*) exec sleep 9 ;;\nesac\n"
        'echo "| $* |"\n'
    )
    fake.chmod(0o755)
    script = tmp_path / "scripts" / "benchmark_gpu.sh"
    script.parent.mkdir()
    script.write_text(
        (SCRIPTS / "benchmark_gpu.sh").read_text().replace("modernbert 180", "modernbert 1")
    )
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", str(script), "tables"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    first, second, third, said = run.stdout.splitlines()
    assert "benchmark.py mlm --sizes base --row-length 512 --batch-size.base 64" in first
    assert first.endswith(f"--output {tmp_path}/tables/bert.json |")
    assert second.startswith("modernbert: not done in 1 s")
    assert third.startswith("lora: ended with 3")
    assert said == "no memory"
    limits = re.findall(r"^table \w+ (\d+)", (SCRIPTS / "benchmark_gpu.sh").read_text(), re.M)
    assert len(limits) == 3
    assert sum(map(int, limits)) <= 480
