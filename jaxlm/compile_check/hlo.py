"""What a compiled program sends: collectives and their bytes, from the text of its HLO alone.

Three things hide there. A loop's body stands once, however often it runs: the number is read from
the loop's condition. What the TPU compiler runs beside computation is written three times, in the
fusions where it starts, runs and ends: it counts where it starts. And to it a reduce-scatter is
an all-reduce in a fusion of that name, whose other results are dropped.
"""

import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all", "other"
]
KINDS: tuple[Kind, ...] = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_MEGASCALE: dict[str, Kind] = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ONE_TO_ONE": "collective-permute",
    "ALL_TO_ALL": "all-to-all",
}


class Collective(NamedTuple):
    """One instruction that communicates, and how often it runs in a step."""

    kind: Kind
    operand_bytes: int  # what one device brings
    group: tuple[int, ...]  # partitions that exchange, those of one group; of a permute, a pair
    count: int
    overlaps: bool  # runs beside computation
    over_slices: bool  # over the network between slices, with the same partition of the others


class Program(NamedTuple):
    """The collectives of a program, and how many loops had no length to be read: they count 1."""

    collectives: tuple[Collective, ...]
    num_unknown_loops: int


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str


Computations = dict[str, dict[str, _Instruction]]


def parse(text: str) -> Program:
    """Read ``compiled.as_text()``."""
    computations, entry = _read(text)
    counts = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", text.partition("\n\n")[0])
    everyone = tuple(range(max(map(int, counts), default=1)))
    found: list[Collective] = []
    unknown = 0

    def visit(name: str, times: int) -> None:
        nonlocal unknown
        instructions = computations.get(name, {})
        starts = any('"AsyncCollectiveStart"' in each.text for each in instructions.values())
        for each in instructions.values():
            match each.opcode:
                case "while":
                    length = _trip_count(each, computations)
                    unknown += length is None
                    visit(_called("body", each), times * (1 if length is None else length))
                case "fusion" | "async-start":
                    visit(_called("calls", each), times)
                case "call":
                    visit(_called("to_apply", each), times)
                case "conditional":  # only one is taken: an upper bound
                    for branch in _branches(each):
                        visit(branch, times)
                case _:
                    later = "chain_id=" in each.text and not starts
                    kind = None if later else _kind(each, name)
                    if kind is not None:
                        found.append(_collective(kind, each, instructions, times, everyone))

    visit(entry, 1)
    return Program(tuple(found), unknown)


def _read(text: str) -> tuple[Computations, str]:
    computations: Computations = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            shape, rest = _split_shape(instruction[3])
            opcode, _, tail = rest.partition("(")
            operands = re.findall(r"%([\w.\-]+)", tail[: _closing(tail)])
            current[instruction[2]] = _Instruction(
                instruction[2], shape, opcode, tuple(operands), rest
            )
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    """The type in front, which may be a tuple, and the rest."""
    end = _closing(text[1:]) + 2 if text.startswith("(") else text.find(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened just before ``text``."""
    depth = 1
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    return len(text)


def _called(attribute: str, instruction: _Instruction) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.text)
    return found[1] if found else ""


def _branches(instruction: _Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    if several:
        return re.findall(r"[\w.\-]+", several[1])
    return [_called(f"{side}_computation", instruction) for side in ("true", "false")]


def _trip_count(loop: _Instruction, computations: Computations) -> int | None:
    """As the compiler says, or the bound that a counter from 0 is compared with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = computations.get(_called("condition", loop), {}).values()
    bounds = [
        int(found[1])
        for each in condition
        if each.shape.startswith(("s32[]", "u32[]"))
        and (found := re.match(r"constant\((\d+)\)", each.text))
    ]
    return bounds[0] if len(bounds) == 1 else None


def _kind(instruction: _Instruction, computation: str) -> Kind | None:
    if instruction.opcode == "send":
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
        return _MEGASCALE.get(found[1], "other") if found else None
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "all-reduce" and "all-reduce-scatter" in computation:
        return "reduce-scatter"
    if opcode == "ragged-all-to-all":
        return "all-to-all"
    if opcode == "collective-broadcast":
        return "other"
    return next((kind for kind in KINDS if kind == opcode), None)


def _collective(
    kind: Kind,
    instruction: _Instruction,
    around: dict[str, _Instruction],
    times: int,
    everyone: tuple[int, ...],
) -> Collective:
    over_slices = instruction.opcode == "send"
    operands = instruction.operands[:1] if over_slices else instruction.operands  # not the token
    asynchronous = instruction.opcode.endswith("-start") or "chain_id=" in instruction.text
    asynchronous &= '"is_sync":true' not in instruction.text  # on GPUs all are written apart
    return Collective(
        kind,
        sum(num_bytes(around[name].shape) for name in operands if name in around),
        () if over_slices else replica_group(instruction.text) or everyone,
        times,
        asynchronous or over_slices,
        over_slices,
    )


def num_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of them, from its type as HLO writes it; without padding."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def replica_group(text: str) -> tuple[int, ...]:
    """The first of an instruction's groups; all have the same size."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](T\([\d,]+\))?)", text):
        return tuple(_iota(counted[3]).reshape(int(counted[1]), int(counted[2]))[0].tolist())
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = re.search(r"device_ids=\((.*)\)", named[2])
        count = math.prod(axes.values())
        ids = _iota(order[1]) if order else np.arange(count)
        chosen = re.findall(r"'(\w+)'", named[3])
        index = tuple(slice(None) if name in chosen else 0 for name in axes)
        return tuple(ids.reshape(list(axes.values()))[index].ravel().tolist())
    return ()


def _iota(text: str) -> np.ndarray:
    """``[2,8]T(1,0)``: numbers from 0 in that shape, its axes then in that order, flat."""
    shape, order = (re.findall(r"\d+", part) for part in [*text.split("T"), ""][:2])
    numbers = np.arange(math.prod(map(int, shape))).reshape([int(size) for size in shape])
    return (numbers.transpose([int(axis) for axis in order]) if order else numbers).ravel()


def totals(collectives: tuple[Collective, ...]) -> Iterator[tuple[Kind, list[Collective]]]:
    """By kind, those that there are."""
    for kind in (*KINDS, "other"):
        own = [each for each in collectives if each.kind == kind]
        if own:
            yield kind, own
