"""Beam search with models that are functions: what is found, and when it ends."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CHARACTERS, END, VOCAB, attention_model, table_model, table_step

from jaxlm.decode import beam_decoding
from jaxlm.decode.beam import BeamConfig, BeamSearch, divisors
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.errors import InputError
from jaxlm.sharding import MeshConfig, make_mesh

PROMPTS = ["abc", "a", "hello no", "feed me a fig. a big fig!", "deep"]
BANNED = tuple(CHARACTERS[3:])
FEW = BeamConfig(max_new_tokens=4, banned_tokens=BANNED)  # a, b, c and the end are left
MODEL = attention_model(end=[END], batch_size=1024)


@pytest.fixture(scope="module")
def search() -> BeamSearch:
    return BeamSearch(MODEL)


def every(text: str, most: int) -> dict[tuple[int, ...], list[float]]:
    """All that may follow a text, of at most so many tokens, with the log-probabilities of each."""
    ids = MODEL.prompt(text)
    tails = np.array(list(itertools.product(range(3), repeat=most)))
    tokens = np.zeros((len(tails), 32), int)  # of one shape, and none sees what is behind it
    tokens[:, : len(ids)], tokens[:, len(ids) : len(ids) + most] = ids, tails
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    state = MODEL.make_state(*tokens.shape)
    logits, _ = MODEL.step(MODEL.variables, state, tokens, positions, np.zeros_like(tokens))
    each = np.asarray(jax.nn.log_softmax(logits[..., : MODEL.vocab_size]))[:, len(ids) - 1 :]
    found = {}
    for tail, row in zip(tails.tolist(), each, strict=True):
        taken = row[np.arange(most), tail].tolist()
        found[tuple(tail)] = taken
        for count in range(most):
            found[*tail[:count], END] = [*taken[:count], float(row[count, END])]
    return found


def by_hand(penalty: str, alpha: float, total: float, length: int) -> float:
    return total / (length**alpha if penalty == "hf" else ((5 + length) / 6) ** alpha)


@pytest.mark.parametrize(
    ("penalty", "alpha"), [("hf", 1.0), ("hf", 0.0), ("gnmt", 0.6), ("gnmt", -1.0), ("hf", 2.5)]
)
def test_scores_equal_brute_force(search, penalty, alpha):
    config = dataclasses.replace(
        FEW, size=128, n_best=128, length_penalty=penalty, alpha=alpha, early_stopping="exact"
    )
    bests = set()
    for text, best in zip(PROMPTS, search(PROMPTS, config), strict=True):
        found = every(text, 4)
        want = sorted(
            ((by_hand(penalty, alpha, sum(x), len(x)), ids) for ids, x in found.items()),
            reverse=True,
        )
        got = [best, *best.others]
        assert len(got) == len(want) == 121
        assert len({tuple(one.tokens) for one in got}) == 121
        np.testing.assert_allclose(
            [x.score for x in got], [score for score, _ in want], rtol=1e-5, atol=1e-5
        )
        for one in got:
            each = found[tuple(one.tokens)]
            np.testing.assert_allclose(one.log_probabilities, each, atol=1e-4)
            assert one.score == pytest.approx(
                by_hand(penalty, alpha, sum(each), len(each)), rel=1e-5, abs=1e-4
            )
            assert (one.stopped == "stop_token") == (one.tokens[-1] == END)
        bests.add(tuple(got[0].tokens))
    assert len(bests) > 1


@pytest.mark.parametrize(
    ("prefix", "n"), [("", 1), ("", 2), ("ca", None), ("ca", 1), ("ca", 2)], ids=str
)
def test_what_is_forced_or_forbidden_equals_brute_force(search, prefix, n):
    """All texts that may be, and no others: run by run, with the prompt's and the prefix's."""
    config = dataclasses.replace(
        FEW, size=128, n_best=128, prefix=prefix, no_repeat_ngram=n, max_new_tokens=4 + len(prefix)
    )
    least = 121
    for text, best in zip(PROMPTS, search(PROMPTS, config), strict=True):
        before = MODEL.prompt(text + prefix)
        may_be = {
            ids: total
            for ids, each in every(text + prefix, 4).items()
            if not (n and repeats(before, ids, n)) and (total := sum(each) / len(each))
        }
        got = [best, *best.others]
        ours = {tuple(one.tokens[len(prefix) :]): one.score for one in got}
        assert ours == pytest.approx(may_be, rel=1e-5, abs=1e-4)
        assert {one.text[: len(prefix)] for one in got} == {prefix}
        least = min(least, len(got))
    assert (least < 121) == (n is not None)


def repeats(before: list[int], ids: tuple[int, ...], n: int) -> bool:
    """Whether one of ``ids`` ends a run of ``n`` that is there before it."""
    whole = [*before, *ids]
    ends = range(len(before) + 1, len(whole) + 1)
    return any(tuple(whole[end - n : end]) in runs(whole[: end - 1], n) for end in ends if end >= n)


def by_lists(logits, start: int, config: BeamConfig) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search over a table of what follows what, in lists; it never ends early.

    Of all continuations of the beams the best ``size`` are taken that go on, and of those that end
    the ones among the best ``size`` of both.
    """
    each = np.asarray(jax.nn.log_softmax(jnp.asarray(logits[:, : END + 1])), np.float64)
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found = []
    for length in range(1, config.max_new_tokens + 1):
        longer = sorted(
            (
                (total + float(each[ids[-1] if ids else start, i]), (*ids, i))
                for total, ids in beams
                for i in range(END + 1)
                if not (
                    config.no_repeat_ngram and repeats([start], (*ids, i), config.no_repeat_ngram)
                )
                and (i != END or length > config.min_new_tokens)
            ),
            reverse=True,
        )
        goes_on = [one for one in longer if one[1][-1] != END][: config.size]
        ended = [one for one in longer if one[1][-1] == END][: config.size]
        for total, ids in sorted([*goes_on, *ended], reverse=True)[: config.size]:
            if ids[-1] == END or length == config.max_new_tokens:
                score = by_hand(config.length_penalty, config.alpha, total, length)
                found.append((score, ids))
        beams = goes_on
    return sorted(found, reverse=True)[: config.n_best]


