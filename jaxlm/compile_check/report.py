"""What a user reads after compiling: whether it fits, what it sends, and what would help."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from jaxlm.compile_check.check import Report
from jaxlm.compile_check.chip import GIB
from jaxlm.config import UNKNOWN_BASE, Config, PretrainConfig, flatten

ESTIMATE = (
    "estimated step: the model's products at the peak of all chips, then all collectives at the "
    "published speed of the links, then the update at that of the memory, one after the other"
)


def verdict(report: Report, config: Config) -> str:
    """One sentence."""
    hbm = f"{report.hbm / GIB:.2f} GiB"
    where = f"each of {report.num_devices:,} devices"
    if report.fits and report.needed is not None:
        return f"fits: {report.needed / GIB:.2f} of {hbm} on {where}"
    excess = (report.needed or 0.0) - report.hbm
    over = f"{excess / GIB:.2f} GiB " if excess > 0 else ""
    return f"does not fit: {over}more than the {hbm} of {where}; try {advice(report, config)}"


def advice(report: Report, config: Config) -> str:
    """The changes that would save most, the largest part of the memory first."""
    mesh, train = report.mesh, config.train
    changes = []
    state = report.memory["parameters"] + report.memory["moments"] + report.memory["frozen"]
    copies = report.num_devices // max(report.num_slices, 1) if "fsdp" in mesh else 1
    free = copies // math.prod(mesh.get(axis, 1) for axis in ("fsdp", "tensor", "sequence"))
    width = (config.model or UNKNOWN_BASE).hidden_dim
    fsdp = math.gcd(mesh.get("fsdp", 1) * free, width)
    if fsdp > mesh.get("fsdp", 1) and state > report.hbm / 4:
        changes.append(f"--mesh.fsdp {fsdp}")
    if isinstance(config, PretrainConfig) and flatten(config).get("model.remat", "none") is None:
        changes.append("--model.remat full --model.unroll 1")
    split = mesh["data"] * mesh.get("fsdp", 1) * train.num_micro_batches
    # What is left of a device's rows must still be whole rows.
    more = math.gcd(2 ** math.ceil(math.log2(_excess(report, state))), report.batch_size // split)
    if more > 1:
        changes.append(f"--train.num-micro-batches {train.num_micro_batches * more}")
        changes.append(f"--data.batch-size {report.batch_size // more}")
    return ", or ".join(changes) or "more devices, or a smaller model"


def _excess(report: Report, state: float) -> float:
    """How many times too large activations are, beside what does not shrink with the batch."""
    room = max(report.hbm - state, report.hbm / 16)
    needed = 16 * report.hbm if report.needed is None else report.needed
    return max((needed - state) / room, 2.0)


def memory_table(report: Report) -> Table:
    """HBM of one device by kind."""
    table = Table(title="memory of a device", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("MiB", justify="right")
    table.add_column("of its HBM", justify="right")
    for name, size in (*report.memory.items(), ("in all", report.needed)):
        if size:
            table.add_row(name, f"{size / 2**20:,.1f}", f"{size / report.hbm:.1%}")
    return table


def traffic_table(report: Report) -> Table:
    """Collectives by kind."""
    title = "sent by a device in a step"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for name in ("times", "beside computation", "MB", "ms"):
        table.add_column(name, justify="right")
    for each in report.traffic:
        kind = each.kind + (" over slices" if each.over_slices else "")
        numbers = each.count, each.overlapping, each.bytes / 1e6, each.seconds * 1e3
        table.add_row(kind, *(f"{x:,}" if isinstance(x, int) else f"{x:,.3f}" for x in numbers))
    return table


def times(report: Report) -> list[str]:
    """Lines about time."""
    lines = []
    if report.flops is not None and report.compute_s is not None:
        lines.append(
            f"{report.flops / 1e12:,.2f} TFLOP a step: {report.compute_s * 1e3:.3f} ms at the peak "
            f"of {report.num_devices:,} devices"
        )
    lines.append(
        f"communication {report.communication_s * 1e3:.3f} ms at the links' published speed, the "
        f"update {report.update_s * 1e3:.3f} ms at the memory's"
    )
    if report.unknown_loops:
        lines.append(
            f"{report.unknown_loops} loops of unknown length: their collectives count once"
        )
    lines.append(f"compiled in {report.compile_s:.0f} s")
    return lines


Row = tuple[str, ...]
HEADER: Row = (
    "config", "devices", "mesh", "rows", "GiB each", "fits", "sent MB", "compute ms",
    "links ms", "update ms", "step ms",
)  # fmt: skip


def row(report: Report) -> Row:
    """A line of a table of several reports."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1)
    slices = f" x {report.num_slices}" if report.num_slices > 1 else ""
    sent = sum(each.bytes for each in report.traffic) / 1e6
    compute = "?" if report.compute_s is None else f"{report.compute_s * 1e3:.2f}"
    front = (
        report.config,
        f"{report.topology}{slices}",
        mesh or "one device",
        f"{report.batch_size:,} x {report.row_length}",
        "?" if report.needed is None else f"{report.needed / GIB:.2f}",
    )
    if not report.fits:
        return (*front, "no", "", compute, "", "", "")
    rest = (report.communication_s, report.update_s, report.step_s)
    return (*front, "yes", f"{sent:,.1f}", compute, *(f"{x * 1e3:.2f}" for x in rest))


def table(reports: Sequence[Report], best: Report | None = None) -> Table:
    """Several reports, to print; the best in bold. What all have in common stands in the title."""
    rows = [row(report) for report in reports]
    names = [i for i, name in enumerate(HEADER) if name in ("config", "devices", "rows")]
    common = [i for i in names if len({cells[i] for cells in rows}) == 1]
    title = ", ".join(f"{HEADER[i]} {rows[0][i]}" for i in common)
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    varying = [i for i in range(len(HEADER)) if i not in common]
    for i in varying:
        shown.add_column(HEADER[i], justify="left" if i < 3 else "right", overflow="fold")
    for report, cells in zip(reports, rows, strict=True):
        style = "bold" if report is best else ""
        shown.add_row(*(Text(cells[i], style) for i in varying))
    return shown


def markdown(reports: Sequence[Report]) -> str:
    """The same as a Markdown table."""
    lines = [HEADER, ("---",) * 3 + ("---:",) * (len(HEADER) - 3), *map(row, reports)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
