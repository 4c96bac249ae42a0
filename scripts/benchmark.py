"""Measure jaxlm's training step against other frameworks, on this machine.

    pip install -e ".[bench]" && python scripts/benchmark.py mlm
    python scripts/benchmark.py modern
    python scripts/benchmark.py clm
    python scripts/benchmark.py finetune

Every variant is a live process. They take turns, in an order that rotates with each round: one
runs for about a second, after a step that is not counted, while all others sleep. A turn during
which other processes used the CPU, or a hypervisor took it away, is repeated a few times. Reported
are medians over rounds, and ratios between steps of the same round, with their range. The loss
after a few steps is there to show that all variants do the same work; the strongest torch is the
fastest of each table. The memory ratio is that of peaks, over that of the first row.
"""

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import tyro
from benchmark_protocol import PREFIX, Chunk, Ready, Work, wait_until_quiet
from benchmark_report import Result, is_clean, summarize, to_markdown

from jaxlm.errors import InputError
from jaxlm.runtime.allocator import allocator
from jaxlm.train.metrics import peak_flops

ATTEMPTS = 4
"""Turns of one round, until one is clean."""

SHAPES: dict[str, dict[str, int]] = {
    "nano": {"num_layers": 6, "hidden_dim": 384, "num_heads": 6, "mlp_dim": 1536},
    "mini": {"num_layers": 4, "hidden_dim": 256, "num_heads": 4, "mlp_dim": 1024},
    "small": {"num_layers": 4, "hidden_dim": 512, "num_heads": 8, "mlp_dim": 2048},
    "base": {"num_layers": 12, "hidden_dim": 768, "num_heads": 12, "mlp_dim": 3072},
}
# ModernBERT's own rates, and widths of gated blocks with as many parameters, or the published one.
_OWN = {"dropout_rate": 0.0, "mask_rate": 0.3}
MODERN: dict[str, dict[str, Any]] = {
    "nano": {"mlp_dim": 1024, **_OWN},
    "mini": {"mlp_dim": 688, **_OWN},
    "small": {"mlp_dim": 1376, **_OWN},
    "base": {"num_layers": 22, "mlp_dim": 1152, **_OWN},
}

Size = Literal["nano", "mini", "small", "base"]
Dtype = Literal["float32", "bfloat16"]
Task = Literal["mlm", "modern", "clm", "full", "lora"]
Device = Literal["cpu", "cuda"]

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "glibc's huge pages"

TITLES = {
    "mlm": "pretraining",
    "modern": "pretraining",
    "clm": "pretraining",
    "full": "full fine-tuning",
    "lora": "LoRA",
}
NAMES = {
    "mlm": ("HF", "HF + gathered head"),
    "modern": ("HF", "HF + gathered head"),
    "clm": ("HF", "HF tuned"),
    "full": ("HF", "HF tuned"),
    "lora": ("peft", "peft tuned"),
}
"""Variants of torch by task: as shipped, and made fast."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all tables share."""

    sizes: tuple[Size, ...] = ("mini", "small", "base")
    dtypes: tuple[Dtype, ...] | None = None
    """None = both on a CPU, bfloat16 on a GPU."""
    batch_size: dict[str, int] = field(
        default_factory=lambda: {"nano": 16, "mini": 32, "small": 32, "base": 16}
    )
    """Rows of a step, by size."""
    row_length: int = 128
    vocab_size: int = 30522
    device: Device | None = None
    """None = cuda where there is an NVIDIA device, else cpu."""
    rounds: int = 7
    chunk_seconds: float = 1.0
    """Length of a turn; two steps at least."""
    python_torch: Path | None = None
    """Interpreter for the torch workers; None = this one."""
    peak_tflops: float | None = None
    """The GPU's dense bfloat16 peak, for MFU; None = known for common data-centre GPUs."""
    output: Path = Path("benchmark.json")
    """All measurements."""


@dataclass(frozen=True, kw_only=True)
class Mlm(Options):
    """Masked-language-model pretraining: BERT, AdamW, 15 % masked, dropout 0.1."""


@dataclass(frozen=True, kw_only=True)
class Modern(Options):
    """Masked-language-model pretraining: ModernBERT, AdamW, 30 % masked, no dropout."""

    sizes: tuple[Size, ...] = ("mini",)
    vocab_size: int = 50368


@dataclass(frozen=True, kw_only=True)
class Clm(Options):
    """Causal-language-model pretraining: GPT-2, AdamW, one document a row, dropout 0.1."""

    sizes: tuple[Size, ...] = ("nano",)
    row_length: int = 256
    vocab_size: int = 50257


