import io

import numpy as np
from rich.console import Console

from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.statistics import describe, longer, render


def make_examples(lengths: list[int], max_length: int) -> Examples:
    return Examples(
        rows=[{"tokens": np.zeros(min(n, max_length), np.int32)} for n in lengths],
        along_length=frozenset({"tokens"}),
        pad=0,
        untruncated=np.array(lengths, np.int32),
    )


def test_statistics():
    statistics = describe(make_examples([3, 8, 9, 20], 16), ["a", "b", "b", "b"], duplicates=2)
    assert statistics.classes == {"b": 3, "a": 1}
    assert statistics.lengths == {8: 2, 16: 1, 20: 1}
    assert (statistics.longest, statistics.median, statistics.truncated) == (20, 8, 0.25)


def test_no_length_is_proposed_that_the_model_does_not_read():
    examples = make_examples([10, 100], 64)
    assert longer(examples, None, 64) == "--data.max-length 104 cuts 0.0%"
    assert longer(examples, 128, 64) == "--data.max-length 104 cuts 0.0%"
    parts = "give the parts of long texts as examples of their own"
    cut = longer(examples, 80, 64)
    assert cut == f"the model reads 80 at most, where --data.max-length 80 cuts 18.2%; {parts}"
    for given in (80, 128):
        assert longer(examples, 80, given) == (
            f"the model reads 80 at most, whatever --data.max-length {given} says; take a model "
            f"that reads more, or {parts}"
        )


def test_a_very_long_text_does_not_hide_the_others():
    lengths = describe(make_examples([10] * 150 + [20] * 150 + [5000], 512), []).lengths
    assert sum(lengths.values()) == 301
    assert lengths[5000] == 1
    assert len(lengths) > 2


def test_the_console_shows_both_parts():
    train = describe(make_examples([3, 8, 9, 20], 16), ["[b]", "[b]", "[b]", "a"], duplicates=2)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(
        render({"training": train, "validation": describe(make_examples([5], 16), ["a"])})
    )
    text = console.export_text()
    for shown in ("training", "validation", "25.0%", "[b]", "3 (75.0%)", "1 (100.0%)", "up to 8"):
        assert shown in text
