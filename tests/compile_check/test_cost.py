import itertools

import pytest

from jaxlm.compile_check import cost, topology
from jaxlm.compile_check.hlo import Collective

SQUARE = topology.read("v5e:16x16")
PLACES = list(itertools.product(range(16), range(16)))  # partition 16 x + y stands at (x, y)
LINK = SQUARE.chip.link


def collective(kind, group, size=800, over_slices=False, count=1):
    return Collective(kind, size, tuple(group), count, False, over_slices)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 800 * 7),
        ("reduce-scatter", 700),
        ("all-to-all", 700),
        ("all-reduce", 1400),
        ("collective-permute", 800),
    ],
)
def test_bytes_sent_by_one_of_eight(kind, sent):
    assert cost.sent_bytes(collective(kind, range(8)), 1) == sent


def test_a_gathered_and_scattered_array_is_an_all_reduce():
    gathered = cost.sent_bytes(collective("all-gather", range(8), 100), 1)
    scattered = cost.sent_bytes(collective("reduce-scatter", range(8), 800), 1)
    assert gathered + scattered == cost.sent_bytes(collective("all-reduce", range(8), 800), 1)


@pytest.mark.parametrize(
    ("group", "links"),
    [
        (range(16), 2),  # a whole row is a ring
        (range(8), 1),  # half of one is a line
        (range(0, 16, 4), 0.5),  # a ring through every fourth, beside three others
        (range(256), 4),  # two rings
        ([0, 1, 16, 17], 2),  # a square of two lines each way
        ([5], 1),
    ],
)
def test_links_of_a_group(group, links):
    assert SQUARE.bandwidth("all-gather", [PLACES[each] for each in group]) == links * LINK


def test_a_permute_takes_one_link():
    assert SQUARE.bandwidth("collective-permute", [(0, 0), (15, 0)]) == LINK


def test_gpus_of_several_hosts_send_through_their_adapters():
    place = topology.read("h100:4x8")
    chip = place.chip

    def rate(members):
        return place.bandwidth("all-reduce", members)

    assert rate([(0, 1, gpu) for gpu in range(8)]) == chip.link
    assert rate([(0, host, 3) for host in range(4)]) == chip.network
    assert rate([(0, host, gpu) for host in range(4) for gpu in range(8)]) == 8 * chip.network
    assert 8 * chip.network < chip.link


def test_seconds():
    place = topology.read("v5e:16x16", num_slices=4)
    inside = collective("all-reduce", range(16), 1600, count=3)
    assert cost.seconds(inside, place, PLACES) == pytest.approx(3 * 3000 / (2 * LINK))
    across = collective("all-reduce", (), 1600, over_slices=True)
    assert cost.seconds(across, place, PLACES) == pytest.approx(2400 / place.chip.network)
