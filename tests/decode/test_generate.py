"""Continuing texts with models that are functions: what a row becomes, and what is compiled."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import (
    CHARACTERS,
    END,
    VOCAB,
    attention_model,
    attention_variables,
    characters,
    table_model,
    table_state,
    table_step,
)

from jaxlm.data import tokenizers
from jaxlm.decode.causal_model import CausalModel, bucket
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.errors import InputError
from jaxlm.sharding import MeshConfig, make_mesh

PROMPTS = ["abc", "a", "hello no", "feed me a fig. a big fig!", "deep"]
GREEDY = GenerateConfig(max_new_tokens=24)
SAMPLED = GenerateConfig(max_new_tokens=24, temperature=1.0, top_p=0.9, top_k=12, seed=3)


@pytest.fixture(scope="module")
def attention() -> Generate:
    return Generate(attention_model(end=[END]))


@pytest.fixture(scope="module")
def table() -> Generate:
    return Generate(table_model(end=[END]))


@pytest.fixture
def compiled():
    """Names of what has been compiled since; clear it at will."""
    names: list[str] = []

    def listen(event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def uncached(model: CausalModel, text: str, count: int) -> tuple[list[int], list[float]]:
    """Greedily, reading the whole text anew for each token; padding is on its right."""
    ids, log_probabilities = model.prompt(text), []
    prompt = len(ids)

    @jax.jit
    def read(tokens, length):
        positions = jnp.arange(64)[None]
        segment_ids = jnp.where(positions < length, 0, -1)
        logits, _ = model.step(
            model.variables, model.make_state(1, 64), tokens, positions, segment_ids
        )
        return jax.nn.log_softmax(logits[0, length - 1, : model.vocab_size])

    for _ in range(count):
        logits = np.asarray(read(np.array([ids + [0] * (64 - len(ids))]), len(ids)))
        ids.append(int(logits.argmax()))
        log_probabilities.append(float(logits.max()))
        if ids[-1] in model.end:
            break
    return ids[prompt:], log_probabilities


def test_cached_equals_uncached(attention):
    model = attention_model(end=[END])
    for text, got in zip(PROMPTS, attention(PROMPTS, GREEDY), strict=True):
        tokens, log_probabilities = uncached(model, text, 24)
        assert got.tokens == tokens
        np.testing.assert_allclose(got.log_probabilities, log_probabilities, atol=1e-4)


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_the_same_alone_and_in_company(attention, config):
    together = list(attention(PROMPTS, config))
    assert len({one.text for one in together}) == len(PROMPTS)
    for size in (1, 2, 3):
        for one, other in zip(together, attention(PROMPTS, config, batch_size=size), strict=True):
            assert dataclasses.replace(one, log_probabilities=[]) == dataclasses.replace(
                other, log_probabilities=[]
            )
            np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)
    some = attention([PROMPTS[3], PROMPTS[1]], config, numbers=[3, 1])
    assert [one.text for one in some] == [together[3].text, together[1].text]


def test_rows_of_the_same_text_differ_and_seeds_do(attention):
    texts = [one.text for one in attention(["abc"] * 4, SAMPLED)]
    assert len(set(texts)) == 4
    other = dataclasses.replace(SAMPLED, seed=4)
    assert [one.text for one in attention(["abc"] * 4, other)] != texts
    assert [one.text for one in attention(["abc"] * 4, SAMPLED)] == texts
    assert len({one.text for one in attention(["abc"] * 4, GREEDY)}) == 1  # the control


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_on_a_mesh_as_on_one_device(attention, compiled, config):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = attention_model(end=[END], mesh=mesh)
    on_mesh = Generate(dataclasses.replace(model, variables=jax.device_put(model.variables, place)))
    want = [one.text for one in attention(PROMPTS, config)]
    compiled.clear()
    stopping = dataclasses.replace(config, stop_strings=("!!!!!!",))  # several turns of the loop
    assert [one.text for one in on_mesh(PROMPTS, stopping)] == want
    assert len(compiled) == 2
    assert [one.text for one in on_mesh(PROMPTS, config, batch_size=3)] == want


def test_two_programs_for_each_bucket(compiled):
    variables = attention_variables(max_length=512)
    model = attention_model(end=[END], variables=variables, max_length=512)
    generate = Generate(model)
    texts = PROMPTS[:3]
    compiled.clear()
    list(generate(texts, GREEDY))
    assert len(compiled) == 2
    compiled.clear()
    changes = [
        {"max_new_tokens": 1},
        {"max_new_tokens": 60},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2},
        {"stop_strings": ("ab", "!")},
        {"stop_tokens": ("a", ".")},
        {"banned_tokens": ("e",), "min_new_tokens": 3, "seed": 9},
    ]
    for change in changes:
        list(generate(texts, dataclasses.replace(GREEDY, **change)))
        list(generate([*texts, "other"], dataclasses.replace(GREEDY, **change)))
        # Streaming is the same program, of a batch of one.
    assert compiled == []
    list(generate.stream("abc", GREEDY))
    assert len(compiled) == 2
    list(generate.stream("a longer one", GREEDY, steps=5))
    list(generate(["abc"], SAMPLED))
    assert len(compiled) == 2
    compiled.clear()
    # The controls: a longer prompt is read by another program, more room needs two.
    list(generate([40 * "a"], GREEDY))
    assert len(compiled) == 1
    list(generate(["abc"], dataclasses.replace(GREEDY, max_new_tokens=300)))
    assert len(compiled) == 3


def test_buckets():
    sizes = sorted({bucket(length) for length in range(1, 1025)})
    assert sizes == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(bucket(length) >= length for length in range(1, 1025))


def cycle(text: str) -> np.ndarray:
    """Logits by which each character of the text is followed by the next; they must all differ."""
    ids = [CHARACTERS.index(c) if c != "$" else END for c in text]
    logits = np.zeros((VOCAB, VOCAB))
    for one, following in zip(ids, [*ids[1:], ids[0]], strict=True):
        logits[one, following] = 9
    return logits


def test_why_a_row_ends():
    generate = Generate(table_model(cycle("abcdefgh$"), end=[END]))

    def one(text: str, **given) -> tuple[str, int, str]:
        (got,) = generate([text], GenerateConfig(**given))
        assert len(got.tokens) == len(got.log_probabilities)
        return got.text, len(got.tokens), got.stopped

    assert one("ab") == ("cdefgh", 7, "stop_token")  # the last token is the stop token
    assert one("ab", max_new_tokens=3) == ("cde", 3, "max_new_tokens")
    assert one("ab", stop_tokens=("e",)) == ("cd", 3, "stop_token")
    assert one("ab", stop_strings=("ef",)) == ("cd", 4, "stop_string")
    assert one("ab", stop_strings=("xy", "gh", "efg")) == ("cd", 5, "stop_string")
    assert one("ab", stop_strings=("bc",))[2] == "stop_token"  # begun in the prompt
    assert one(62 * "a") == ("bc", 2, "max_length")
    assert one(62 * "a", max_new_tokens=2) == ("bc", 2, "max_new_tokens")
    # Before the fewest tokens neither a stop token nor a stop string counts.
    assert one("gh", min_new_tokens=3, max_new_tokens=3)[1:] == (3, "max_new_tokens")
    assert one("a", stop_strings=("cd",), min_new_tokens=3) == ("b", 3, "stop_string")
    assert one("a", stop_strings=("cd", "fg"), min_new_tokens=4) == ("bcde", 6, "stop_string")


def test_rows_that_have_ended_give_no_more(table):
    texts = ["abc", "h", "p!", "k"] * 4
    config = GenerateConfig(max_new_tokens=40, temperature=1.5)
    generations = list(table(texts, config, batch_size=16))
    assert len({len(one.tokens) for one in generations}) > 4
    for one in generations:
        assert (one.tokens[-1] == END) == (one.stopped == "stop_token")
        assert END not in one.tokens[:-1]
        assert "<end>" not in one.text


def test_the_loop_ends_with_its_last_row():
    """Calls of the model are counted by the model itself."""
    calls = []

    def step(variables, state, tokens, positions, segment_ids):
        jax.debug.callback(lambda: calls.append(1))
        return table_step(variables, state, tokens, positions, segment_ids)

    model = table_model(cycle("abcdefgh$"), end=[END])
    generate = Generate(dataclasses.replace(model, step=step))
    list(generate(["ab", "efg", "h"], GenerateConfig(max_new_tokens=50)))
    jax.effects_barrier()
    assert len(calls) == 7  # for cdefgh and the stop token, and none in vain
    calls.clear()
    list(generate(["ab", "b", "a"], GenerateConfig(max_new_tokens=4)))
    jax.effects_barrier()
    assert len(calls) == 4


def test_rows_above_the_tokenizer_and_gaps_are_never_taken():
    logits = np.zeros((VOCAB, VOCAB))
    logits[:, END + 1 :] = 50  # no tokens: rows that round the table up
    logits[:, 2] = 20  # a token, until the vocabulary has a gap there
    (one,) = Generate(table_model(logits))(["abc"], GenerateConfig(max_new_tokens=8))
    assert one.tokens == [2] * 8
    assert min(one.log_probabilities) > -1e-3  # among the tokens that there are

    tokenizer = characters()
    vocab = {c: i for c, i in tokenizer.get_vocab(with_added_tokens=False).items() if i != 2}
    gap = type(tokenizer)(type(tokenizer.model)(vocab, []))
    gap.decoder = tokenizer.decoder
    hot = GenerateConfig(max_new_tokens=50, temperature=5.0)
    (one,) = Generate(table_model(logits, tokenizer=gap))(["ab"], hot)
    assert max(one.tokens) <= END
    assert 2 not in one.tokens


def test_bans_and_repetitions():
    generate = Generate(table_model(cycle("abcd")))
    (plain,) = generate(["a"], GenerateConfig(max_new_tokens=4))
    assert plain.text == "bcda"
    (banned,) = generate(["a"], GenerateConfig(max_new_tokens=4, banned_tokens=("c",)))
    assert "c" not in banned.text
    # Of the prompt and of what was added: divided by 20, 9 is less than 0.5.
    logits = np.where(cycle("abcd") > 0, 9, 0.5)
    (rare,) = Generate(table_model(logits))(
        ["a"], GenerateConfig(max_new_tokens=4, repetition_penalty=20.0)
    )
    assert rare.text.startswith("bcd")
    assert rare.text[3] not in "abcd"


STOPS = [("edf",), ("!", "dah "), ("op", "pb", "ljm"), (".", "jh"), ("jo", "opo", "fb fe")]


@pytest.mark.parametrize("stops", STOPS, ids=str)
@pytest.mark.parametrize("least", [0, 9])
def test_streamed_pieces_are_the_text(table, stops, least):
    """Whatever the number of steps; and nothing of a stop string is ever shown."""
    config = GenerateConfig(
        max_new_tokens=30, min_new_tokens=least, temperature=1.2, stop_strings=stops, seed=1
    )
    ends = set()
    for number, whole in enumerate(table(["abc"] * 8, config)):
        ends.add(whole.stopped)
        assert not any(stop in whole.text[least:] for stop in stops)
        for steps in (1, 2, 7) if number < 4 else ():
            pieces = list(table.stream("abc", config, number=number, steps=steps))
            assert "".join(pieces) == whole.text
            assert all(pieces)
            assert steps > 1 or len(pieces) > len(whole.text) / 3
    assert "stop_string" in ends


def test_characters_of_several_tokens_are_shown_whole():
    tokenizer = tokenizers.train("bpe", ["a word"], 261)
    text = "für 20 € 😀!"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == len(" " + text.replace("ü", "..").replace("€", "...").replace("😀", "...."))
    stop = tokenizer.token_to_id("[SEP]")
    script = jnp.asarray([*ids, stop, stop, stop])

    def step(variables, state, tokens, positions, segment_ids):
        return 9.0 * jax.nn.one_hot(script[positions], 261), state

    def shifted(variables, state, tokens, positions, segment_ids):
        return step(variables, state, tokens, positions + 1, segment_ids)

    model = table_model(step=shifted, tokenizer=tokenizer, end=[stop])
    generate = Generate(model)
    pieces = list(generate.stream("f", GREEDY))
    assert "".join(pieces) == text[1:]
    assert pieces == list(text[1:])
    (whole,) = generate(["f"], dataclasses.replace(GREEDY, stop_strings=("€",)))
    assert (whole.text, whole.stopped) == ("ür 20 ", "stop_string")
    # An end in the midst of a character shows what is there.
    cut = dataclasses.replace(GREEDY, max_new_tokens=1)
    assert list(generate.stream("f", cut)) == ["\ufffd"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_spaces_between_prompt_and_continuation(kind):
    """The continuation begins with the space that stands before its first word."""
    texts = ["the cat sat on the mat. the cat ate it, and sat."] * 20
    tokenizer = tokenizers.train(kind, texts, 300 if kind == "bpe" else 40)
    script = jnp.asarray(tokenizer.encode(texts[0], add_special_tokens=False).ids)

    def step(variables, state, tokens, positions, segment_ids):
        return 9.0 * jax.nn.one_hot(script[positions + 1], 300), state

    generate = Generate(table_model(step=step, tokenizer=tokenizer))
    (one,) = generate(["the cat"], dataclasses.replace(GREEDY, max_new_tokens=20))
    assert one.text.startswith(" sat on the mat.")
    assert "".join(generate.stream("the cat", GREEDY)).startswith(" sat on the mat.")


def test_tokens_before_each_text(attention):
    model = attention_model(start=[END], end=[END])
    (got,) = Generate(model)(["abc"], GREEDY)
    tokens, _ = uncached(model, "abc", 24)
    assert got.tokens == tokens
    (other,) = attention(["abc"], GREEDY)
    assert other.tokens != tokens


BAD = {
    "temperature=-1": {"temperature": -1.0},
    "temperature=nan": {"temperature": float("nan")},
    "temperature=inf": {"temperature": float("inf")},
    "top_k=0": {"top_k": 0, "temperature": 1.0},
    "top_p=0": {"top_p": 0.0, "temperature": 1.0},
    "top_p=1.5": {"top_p": 1.5, "temperature": 1.0},
    "min_p=-0.1": {"min_p": -0.1, "temperature": 1.0},
    "top_p=0.9 changes nothing at temperature=0": {"top_p": 0.9},
    "repetition_penalty=0": {"repetition_penalty": 0.0},
    "max_new_tokens=0": {"max_new_tokens": 0},
    "min_new_tokens=9 is not from 0 to max_new_tokens=8": {
        "min_new_tokens": 9,
        "max_new_tokens": 8,
    },
    "min_new_tokens=-1": {"min_new_tokens": -1},
    "a stop string is empty": {"stop_strings": ("a", "")},
    "seed=-1": {"seed": -1},
    "'abc' is not one token but 3 ('a' 'b' 'c')": {"banned_tokens": ("abc",)},
    "'Z' is not one token but 0 (none)": {"stop_tokens": ("Z",)},
    "all 20 tokens are banned": {"banned_tokens": (*CHARACTERS, "<end>")},
    "all 20 tokens are banned or end a text before min_new_tokens": {
        "banned_tokens": tuple(CHARACTERS),
        "min_new_tokens": 2,
    },
    "the stop string 'a<end>' holds a special token": {"stop_strings": ("a<end>",)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configurations(table, message):
    with pytest.raises(InputError) as raised:
        list(table(["abc"], GenerateConfig(**BAD[message])))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["banned_tokens", "stop_tokens", "stop_strings"])
def test_one_string_for_several(name):
    """Python does not check types; these tests do, hence not by the constructor."""
    fields = vars(GenerateConfig())
    GenerateConfig.__post_init__(SimpleNamespace(**fields))
    with pytest.raises(InputError, match=f"{name}='ab' is one string: put it into a list"):
        GenerateConfig.__post_init__(SimpleNamespace(**fields | {name: "ab"}))


def test_bad_prompts(table):
    for texts, message in (
        (["abc", ""], "the prompt '' holds no token"),
        (["Z"], "the prompt 'Z' holds no token"),
        ([64 * "a"], "has 64 tokens, and the model takes 64 together with what it adds"),
    ):
        with pytest.raises(InputError, match=message):
            list(table(texts))
    assert list(table([63 * "a"]))  # what the message says
    assert list(table([])) == []
    with pytest.raises(InputError, match="batch_size=0"):
        list(table(["a"], batch_size=0))
    with pytest.raises(InputError, match="texts='abc' is one string"):
        list(table("abc"))
    narrow = table_model(np.zeros((8, 8)), make_state=table_state)
    with pytest.raises(InputError, match="8 logits, and the tokenizer ids up to 19"):
        list(Generate(narrow)(["abc"]))
    broken = table_model(np.full((VOCAB, VOCAB), np.nan))
    for answers in (Generate(broken)(["abc"]), Generate(broken).stream("abc")):
        with pytest.raises(InputError, match="behind 'abc' are not numbers: training has diverged"):
            list(answers)
