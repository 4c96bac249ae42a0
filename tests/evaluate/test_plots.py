import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.evaluate import plots
from jaxlm.evaluate.calibration import reliability
from jaxlm.train import plots as train_plots

image = pytest.importorskip("PIL.Image")


def pixels(path):
    return np.asarray(image.open(path).convert("RGB")).reshape(-1, 3)


def colours(path):
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels(path), axis=0)}


def draw_confusion(tmp_path, labels, predicted, names):
    out = tmp_path / "confusion.png"
    plots.plot_confusion(np.array(labels), np.array(predicted), names, out)
    return colours(out)


def test_the_colours_are_those_of_the_loss():
    own = (plots.RIGHT, plots.WRONG, plots.REFERENCE)
    assert own == (train_plots.TRAIN, train_plots.VALIDATION, train_plots.REFERENCE)


def test_what_is_right_is_blue_and_what_is_wrong_orange(tmp_path):
    names = ["x", "y"]
    right = draw_confusion(tmp_path, [0, 1], [0, 1], names)
    wrong = draw_confusion(tmp_path, [0, 1], [1, 0], names)
    both = draw_confusion(tmp_path, [0, 1], [0, 0], names)
    found = [shown & {plots.RIGHT, plots.WRONG} for shown in (right, wrong, both)]
    assert found == [{plots.RIGHT}, {plots.WRONG}, {plots.RIGHT, plots.WRONG}]


def test_colour_is_by_row_and_not_by_count(tmp_path):
    # A rare label that is always right is as blue as a frequent one; names may be anything.
    names = [r"$\frac$", "a very long name of a label, and yet longer"]
    assert plots.RIGHT in draw_confusion(tmp_path, [0] + [1] * 9, [0] + [1] * 5 + [0] * 4, names)
    assert plots.RIGHT not in draw_confusion(tmp_path, [0, 0, 1, 1], [0, 1, 1, 0], names)


def test_many_labels_and_empty_rows_can_be_drawn(tmp_path):
    for num_labels in (1, 20):
        names = [f"label number {i}" for i in range(num_labels)]
        assert draw_confusion(tmp_path, [0, num_labels - 1], [0, 0], names)


def test_reliability(tmp_path):
    out = tmp_path / "reliability.png"
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    plots.plot_reliability(reliability(np.array([0, 0]), probabilities), out)
    assert {plots.RIGHT, plots.WRONG, plots.REFERENCE} <= colours(out)


def test_learning_curves(tmp_path):
    out = tmp_path / "curves.png"
    curves = {"LoRA": {8: [0.7, 0.8], 64: [0.85, 0.9]}, "full": {64: [0.88]}}
    plots.plot_learning_curves(curves, out)
    assert {plots.RIGHT, plots.WRONG} <= colours(out)
    with pytest.raises(InputError, match="no scores"):
        plots.plot_learning_curves({"LoRA": {}}, out)


def test_sweep_marks_the_best_in_every_panel(tmp_path):
    out = tmp_path / "sweep.png"
    trials = [
        {"lr": lr, "head": head, "rank": 8, "decay": None if lr < 1e-3 else 0.1}
        for lr in (1e-4, 1e-3)
        for head in ("mean", "first")
    ]
    plots.plot_sweep(trials, [0.8, float("nan"), 0.9, 0.85], out, metric="accuracy")
    highest = pixels(out)
    plots.plot_sweep(trials, [0.8, float("nan"), 0.9, 0.85], out, metric="loss")
    assert plots.WRONG in colours(out)
    assert highest.shape == pixels(out).shape
    assert (highest != pixels(out)).any()  # another trial is the best


def test_a_sweep_without_scores_is_refused(tmp_path):
    out = tmp_path / "sweep.png"
    with pytest.raises(InputError, match="2 trials have 1 scores"):
        plots.plot_sweep([{"lr": 1}, {"lr": 2}], [0.5], out, metric="accuracy")
    with pytest.raises(InputError, match="none of 1 trials has a finite accuracy"):
        plots.plot_sweep([{"lr": 1}], [float("nan")], out, metric="accuracy")
    with pytest.raises(InputError, match="no metric is called 'acc'"):
        plots.plot_sweep([{"lr": 1}], [0.5], out, metric="acc")
    assert not out.exists()


def test_a_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    draw_confusion(tmp_path, [0, 1], [0, 1], ["x", "y"])
    before = (tmp_path / "confusion.png").read_bytes()

    def fail(_, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="no space"):
        draw_confusion(tmp_path, [0, 1], [1, 0], ["x", "y"])
    assert (tmp_path / "confusion.png").read_bytes() == before
