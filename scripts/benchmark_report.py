"""From timed chunks to a table: medians, same-round ratios, model FLOPs."""

import statistics
from dataclasses import dataclass

from benchmark_protocol import Chunk, Ready, Work

MAX_SHARE = 0.04
"""CPU time of others, or stolen, above which a chunk is not trusted."""

# Dense bfloat16 FLOP/s from the vendor's data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One variant after all rounds; ``chunks[i]`` was run in round i."""

    label: str
    is_torch: bool
    work: Work
    allocator: str
    ready: Ready
    chunks: list[Chunk]


def step_flops(work: Work) -> float:
    """Floating-point operations of one training step's matrix products.

    ``3 B (S N (2 (4 H² + 2 H F) + 4 S H) + P (2 H² + 2 H V))``: B rows of S positions, N layers,
    P positions of a row projected to V entries; backward counts twice forward.
    """
    h = work.hidden_dim
    layer = 2 * (4 * h * h + 2 * h * work.mlp_dim) + 4 * work.row_length * h
    head = 2 * h * h + 2 * h * work.vocab_size
    per_row = work.row_length * work.num_layers * layer + work.num_projected * head
    return 3 * work.batch_size * per_row


def is_clean(chunk: Chunk) -> bool:
    """Whether the machine was ours while the chunk ran."""
    return max(chunk.others_share, chunk.steal_share) <= MAX_SHARE


def median_seconds(result: Result) -> float:
    """Median over rounds of the median step of a chunk; clean chunks only, if there are any."""
    chunks = [c for c in result.chunks if is_clean(c)] or result.chunks
    return statistics.median(statistics.median(c.step_seconds) for c in chunks)


def round_ratios(result: Result, reference: Result) -> list[float]:
    """How many times faster than the reference, round by round; rounds clean in both, if any."""
    pairs = list(zip(result.chunks, reference.chunks, strict=True))
    clean = [pair for pair in pairs if is_clean(pair[0]) and is_clean(pair[1])]
    return [
        statistics.median(theirs.step_seconds) / statistics.median(ours.step_seconds)
        for ours, theirs in clean or pairs
    ]


def strongest_torch(results: list[Result]) -> Result:
    """The fastest of the torch variants."""
    return min((r for r in results if r.is_torch), key=median_seconds)


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a known accelerator."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def summarize(results: list[Result], peak: float | None) -> list[dict[str, str]]:
    """One row of text a variant; the first result is the reference "HF as shipped".

    Args:
        results: of one group, run in the same rounds.
        peak: FLOP/s of the device; None leaves out the MFU.
    """
    strongest = strongest_torch(results)
    rows = []
    for result in results:
        seconds = median_seconds(result)
        rate = step_flops(result.work) / seconds
        peaks = [c.peak_mib for c in result.chunks if c.peak_mib is not None]
        row = {
            "variant": result.label,
            "step ms": f"{seconds * 1e3:.1f}",
            "tokens/s": f"{result.work.batch_size * result.work.row_length / seconds:,.0f}",
            "× HF as shipped": _spread(round_ratios(result, results[0])),
            "× strongest torch": _spread(round_ratios(result, strongest)),
            "model GFLOP/s": f"{rate / 1e9:,.0f}",
        }
        if peak is not None:
            row["MFU"] = f"{rate / peak:.1%}"
        rows.append(
            row
            | {
                "compile s": _number(result.ready.compile_seconds, 1),
                "peak MiB": _number(max([result.ready.peak_mib or 0.0, *peaks]) or None, 0),
                "steady MiB": _number(max(peaks, default=None), 0),
                "allocator": result.allocator,
                "loss": f"{result.ready.loss:.2f}",
                "clean rounds": f"{sum(map(is_clean, result.chunks))}/{len(result.chunks)}",
            }
        )
    return rows


def to_markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table whose columns are the keys of the first row."""
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    # Text to the left, numbers to the right.
    numeric = [i > 0 and columns[i] != "allocator" for i in range(len(columns))]
    padded = [
        [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)]
        for line in lines
    ]
    rule = ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