SHORT = BeamConfig(size=3, n_best=3, max_new_tokens=12)
NARROW = {
    "mean": {},
    "sum": {"alpha": 0.0},
    "long": {"alpha": 2.0, "min_new_tokens": 2},
    "short": {"alpha": -0.5},
    "gnmt": {"length_penalty": "gnmt", "alpha": 0.6},
    "gnmt long": {"length_penalty": "gnmt", "alpha": 1.5, "no_repeat_ngram": 2},
}


def test_a_narrow_beam_equals_lists_and_exact_early_stopping_loses_nothing():
    """Behind some tokens ends are likely and behind others not: rows end early, and late."""
    rng, steps, missed = np.random.default_rng(3), set(), 0
    logits = 1.5 * rng.normal(size=(VOCAB, VOCAB))
    logits[:, END] += rng.choice([-1.0, 0.0, 1.0, 2.0], VOCAB)
    search, calls = counted(table_model(logits, end=[END]))
    for changes in NARROW.values():
        config = dataclasses.replace(SHORT, **changes)
        first = dataclasses.replace(config, early_stopping="first")
        for start, text in enumerate(CHARACTERS[:6]):
            calls.clear()
            (best,) = search([text], config)
            jax.effects_barrier()
            steps.add(len(calls))
            want = by_lists(logits, start, config)
            got = [(one.score, tuple(one.tokens)) for one in (best, *best.others)]
            assert [ids for _, ids in got] == [ids for _, ids in want]
            np.testing.assert_allclose(*([s for s, _ in x] for x in (got, want)), rtol=1e-4)
            (worse,) = search([text], first)
            missed += worse.score < best.score - 1e-6
    assert min(steps) < 5  # it does end early,
    assert max(steps) == 12  # and where it must not, it does not;
    assert missed  # ending earlier does lose


