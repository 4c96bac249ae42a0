import contextlib

import numpy as np
import pytest

from jaxlm.train import plots
from jaxlm.train.metrics import JsonlWriter
from jaxlm.train.plots import Reference, _smooth, plot_loss

image = pytest.importorskip("PIL.Image")


def write_metrics(path, records):
    writer = JsonlWriter(path)
    for step, values in records:
        writer.write(step, values)
    writer.close()


def colours(path):
    pixels = np.asarray(image.open(path).convert("RGB")).reshape(-1, 3)
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels, axis=0)}


def test_draws_what_there_is(tmp_path):
    training = [(s, {"train/loss": 9 - s / 100, "tokens": 8.0 * s}) for s in range(10, 400, 10)]
    evaluation = [(200, {"eval/loss": 7.0}), (400, {"eval/loss": float("nan")})]
    write_metrics(tmp_path / "all.jsonl", training + evaluation)
    write_metrics(tmp_path / "train.jsonl", training)
    write_metrics(tmp_path / "empty.jsonl", [])
    out = tmp_path / "loss.png"
    shown = {}
    for name in ("all", "train", "empty"):
        reference = {"unigram entropy": 6.5} if name == "all" else {}
        plot_loss(tmp_path / f"{name}.jsonl", out, Reference(reference))
        shown[name] = colours(out) & {plots.TRAIN, plots.VALIDATION, plots.REFERENCE}
    assert shown["all"] == {plots.TRAIN, plots.VALIDATION, plots.REFERENCE}
    assert shown["train"] == {plots.TRAIN}
    assert shown["empty"] == set()


def test_numbers_are_drawn_in_their_unit(tmp_path, monkeypatch):
    write_metrics(tmp_path / "m.jsonl", [(1, {"train/loss": 1.0}), (2, {"eval/loss": 0.25})])
    figures = []
    monkeypatch.setattr(
        plots.FigureCanvasAgg, "print_png", lambda own, _: figures.append(own.figure)
    )
    monkeypatch.setattr(plots, "whole", lambda path: contextlib.nullcontext(path))
    for deviation in (400.0, None):
        plot_loss(tmp_path / "m.jsonl", tmp_path / "x.png", Reference({"mean": 1.0}, deviation))
    numbers, nats = (figure.axes[0] for figure in figures)
    assert [numbers.get_ylabel(), nats.get_ylabel()] == ["root mean squared error", "loss (nats)"]
    assert [text.get_text() for text in numbers.texts] == ["mean 400"]
    assert [text.get_text() for text in nats.texts] == ["mean 1.00"]
    labels = [text.get_text() for text in numbers.get_legend().get_texts()]
    assert labels == ["training", "validation, 200 at the end"]
    drawn = [line.get_ydata()[0] for line in numbers.lines]
    assert drawn == [400, 400, 200, 400]


def test_tokens_of_batches_that_grow(tmp_path, monkeypatch):
    """To either side of a point, and beyond the last; and back from tokens to steps."""
    lines = [(1000, {"train/loss": 2.0, "tokens": 32}), (2000, {"train/loss": 1.0, "tokens": 288})]
    write_metrics(tmp_path / "m.jsonl", lines)
    ways = []
    own = plots.Figure.add_subplot

    def add_subplot(figure, *args):
        axes = own(figure, *args)
        second = axes.secondary_xaxis
        axes.secondary_xaxis = lambda where, functions: (
            ways.extend(functions) or second(where, functions=functions)
        )
        return axes

    monkeypatch.setattr(plots.Figure, "add_subplot", add_subplot)
    plot_loss(tmp_path / "m.jsonl", tmp_path / "x.png", Reference())
    forth, back = ways
    steps, tokens = [0, 500, 1000, 1500, 2000, 3000], [0, 16, 32, 160, 288, 544]
    assert forth(steps) == pytest.approx(tokens)
    assert back(tokens) == pytest.approx(steps)


def test_a_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    write_metrics(tmp_path / "metrics.jsonl", [(1, {"train/loss": 2.0})])
    out = tmp_path / "loss.png"
    plot_loss(tmp_path / "metrics.jsonl", out, Reference())
    before = out.read_bytes()

    def fail(_, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="no space"):
        plot_loss(tmp_path / "metrics.jsonl", out, Reference())
    assert out.read_bytes() == before


def test_smoothing_is_unbiased_and_undelayed():
    assert _smooth(np.full(50, 3.0), np.ones(50)) == pytest.approx(np.full(50, 3.0))
    line = np.arange(600.0)
    assert _smooth(line, np.ones(600))[100:500] == pytest.approx(line[100:500], abs=1e-2)
    noise = np.random.default_rng(0).normal(size=6000)
    assert _smooth(noise, np.ones(6000)).std() < 0.2


def test_the_mean_of_a_few_last_steps_does_not_bend_the_curve():
    losses, counts = np.full(40, 3.0), np.full(40, 10)
    losses[-1], counts[-1] = 4.0, 1
    assert _smooth(losses, counts)[-1] < 3.2
    assert _smooth(losses, np.full(40, 10))[-1] > 3.5
