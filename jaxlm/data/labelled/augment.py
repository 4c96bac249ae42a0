"""Small random changes to texts, different in every epoch (Wei and Zou 2019)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxlm.data.labelled.examples import Row
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError

Augment = Callable[[Row, int, int], Row]  # (row, example, epoch) -> row


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How often tokens are changed; special tokens never are."""

    swap_rate: float = 0.0
    """Share of tokens that change places with the next."""
    mask_rate: float = 0.0
    """Share of tokens that become [MASK]."""
    deletion_rate: float = 0.0
    """Share of tokens that are left out; each text keeps at least one."""

    def __post_init__(self) -> None:
        rates = (self.swap_rate, self.mask_rate, self.deletion_rate)
        if not all(0 <= rate < 1 for rate in rates):
            raise InputError(
                f"swap_rate={self.swap_rate}, mask_rate={self.mask_rate} and "
                f"deletion_rate={self.deletion_rate} must be at least 0 and below 1"
            )


def make_augment(config: AugmentConfig, special: SpecialTokens, seed: int) -> Augment:
    """A function of a text's or pair's row, which (seed, example, epoch) alone decide."""
    if special.mask is None and config.mask_rate:
        raise InputError(
            f"augment.mask_rate={config.mask_rate} hides words behind a [MASK], which this "
            "tokenizer has not: set it to 0"
        )
    fixed = np.array([i for i in special.ids if i != special.unk])

    def augment(row: Row, example: int, epoch: int) -> Row:
        sequence = np.random.SeedSequence(seed, spawn_key=(_DOMAIN, example, epoch))
        rng = np.random.Generator(np.random.Philox(sequence))
        tokens = row["tokens"].copy()
        ordinary = ~np.isin(tokens, fixed)
        swap, mask, delete = rng.random((3, len(tokens)))

        for i in np.flatnonzero((swap < config.swap_rate)[:-1] & ordinary[:-1] & ordinary[1:]):
            tokens[[i, i + 1]] = tokens[[i + 1, i]]
        if special.mask is not None:
            tokens[ordinary & (mask < config.mask_rate)] = special.mask
        deleted = ordinary & (delete < config.deletion_rate)
        for start, end in _runs(ordinary):
            if deleted[start:end].all():
                deleted[start + np.argmax(delete[start:end])] = False

        return row | {
            "tokens": tokens[~deleted],
            "token_type_ids": row["token_type_ids"][~deleted],
            "lengths": np.array(len(tokens) - deleted.sum(), np.int32),
        }

    return augment


_DOMAIN = 1  # sets these random numbers apart from those that order the examples


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Where stretches of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