def counted(model) -> tuple[BeamSearch, list[int]]:
    """A search, and a list that gets an entry for each call of its model."""
    calls: list[int] = []

    def step(*given):
        jax.debug.callback(lambda: calls.append(1))
        return model.step(*given)

    return BeamSearch(dataclasses.replace(model, step=step)), calls


def test_penalties_are_tables_of_lengths():
    hf, gnmt = BeamConfig(alpha=2.0), BeamConfig(length_penalty="gnmt", alpha=2.0)
    assert divisors(hf, 4).tolist() == [1, 1, 4, 9, 16]
    np.testing.assert_allclose(divisors(gnmt, 3), [1, 1, (7 / 6) ** 2, (8 / 6) ** 2], rtol=1e-6)


def test_a_narrow_beam_finds_less_than_a_wide_one(search):
    """And what is found gets better, or brute force would show nothing."""
    scores = []
    for size in (1, 4, 128):
        config = dataclasses.replace(FEW, size=size)
        scores.append([one.score for one in search(PROMPTS, config)])
    assert all(a <= b + 1e-6 for a, b in zip(scores[0], scores[-1], strict=True))
    assert scores[0] != scores[-1]


def test_a_beam_of_one_is_greedy(search):
    greedy = Generate(MODEL)
    for least in (0, 6):
        config = BeamConfig(size=1, max_new_tokens=16, min_new_tokens=least)
        told = GenerateConfig(max_new_tokens=16, min_new_tokens=least)
        for one, other in zip(search(PROMPTS, config), greedy(PROMPTS, told), strict=True):
            assert (one.tokens, one.text, one.stopped) == (other.tokens, other.text, other.stopped)
            np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


def same(one, other) -> None:
    for x, y in itertools.zip_longest((one, *one.others), (other, *other.others)):
        assert (x.tokens, x.text, x.stopped) == (y.tokens, y.text, y.stopped)
        assert x.score == pytest.approx(y.score, abs=1e-4)
        np.testing.assert_allclose(x.log_probabilities, y.log_probabilities, atol=1e-4)


SEVERAL = BeamConfig(n_best=4, max_new_tokens=16, no_repeat_ngram=3)


def test_a_row_is_the_same_alone_and_in_company(search):
    together = list(search(PROMPTS, SEVERAL))
    assert len({one.text for one in together}) == len(PROMPTS)
    for one, other in zip(together, search(PROMPTS, SEVERAL, batch_size=1), strict=True):
        same(one, other)
    for one, other in zip(together[::-1], search(PROMPTS[::-1], SEVERAL), strict=True):
        same(one, other)


def test_on_a_mesh_as_on_one_device(search):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = dataclasses.replace(MODEL, mesh=mesh)
    model = dataclasses.replace(model, variables=jax.device_put(model.variables, place))
    found = BeamSearch(model)(PROMPTS, SEVERAL)
    for one, other in zip(search(PROMPTS, SEVERAL), found, strict=True):
        same(one, other)


def runs(ids, n) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_run_comes_twice(search, n):
    config = dataclasses.replace(SEVERAL, max_new_tokens=12, banned_tokens=("<end>",))
    for is_held, no_repeat in ((True, n), (False, None)):
        repeated = 0
        told = dataclasses.replace(config, no_repeat_ngram=no_repeat)
        texts = ["abc", "a", "hello", "babba", "deep"]
        for text, best in zip(texts, search(texts, told), strict=True):
            for one in (best, *best.others):
                before, found = (
                    runs(ids, n) for ids in (MODEL.prompt(text), [*MODEL.prompt(text), *one.tokens])
                )
                repeated += len(found) - len(set(found)) - len(before) + len(set(before))
        assert (repeated == 0) == is_held


