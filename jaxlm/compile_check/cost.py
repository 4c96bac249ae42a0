"""What collectives take at the published speed of the links, if each has its links to itself.

A ring or line of n devices sends, from each, (n - 1) / n of the whole array for an all-gather, a
reduce-scatter or an all-to-all, and twice that for an all-reduce, over all links that the group
has at once (Austin et al. 2025, How to Scale Your Model, chapter 3). Latency is left out; so is
that the network may serve two groups at once.
"""

from collections.abc import Sequence

from jaxlm.compile_check.chip import Coordinates, Topology
from jaxlm.compile_check.hlo import Collective


def sent_bytes(collective: Collective, num_slices: int) -> float:
    """Bytes that one device sends each time it runs."""
    n = num_slices if collective.over_slices else len(collective.group)
    operand = float(collective.operand_bytes)
    match collective.kind:
        case "all-gather":
            return operand * (n - 1)
        case "reduce-scatter" | "all-to-all":
            return operand * (n - 1) / max(n, 1)
        case "all-reduce":
            return 2 * operand * (n - 1) / max(n, 1)
    return operand


def seconds(
    collective: Collective, topology: Topology, coordinates: Sequence[Coordinates]
) -> float:
    """Time in a step, over all times that it runs; ``coordinates`` are those of each partition of
    a slice."""
    sent = sent_bytes(collective, topology.num_slices) * collective.count
    if collective.over_slices:
        return sent / topology.chip.network
    members = [coordinates[each] for each in collective.group]
    return sent / topology.bandwidth(collective.kind, members)
