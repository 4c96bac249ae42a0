"""Weak scaling: more devices, the same rows on each."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jaxlm.compile_check.check import Report
from jaxlm.errors import InputError
from jaxlm.runtime.storage import whole

PARTS = (
    ("products at the chips' peak", "#2b6cb0", lambda each: each.compute_s or 0.0),
    ("collectives at the links' speed", "#dd6b20", lambda each: each.communication_s),
    ("update at the memory's speed", "#4a5568", lambda each: each.update_s),
)


def plot(reports: Sequence[Report], out_png: Path) -> None:
    """Bytes that a device sends in a step, and the times that these and computing take."""
    if not any(each.fits for each in reports):
        raise InputError("no program fits its devices, so there is nothing to draw")
    drawn = [each for each in reports if each.fits]
    devices = [each.num_devices for each in drawn]
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    sent, spent = figure.subplots(1, 2)
    megabytes = [sum(row.bytes for row in each.traffic) / 1e6 for each in drawn]
    sent.plot(devices, megabytes, marker="o", color=PARTS[1][1])
    sent.set_ylabel("MB sent by a device in a step")
    for label, colour, value in PARTS:
        milliseconds = [value(each) * 1e3 for each in drawn]
        spent.plot(devices, milliseconds, marker="o", color=colour, label=label)
    spent.set_ylabel("ms of a step")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
    for axes in (sent, spent):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(devices))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("devices")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rows = drawn[0].batch_size // drawn[0].num_devices
    figure.suptitle(f"{drawn[0].config}, {rows} rows of {drawn[0].row_length} a device")
    with whole(out_png) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