def test_a_prefix_begins_each(search):
    config = dataclasses.replace(FEW, n_best=2, max_new_tokens=6, prefix="cab")
    plain = dataclasses.replace(config, prefix="", max_new_tokens=3)
    others = search([f"{text}cab" for text in PROMPTS], plain)
    for one, other in zip(search(PROMPTS, config), others, strict=True):
        assert one.text == f"cab{other.text}"
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.log_probabilities[:3] == [0, 0, 0]
        assert len(one.tokens) == len(one.log_probabilities) <= 6
        assert one.others[0].text == f"cab{other.others[0].text}"


def test_limits_and_ends(search):
    config = BeamConfig(n_best=4, min_new_tokens=5, max_new_tokens=8, stop_tokens=("e", "!"))
    whys = set()
    for best in search(PROMPTS, config):
        for one in (best, *best.others):
            assert 6 <= len(one.tokens) <= 8
            assert not set("e!") & set(one.text[4:])
            assert (len(one.tokens) == 8) or one.stopped == "stop_token"
            whys.add(one.stopped)
    assert whys == {"stop_token", "max_new_tokens"}
    # A stop token may be banned as others are.
    (banned,) = search(["abc"], BeamConfig(max_new_tokens=9, banned_tokens=("<end>",)))
    assert END not in banned.tokens
    short = BeamSearch(dataclasses.replace(MODEL, max_length=9))
    (full,) = short(["hello "], BeamConfig(banned_tokens=("<end>",)))
    assert (len(full.tokens), full.stopped) == (3, "max_length")


def script(steps: list[dict[str, float]]):
    """A model whose probabilities at each new token are these, whatever came before; $ ends."""
    logits = np.full((len(steps) + 2, VOCAB), -30.0)
    for row, step in zip(logits[1:], steps, strict=False):
        for name, probability in step.items():
            row[END if name == "$" else CHARACTERS.index(name)] = math.log(probability)
    logits[len(steps) + 1, END] = 0
    table = jnp.asarray(logits, jnp.float32)

    def step(variables, state, tokens, positions, segment_ids):
        return table[jnp.minimum(positions + 1, len(logits) - 1)], state

    return table_model(step=step, end=[END])


# After the second token two texts have ended, after the third nothing that goes on is better at its
# length, and at the 14th it is.
EARLY = [{"$": 0.4, "a": 0.6}, {"$": 0.2, "b": 0.8}, {"$": 0.9, "c": 0.1}, *[{"d": 1.0}] * 10]


def test_exact_early_stopping_finds_what_others_miss():
    search, calls = counted(script([*EARLY, {"$": 1.0}]))
    found = {}
    for kind in ("exact", "heuristic", "first"):
        calls.clear()
        (one,) = search(["a"], BeamConfig(size=2, early_stopping=kind, max_new_tokens=17))
        jax.effects_barrier()
        found[kind] = one.text, round(one.score, 3), len(calls)
    assert found == {
        "exact": ("abc" + 10 * "d", round(math.log(0.048) / 14, 3), 14),
        "heuristic": ("ab", round(math.log(0.432) / 3, 3), 3),
        "first": ("", round(math.log(0.4), 3), 2),
    }


