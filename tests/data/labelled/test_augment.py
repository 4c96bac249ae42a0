from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxlm.data.labelled import classification
from jaxlm.data.labelled.augment import AugmentConfig, make_augment
from jaxlm.data.labelled.classification import TextExample
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError


@pytest.fixture(scope="module")
def row(tokenizer):
    example = TextExample(
        text="a b c d e f g h " * 20, pair="john smith " * 30, label=None, origin=""
    )
    return classification.encode(Framer(tokenizer, 512), [example]).rows[0]


@pytest.fixture(scope="module")
def special(tokenizer):
    return SpecialTokens.of(tokenizer)


def same(one, two) -> bool:
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_rates_of_zero_change_nothing(row, special):
    assert same(make_augment(AugmentConfig(), special, 0)(row, 0, 0), row)


def test_changes_depend_on_seed_example_and_epoch_alone(row, special):
    config = AugmentConfig(swap_rate=0.1, mask_rate=0.1, deletion_rate=0.1)
    before = row["tokens"].copy()
    reference = make_augment(config, special, 0)(row, 3, 1)
    assert same(make_augment(config, special, 0)(row, 3, 1), reference)
    for seed, example, epoch in ((1, 3, 1), (0, 4, 1), (0, 3, 2)):
        assert not same(make_augment(config, special, seed)(row, example, epoch), reference)
    assert np.array_equal(row["tokens"], before)  # the example itself is as it was


def test_masking(row, special):
    masked = make_augment(AugmentConfig(mask_rate=0.2), special, 0)(row, 0, 0)
    changed = masked["tokens"] != row["tokens"]
    assert (masked["tokens"][changed] == special.mask).all()
    assert changed.mean() == pytest.approx(0.2, abs=0.07)


def test_a_tokenizer_without_a_mask_swaps_and_deletes(row, special):
    config = AugmentConfig(swap_rate=0.1, deletion_rate=0.2)
    bare = replace(special, mask=None)
    one, other = (make_augment(config, names, 0)(row, 0, 0) for names in (special, bare))
    assert same(one, other)
    with pytest.raises(InputError, match=r"mask_rate=0.2 .* this tokenizer has not: set it to 0"):
        make_augment(AugmentConfig(mask_rate=0.2), bare, 0)


def test_deletion(row, special):
    deleted = make_augment(AugmentConfig(deletion_rate=0.2), special, 0)(row, 0, 0)
    assert deleted["lengths"] == len(deleted["tokens"]) == len(deleted["token_type_ids"])
    assert deleted["lengths"] / row["lengths"] == pytest.approx(0.8, abs=0.07)
    kept = iter(row["tokens"].tolist())
    assert all(token in kept for token in deleted["tokens"].tolist())  # in their order


def test_swapping(row, special):
    swapped = make_augment(AugmentConfig(swap_rate=0.1), special, 0)(row, 0, 0)
    assert Counter(swapped["tokens"].tolist()) == Counter(row["tokens"].tolist())
    assert (swapped["tokens"] != row["tokens"]).mean() == pytest.approx(0.2, abs=0.1)
    middle = np.flatnonzero(row["tokens"] == special.sep)[0]
    assert set(swapped["tokens"][:middle]) == set(row["tokens"][:middle])  # not across texts


@pytest.mark.parametrize("epoch", range(10))
def test_special_tokens_stay_and_each_text_keeps_a_token(row, special, epoch):
    config = AugmentConfig(swap_rate=0.9, mask_rate=0.5, deletion_rate=0.99)
    row = {name: array[:4] if array.ndim else array for name, array in row.items()}
    row["tokens"] = np.array([special.cls, 9, special.sep, 10, 11, special.sep], np.int32)
    row["token_type_ids"] = np.array([0, 0, 0, 1, 1, 1], np.int32)
    tokens = make_augment(config, special, 0)(row, 0, epoch)["tokens"].tolist()
    assert [tokens[0], tokens[2], tokens[-1]] == [special.cls, special.sep, special.sep]
    assert len(tokens) >= 5


def test_bad_rates():
    with pytest.raises(InputError, match=r"mask_rate=1.0 .* below 1"):
        AugmentConfig(mask_rate=1.0)