@dataclass(frozen=True, kw_only=True)
class Finetune(Options):
    """A BERT classifier with two labels, AdamW, dropout 0.1: LoRA of rank 8, and all parameters."""

    sizes: tuple[Size, ...] = ("base",)
    tunings: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """lora: on queries and values, against Hugging Face peft; full: against transformers."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table, and how to start its worker."""

    label: str
    command: list[str]
    work: Work
    env: dict[str, str]
    allocator: str
    is_torch: bool


class Worker:
    """A live process that runs steps of one variant when asked."""

    def __init__(self, variant: Variant, stack: ExitStack, errors: IO[str]) -> None:
        self.variant = variant
        self.chunks: list[Chunk] = []
        self._ready: Ready | None = None
        self._errors = errors
        self._process = stack.enter_context(
            subprocess.Popen(
                [*variant.command, json.dumps(asdict(variant.work))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=_clean_environment() | variant.env,
            )
        )
        stack.callback(self._process.kill)

    def wait(self) -> Ready:
        """What it reports when it is warm."""
        self._ready = self._ready or Ready(**self._answer())
        return self._ready

    def run(self, chunk_seconds: float) -> Chunk:
        """Run a turn of about that long."""
        steps = max(2, math.ceil(chunk_seconds / self.wait().step_seconds))
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return Chunk(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                return json.loads(line.removeprefix(PREFIX))
        self._errors.seek(0)
        reason = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        status = self._process.wait()
        way_out = 'pip install -e ".[bench]", or name an environment with --python-torch'
        raise InputError(
            f"{self.variant.label}: the worker ended with status {status} ({reason})"
            + (
                f"; if torch, transformers or peft is missing: {way_out}"
                if self.variant.is_torch
                else ""
            )
        )


def _clean_environment() -> dict[str, str]:
    """Ours, without allocator settings: each variant states its own."""
    own = {"LD_PRELOAD", "GLIBC_TUNABLES"}
    return {name: value for name, value in os.environ.items() if name not in own}


def make_variants(
    options: Options,
    task: Task,
    size: Size,
    dtype: Dtype,
    device: Device,
) -> list[Variant]:
    """The rows of one table; the first is the reference."""
    scripts = Path(__file__).parent
    torch_command = [
        str(options.python_torch or sys.executable),
        str(scripts / "benchmark_torch.py"),
    ]
    jaxlm_command = [sys.executable, str(scripts / "benchmark_jaxlm.py")]
    tuned = Work(
        task=task,
        recipe="tuned",
        dtype=dtype,
        device=device,
        batch_size=options.batch_size[size],
        row_length=options.row_length,
        vocab_size=options.vocab_size,
        **SHAPES[size] | (MODERN[size] if task == "modern" else {}),
    )
    shipped = replace(tuned, recipe="shipped")
    on_cpu = device == "cpu"
    # A GPU's float32 products are TF32 to JAX, and to torch where it is told so.
    exact = "float32" if on_cpu else "TF32"
    best = allocator()
    torch_env, torch_allocator = best if on_cpu else ({}, "torch")
    compile_env = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

    def torch(label: str, work: Work, env: dict[str, str], allocator: str) -> Variant:
        return Variant(
            label=label,
            command=torch_command,
            work=work,
            env=env,
            allocator=allocator,
            is_torch=True,
        )

    def jaxlm(env: dict[str, str], allocator: str) -> Variant:
        # A compile time read from a cache would be no compile time.
        env = env | {"JAX_PLATFORMS": device, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        return Variant(
            label=f"jaxlm, {exact if dtype == 'float32' else dtype}",
            command=jaxlm_command,
            work=tuned,
            env=env,
            allocator=allocator,
            is_torch=False,
        )

    name, fast = NAMES[task]
    default = "default" if on_cpu else "torch"
    variants = []
    if on_cpu or dtype == "float32":
        reference = replace(shipped, dtype="float32")
        variants.append(torch(f"{name} as shipped, float32", reference, {}, default))
    if dtype == "bfloat16":
        variants.append(torch(f"{name} as shipped, bf16 autocast", shipped, {}, default))
    how = exact if dtype == "float32" else "bf16 autocast"
    variants.append(torch(f"{fast}, {how}", tuned, torch_env, torch_allocator))
    if not on_cpu:
        compiled = replace(tuned, recipe="compiled")
        variants.append(torch(f"{fast} + compile, {how}", compiled, compile_env, "torch"))
        # All workers of a table live on the GPU at once, so jax may not take most of it.
        return [*variants, jaxlm({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".40"}, "jax")]
    variants.append(jaxlm(*best))
    if task in ("full", "lora") and best[1] == "tcmalloc":
        # Which of them is faster differs between processors.
        variants.append(jaxlm(*HUGE_PAGES))
    return variants


def measure(variants: list[Variant], rounds: int, chunk_seconds: float) -> list[Result]:
    """Start all variants, let them take turns, stop them."""
    with ExitStack() as stack:
        workers = []
        for variant in variants:
            _say(f"  starting {variant.label}")
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            workers.append(Worker(variant, stack, errors))
            # One after the other, since CPUs are what is measured; a GPU's workers compile for
            # minutes, and do it side by side.
            if variant.work.device == "cpu":
                workers[-1].wait()
        for worker in workers:
            worker.wait()
        for number in range(rounds):
            _say(f"  round {number + 1} of {rounds}")
            first = number % len(workers)
            for worker in workers[first:] + workers[:first]:
                worker.chunks.append(_clean_turn(worker, chunk_seconds))
        return [
            Result(
                label=worker.variant.label,
                is_torch=worker.variant.is_torch,
                work=worker.variant.work,
                allocator=worker.variant.allocator,
                ready=worker.wait(),
                chunks=worker.chunks,
            )
            for worker in workers
        ]


def _clean_turn(worker: Worker, chunk_seconds: float) -> Chunk:
    """A turn without contamination, or else the least contaminated of a few."""
    turns: list[Chunk] = []
    for _ in range(ATTEMPTS):
        wait_until_quiet(1.5)
        turns.append(worker.run(chunk_seconds))
        if is_clean(turns[-1]):
            return turns[-1]
    return min(turns, key=lambda turn: max(turn.others_share, turn.steal_share))


def run(options: Options) -> None:
    """Print a table for every size, task and dtype, and write all measurements."""
    if min(options.rounds, options.row_length, *options.batch_size.values()) < 1:
        raise InputError("--rounds, --row-length and every --batch-size must be at least 1")
    if not options.output.parent.is_dir():
        raise InputError(f"--output {options.output}: the folder does not exist")
    device = options.device or ("cuda" if Path("/dev/nvidia0").exists() else "cpu")
    dtypes = options.dtypes or (("float32", "bfloat16") if device == "cpu" else ("bfloat16",))
    kinds: dict[type[Options], tuple[Task, ...]] = {Clm: ("clm",), Modern: ("modern",)}
    pretraining = kinds.get(type(options), ("mlm",))
    tasks = options.tunings if isinstance(options, Finetune) else pretraining
    groups: list[dict[str, Any]] = []
    report = {"command": sys.argv, "machine": _machine(), "groups": groups}
    for size, task, dtype in itertools.product(options.sizes, tasks, dtypes):
        model = {"clm": "GPT-2", "modern": "ModernBERT"}.get(task, "BERT")
        title = (
            f"{model}-{size}, {TITLES[task]}, {dtype}, batch {options.batch_size[size]} × "
            f"{options.row_length} tokens, vocabulary {options.vocab_size:,}"
        )
        _say(title)
        variants = make_variants(options, task, size, dtype, device)
        results = measure(variants, options.rounds, options.chunk_seconds)
        peak = None
        if device == "cuda":
            given = options.peak_tflops
            peak = given * 1e12 if given else peak_flops(results[0].ready.device_name)
        rows = summarize(results, peak)
        versions = sorted({result.ready.versions for result in results})
        where = results[0].ready.device_name or f"{_machine()['cpu']}, {os.cpu_count()} CPUs"
        print(f"\n### {title}\n\n{where}; {'; '.join(versions)}\n\n{to_markdown(rows)}\n")
        groups.append(
            {"title": title, "table": rows, "results": [asdict(result) for result in results]}
        )
        # After each table: an hour's measurements survive an interruption.
        options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"All measurements: {options.output}")


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), cpu)
    return {"cpu": cpu, "cpus": str(os.cpu_count()), "system": platform.platform()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        commands = {"mlm": Mlm, "modern": Modern, "clm": Clm, "finetune": Finetune}
        run(tyro.extras.subcommand_cli_from_dict(commands))
    except InputError as error:
        _say(f"error: {error}")
        sys.exit(2)