def test_other_values_compile_nothing(search):
    names: list[str] = []

    def listen(event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name", event)))

    list(search(PROMPTS, SEVERAL))
    jax.monitoring.register_event_duration_secs_listener(listen)
    changes = [
        {"max_new_tokens": 9, "min_new_tokens": 2},
        {"alpha": 0.3, "length_penalty": "gnmt", "early_stopping": "heuristic", "n_best": 1},
        {"no_repeat_ngram": None, "banned_tokens": ("e",), "stop_tokens": ("<end>",)},
    ]
    for change in changes:
        list(search(PROMPTS, dataclasses.replace(SEVERAL, **change)))
    assert names == []
    list(search(PROMPTS, dataclasses.replace(SEVERAL, size=3, n_best=3)))  # the control
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(names) == 1


def test_many_ends_do_not_starve_those_that_go_on():
    """With three stop tokens that are likeliest for all beams, each of which must go on."""
    logits = np.random.default_rng(2).normal(size=(VOCAB, VOCAB))
    logits[:, [CHARACTERS.index("."), CHARACTERS.index("!"), END]] = 4
    config = BeamConfig(
        n_best=4, max_new_tokens=6, stop_tokens=(".", "!"), alpha=9.0, early_stopping="exact"
    )
    (best,) = BeamSearch(table_model(logits, end=[END]))(["abc"], config)
    assert {len(one.tokens) for one in (best, *best.others)} == {6}


@pytest.mark.parametrize("size", [300, 5000, 5001])
def test_the_largest_as_by_a_sort(size):
    x = jax.random.randint(jax.random.key(size), (3, size), 0, 40).astype(jnp.float32)
    x = x.at[1, 5:].set(-jnp.inf)
    x = x.at[2, : size // 2].set(-jnp.inf)
    got, want = beam_decoding.top(x, 6), jax.lax.top_k(x, 6)
    np.testing.assert_array_equal(got[0], want[0])
    there = np.isfinite(want[0])
    np.testing.assert_array_equal(np.asarray(got[1])[there], np.asarray(want[1])[there])
    assert (np.asarray(got[1]) < size).all()


BAD = {
    "size=0 is not above 0": {"size": 0},
    "n_best=5 is not from 1 to size=4": {"n_best": 5},
    "n_best=0 is not from 1": {"n_best": 0},
    "alpha=nan is not a finite number": {"alpha": math.nan},
    "alpha=inf is not a finite number": {"alpha": math.inf},
    "alpha=900.0 makes scores of 17 tokens that are not numbers": {"alpha": 900.0},
    "no_repeat_ngram=0 is not above 0; leave it out": {"no_repeat_ngram": 0},
    "max_new_tokens=0 is not above 0": {"max_new_tokens": 0},
    "min_new_tokens=9 is not from 0 to max_new_tokens=8": {
        "min_new_tokens": 9,
        "max_new_tokens": 8,
    },
    "prefix='abcd' has 4 tokens, which count among max_new_tokens=4: raise that above 4": {
        "prefix": "abcd",
        "max_new_tokens": 4,
    },
    "there is room for 61 tokens, and prefix='aaaa": {
        "prefix": 61 * "a",
        "max_new_tokens": 99,
    },
    "prefix='Z' holds no token": {"prefix": "Z"},
    "'abc' is not one token but 3": {"stop_tokens": ("abc",)},
    "all 20 tokens are banned": {"banned_tokens": (*CHARACTERS, "<end>")},
    "nothing can follow 'abc': banned_tokens, no_repeat_ngram and": {
        "banned_tokens": BANNED,
        "no_repeat_ngram": 1,
        "min_new_tokens": 4,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configurations(search, message):
    with pytest.raises(InputError) as raised:
        list(search(["abc"], BeamConfig(**{"max_new_tokens": 17} | BAD[message])))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_texts(search):
    fields = vars(BeamConfig()) | {"stop_tokens": "ab"}
    with pytest.raises(InputError, match="stop_tokens='ab' is one string"):
        BeamConfig.__post_init__(SimpleNamespace(**fields))
    with pytest.raises(InputError, match="texts='abc' is one string"):
        list(search("abc"))
    with pytest.raises(InputError, match="batch_size=0"):
        list(search(["a"], batch_size=0))
    assert list(search([])) == []
    broken = BeamSearch(table_model(np.full((VOCAB, VOCAB), np.nan)))
    with pytest.raises(InputError, match="behind 'abc' are not numbers: training has diverged"):
        list(broken(["abc"]))
    narrow = table_model(np.zeros((8, 8)))
    with pytest.raises(InputError, match="8 logits, and the tokenizer ids up to 19"):
        list(BeamSearch(dataclasses.replace(narrow, step=table_step))(["abc"]))
