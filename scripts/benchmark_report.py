"""From timed chunks to a table: medians, same-round ratios, model FLOPs."""

import statistics
from dataclasses import dataclass

from benchmark_protocol import Chunk, Ready, Work

MAX_SHARE = 0.04
"""CPU time of others, or stolen, above which a chunk is not trusted."""


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

    For B rows of S positions and N layers, ``3 B (S N (2 (4 H² + 2 H F) + 4 S H) + head)``, since
    backward counts twice forward. The head is ``P (2 H² + 2 H V)`` for P positions of a row
    projected to V entries, of causal models without the H², ``2 H² + 2 H C`` for C classes. LoRA
    gives N layers ``2 · 4 H r`` more, and leaves out the gradients of their weights: ``2 (4 H² +
    2 H F)`` counts twice, not 3 times.
    ModernBERT's gated blocks have ``3 H F``; its windows are counted as whole rows.
    """
    h = work.hidden_dim
    weights = 2 * (4 * h * h + (3 if work.task == "modern" else 2) * h * work.mlp_dim)
    layer = 3 * (weights + 4 * work.row_length * h)
    if work.task == "lora":
        layer += 3 * 2 * 4 * h * work.rank - weights
    outputs = work.vocab_size if work.pretrains else work.num_labels
    projected = work.num_projected if work.pretrains else 1
    transform = 0 if work.task == "clm" else 2 * h * h
    head = 3 * projected * (transform + 2 * h * outputs)
    return work.batch_size * (work.row_length * work.num_layers * layer + head)


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


def _steady_mib(result: Result) -> float | None:
    return max((c.peak_mib for c in result.chunks if c.peak_mib is not None), default=None)


def _peak_mib(result: Result) -> float | None:
    return max(result.ready.peak_mib or 0.0, _steady_mib(result) or 0.0) or None


def summarize(results: list[Result], peak: float | None) -> list[dict[str, str]]:
    """One row of text a variant; the first result is the reference, such as "HF as shipped".

    Args:
        results: of one group, run in the same rounds.
        peak: FLOP/s of the device; None leaves out the MFU.
    """
    strongest = strongest_torch(results)
    reference = results[0].label.partition(",")[0]
    reference_mib = _peak_mib(results[0])
    rows = []
    for result in results:
        seconds = median_seconds(result)
        rate = step_flops(result.work) / seconds
        steady_mib, peak_mib = _steady_mib(result), _peak_mib(result)
        memory_ratio = peak_mib / reference_mib if peak_mib and reference_mib else None
        row = {
            "variant": result.label,
            "step ms": f"{seconds * 1e3:.1f}",
            "tokens/s": f"{result.work.batch_size * result.work.row_length / seconds:,.0f}",
            f"× {reference}": _spread(round_ratios(result, results[0])),
            "× strongest torch": _spread(round_ratios(result, strongest)),
            "model GFLOP/s": f"{rate / 1e9:,.0f}",
        }
        if peak is not None:
            row["MFU"] = f"{rate / peak:.1%}"
        rows.append(
            row
            | {
                "compile s": _number(result.ready.compile_seconds, 1),
                "peak MiB": _number(peak_mib, 0),
                "memory ratio": _number(memory_ratio, 2),
                "steady MiB": _number(steady_mib, 0),
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
