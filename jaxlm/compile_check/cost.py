"""What collectives take at the published speed of the links, if each has its links to itself.

A ring or line of n devices sends, from each, (n - 1) / n of the whole array for an all-gather, a
reduce-scatter or an all-to-all, and twice that for an all-reduce, along every axis of the torus
that the group spans at once (Austin et al. 2025, How to Scale Your Model, chapter 3). Latency is
left out; so is that the network may serve two groups at once.
"""

from collections.abc import Sequence

from jaxlm.compile_check.hlo import Collective
from jaxlm.compile_check.topology import Topology

Coordinates = Sequence[Sequence[int]]  # of the device of each partition of a slice


def sent_bytes(collective: Collective, num_slices: int) -> float:
    """By one device, each time it runs."""
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


def seconds(collective: Collective, topology: Topology, coordinates: Coordinates) -> float:
    """Of a step, all times it runs together."""
    sent = sent_bytes(collective, topology.num_slices) * collective.count
    if collective.over_slices:
        return sent / topology.chip.network
    return sent / bandwidth(collective, topology, coordinates)


def bandwidth(collective: Collective, topology: Topology, coordinates: Coordinates) -> float:
    """Bytes/s that one device of the group can send: over all axes that the group spans.

    A ring sends both ways. Where the group's members are not neighbours, the groups between them
    share the links.
    """
    link = topology.chip.link
    if collective.kind == "collective-permute" or len(collective.group) < 2:
        return link
    members = [coordinates[partition] for partition in collective.group]
    total = 0.0
    for axis, size in enumerate(topology.shape):
        places = sorted({member[axis] for member in members})
        if len(places) > 1:
            stride = (places[-1] - places[0]) / (len(places) - 1)
            whole = len(places) * stride >= size and topology.is_ring(axis)
            total += link * (2 if whole else 1) / stride
    return total or link
