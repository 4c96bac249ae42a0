import json
import math
import sys
from types import SimpleNamespace

import pytest

from jaxlm.errors import InputError
from jaxlm.train.metrics import (
    JsonlWriter,
    TensorBoardWriter,
    Throughput,
    WandbWriter,
    peak_flops,
    read_jsonl,
)


def write_jsonl(path, steps, *, step=0):
    writer = JsonlWriter(path, step=step)
    for s in steps:
        writer.write(s, {"train/loss": 10.0 - s})
    writer.close()


def test_jsonl_is_flushed_line_by_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"train/loss": 2.5, "grad_norm": math.inf})
    assert json.loads(path.read_text()) == {"step": 1, "train/loss": 2.5, "grad_norm": None}
    assert math.isnan(read_jsonl(path)[0]["grad_norm"])
    writer.close()


def test_a_resumed_run_has_one_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_jsonl(path, [1, 2, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed while it wrote
    write_jsonl(path, [3], step=2)
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 2, 3]
    write_jsonl(path, [1])
    assert [record["step"] for record in read_jsonl(path)] == [1]


def test_a_cut_last_line_is_left_out_but_not_one_inside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step"\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2 is not a line of metrics"):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_tensorboard_reads_one_history(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps, loss in ((0, [1, 2, 4], 6.0), (0, [1, 2, 3], 5.0), (1, [2], 4.0)):
        writer = TensorBoardWriter(tmp_path, step=start)
        for step in steps:
            writer.write(step, {"train/loss": loss, "lr": 1e-3})
        writer.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "lr"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 5.0), (2, 4.0)]


def test_tensorboard_is_told_to_forget_what_a_start_anew_repeats(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda *_, **given: told.append(given))
    for step in (0, 7):
        TensorBoardWriter(tmp_path, step=step)
    assert [given["purge_step"] for given in told] == [1, 8]


def test_wandb_runs_belong_to_folders(tmp_path, monkeypatch):
    """Not to their names; and go on where a folder is moved, or was begun by an older version."""
    asked = []
    fake = SimpleNamespace(init=lambda **given: asked.append(given["id"]))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("a/x", "b/x", "a/x"):
        WandbWriter(tmp_path / folder, project="p", config={})
    assert asked[0] == asked[2] != asked[1]
    assert asked[0].startswith("x-")
    (tmp_path / "c/x/wandb/run-20260101_101010-old-id").mkdir(parents=True)
    (tmp_path / "c/x/wandb/latest-run").symlink_to("run-20260101_101010-old-id")
    WandbWriter(tmp_path / "c/x", project="p", config={})
    assert asked[-1] == "old-id"


def test_wandb_is_asked_for_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'jaxlm\[wandb\]'"):
        WandbWriter(tmp_path, project="jaxlm", config={})


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peaks(device_kind, peak):
    assert peak_flops(device_kind) == peak


def test_throughput_counts_training_time_alone():
    now = [100.0]
    speed = Throughput(1e9, "NVIDIA H100 80GB HBM3", 2, clock=lambda: now[0])
    with speed.paused():
        now[0] += 50  # compiling
    now[0] += 4
    speed.add(1_000_000)
    with speed.paused():
        now[0] += 7  # evaluating
    now[0] += 1
    speed.add(1_000_000)
    rate = 2_000_000 / 5
    assert speed.read() == pytest.approx({"tokens_per_s": rate, "mfu": rate * 1e9 / (2 * 989e12)})
    now[0] += 2
    speed.add(10)
    assert speed.read()["tokens_per_s"] == pytest.approx(5)
    assert set(Throughput(1e9, "cpu", 1).read()) == {"tokens_per_s"}
    assert set(Throughput(None, "TPU v4", 1).read()) == {"tokens_per_s"}
