"""The command line behind a config file: it reaches every field of every class, and says how."""

import ast
import dataclasses
import itertools
import random
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from jaxlm import config as configs
from jaxlm.config import Config, FinetuneConfig, PretrainConfig
from jaxlm.data.labelled.augment import AugmentConfig
from jaxlm.data.labelled.records import Conll, JsonLines, Table
from jaxlm.data.prepare import PrepareConfig
from jaxlm.data.sources import TextFiles
from jaxlm.errors import InputError
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.tuning import Full, HeadOnly
from jaxlm.runs import command_line, misspelt
from jaxlm.runs.phase import next_model
from jaxlm.tasks.tagging import Tagging

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: configs.read_file(path) for path in sorted((ROOT / "configs").glob("*.py"))}
CSV: Any = CONFIGS["csv_classifier"]


def changed(config: Any, *options: str) -> Any:
    """One text is several options."""
    argv = options[0].split() if len(options) == 1 else options
    return command_line.changed(config, argv, prog="test")


# All fields. The classes' own checks are off: what fits together is not the command line's affair.


@dataclasses.dataclass(frozen=True)
class Reached:
    """A class that a config may hold, its path, and the options that put it there."""

    config: Config
    path: str
    kind: Any
    way: tuple[tuple[str, ...], ...] = ()
    needed: tuple[tuple[str, ...], ...] = ()

    def hints(self) -> dict[str, Any]:
        hints = get_type_hints(self.kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(self.kind)}

    def inner(self) -> Iterator["Reached"]:
        yield self
        for name, hint in self.hints().items():
            path = f"{self.path}{name}"
            for kind in command_line.classes(hint).values():
                choice = ((f"--{path}", kind.__name__),) if command_line.is_choice(hint) else ()
                way = (*self.way, *choice)
                needed = (*self.needed, *required(kind, f"{path}."))
                yield from Reached(self.config, f"{path}.", kind, way, needed).inner()


def required(kind: Any, path: str) -> Iterator[tuple[str, ...]]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.default is field.default_factory is dataclasses.MISSING:
            yield from (
                tuple(tokens) for tokens, _ in samples(hints[field.name], path + field.name)[:1]
            )


def samples(hint: Any, name: str) -> list[tuple[list[str], Any]]:
    """Options for a field, and the values that they give it: several for each type it may have."""
    flag, last = f"--{name}", name.rfind(".") + 1
    found: list[tuple[list[str], Any]] = []
    kinds = command_line.alternatives(hint)
    for kind in kinds:
        if get_origin(kind) is Literal:
            found += [([flag, str(value)], value) for value in get_args(kind)]
        elif get_origin(kind) is tuple:
            (one, two, *_) = samples(get_args(kind)[0], name)
            found += [([*two[0], *one[0][1:]], (two[1], one[1]))]
            if get_args(kind)[-1] is not Ellipsis:  # of so many, no more and no fewer
                continue
            found += [([flag], ())]
            found += [] if str in kinds else [(one[0], (one[1],))]  # one word is no tuple there
        elif kind is bool and types.NoneType in kinds:  # None is a third value
            found += [([flag, "True"], True), ([flag, "False"], False)]
        elif not dataclasses.is_dataclass(kind):
            found += {
                types.NoneType: [([flag, "None"], None)],
                bool: [([flag], True), ([f"--{name[:last]}no-{name[last:]}"], False)],
                int: [([flag, "-17"], -17), ([f"{flag}=23"], 23)],
                float: [([flag, "0.375"], 0.375), ([flag, "-2e3"], -2e3)],
                str: [([flag, "a word"], "a word"), ([flag, ""], ""), ([f"{flag}=--x"], "--x")],
                Path: [([flag, "a/b"], Path("a/b")), ([flag, "gs://c"], Path("gs://c"))],
            }[kind]
    return found


ROOTS = (CONFIGS["quickstart"], CONFIGS["sst2_bilstm"])
REACHED = [reached for root in ROOTS for reached in Reached(root, "", type(root)).inner()]


@pytest.mark.parametrize("reached", REACHED, ids=lambda it: f"{it.path}{it.kind.__name__}")
def test_every_field_of_every_class_can_be_set(
    reached: Reached, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in REACHED:
        monkeypatch.setattr(other.kind, "__post_init__", lambda self: None, raising=False)
    values = {
        reached.path + name: samples(hint, reached.path + name)
        for name, hint in reached.hints().items()
    }
    for i in range(max(map(len, values.values()), default=0)):
        chosen = {name: some[i % len(some)] for name, some in values.items() if some}
        options = shuffled([*reached.way, *(tokens for tokens, _ in chosen.values())], seed=i)
        options = [*reached.needed, *options]  # which may be chosen as well: the last one counts
        config = changed(reached.config, *itertools.chain(*options))
        for name, (_, value) in chosen.items():
            assert at(config, name) == value, name
            assert type(at(config, name)) is type(value), name


def shuffled(items: list[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(items, len(items))


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = vars(config)[name]
    return config


def test_the_fields_are_found() -> None:
    paths = {f"{it.path}{it.kind.__name__}.{name}" for it in REACHED for name in it.hints()}
    assert {
        "tuning.LoraConfig.rank",
        "data.validation.Conll.tag_column",
        "prepare.tokenizer.TokenizerConfig.kind",
    } <= paths
    assert len(paths) > 150


def names_that_are_read() -> set[str]:
    """Attributes read anywhere but in a class's check of itself."""
    found: set[str] = set()
    for path in [*ROOT.glob("jaxlm/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(checks_left_out(ast.parse(path.read_text(encoding="utf-8")))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


def checks_left_out(module: ast.Module) -> ast.Module:
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef):
            node.body = [x for x in node.body if getattr(x, "name", "") != "__post_init__"]
            node.body = [x for x in node.body if not isinstance(x, ast.AnnAssign)]
    return module


def test_every_field_is_read_somewhere() -> None:
    fields = {name for reached in REACHED for name in reached.hints()}
    assert len(fields) > 100
    assert fields - names_that_are_read() == set()


# Whole configs.


def options_for(config: Any, path: str = "") -> Iterator[list[str]]:
    """Options that make any config of its kind equal to this one."""
    for name, value in vars(config).items():
        flag, hint = f"--{path}{name}", get_type_hints(type(config))[name]
        if command_line.is_choice(hint):
            yield [flag, "None" if value is None else type(value).__name__]
        if dataclasses.is_dataclass(value):
            yield from options_for(value, f"{path}{name}.")
        elif isinstance(value, bool):
            yield [flag if value else f"--{path}no-{name}"]
        elif isinstance(value, tuple):
            yield [flag, *map(str, value)]
        elif not command_line.is_choice(hint):
            yield [flag, str(value)]


PAIRS = [
    (a, b) for a, b in itertools.permutations(CONFIGS, 2) if type(CONFIGS[a]) is type(CONFIGS[b])
]


# Each from the one before it; all of the others are slow.
NEXT = set(zip(CONFIGS, [*CONFIGS][1:], strict=False))
EVERY = [
    pytest.param(*pair, marks=() if pair in NEXT else pytest.mark.slow, id="-".join(pair))
    for pair in PAIRS
]


@pytest.mark.parametrize(("a", "b"), EVERY)
def test_any_config_can_be_made_of_any_other(a: str, b: str) -> None:
    options = shuffled(list(options_for(CONFIGS[b])), seed=len(a))
    assert changed(CONFIGS[a], *itertools.chain(*options)) == CONFIGS[b]


def test_another_task_reader_and_tuning() -> None:
    options = "--data.train Conll --data.train.path a.conll --task Tagging --tuning Full"
    config = changed(CONFIGS["quickstart_lora"], options)
    assert config.data.train == Conll(path="a.conll")
    assert (config.task, config.tuning) == (Tagging(), Full())


# What is there, and what is made.


def test_a_validation_file_has_the_columns_of_the_training_file() -> None:
    config = changed(
        CSV,
        *("--data.validation.path", "val.csv", "--data.train.path", "my.csv"),
        *("--data.train.no-header", "--data.train.columns", "text", "label"),
    )
    assert config.data.train == Table(path="my.csv", header=False, columns=("text", "label"))
    assert config.data.validation == replace(config.data.train, path="val.csv")
    config = changed(CSV, "--data.validation.path", "v.jsonl", "--data.train", "JsonLines")
    assert config.data.train == JsonLines(path="data.csv")  # what has no default is kept
    assert config.data.validation == JsonLines(path="v.jsonl")
    config = changed(CSV, "--data.validation", "Table", "--data.validation.path", "val.csv")
    assert config.data.validation == Table(path="val.csv")
    with pytest.raises(InputError, match=r"alone is data\.train once more.*data\.validation\.path"):
        changed(CSV, "--data.validation", "Table")


def test_a_field_of_none_makes_what_it_belongs_to() -> None:
    config = changed(CSV, "--data.augment.swap-rate", "0.25")
    assert config.data.augment == AugmentConfig(swap_rate=0.25)
    config = changed(
        CONFIGS["bert_base"], "--prepare.source", "TextFiles", "--prepare.source.glob", "*"
    )
    assert config.prepare == PrepareConfig(source=TextFiles(glob="*"))
    with pytest.raises(InputError, match=r"model is None.*add --model BertConfig or --model Bil"):
        changed(CSV, "--model.hidden-dim", "64")
    with pytest.raises(InputError, match=r"add --model BilstmConfig$"):
        changed(CSV, "--model.embed-dim", "64")


@pytest.mark.parametrize("text", ["LoraConfig", "lora-config", "LORA_CONFIG"])
def test_the_class_that_is_there_stays_as_it_is(text: str) -> None:
    was = CONFIGS["quickstart_lora"]
    assert changed(was, "--tuning", text) == was
    config = changed(was, "--tuning.rank", "3", f"--tuning={text}")
    assert config.tuning == replace(was.tuning, rank=3)  # pyright: ignore[reportAttributeAccessIssue]
    config = changed(CONFIGS["sst2_full"], "--tuning.rank", "3", "--tuning", text)
    assert config.tuning == LoraConfig(rank=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tuning Lora", "one of Full, HeadOnly, .*LoraConfig.*write --tuning LoraConfig"),
        ("--data.validation no", "one of Table, .*None; write --data.validation None"),
        (
            "--tuning HeadOnly --tuning.rank 3",
            "tuning is HeadOnly, which has no rank; add --tuning L",
        ),
        ("--tuning.outputs x", "add --tuning Ia3Config"),
        ("--data.augment None --data.augment.swap-rate 1", "data.augment is None.*swap_rate"),
        ("--base None --tuning Full", "base and model are None"),
        ("--dropout-rate 2", "dropout_rate=2.0 is not inside"),
        ("--model BertConfig", "own: add --model None, or --base None"),
    ],
)
def test_wrong_options_are_one_sentence(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        changed(CSV, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizer.peak-l 1", "--optimizer.peak-lr"),
        ("--tunin Full", "--tuning {Full,HeadOnly"),
        ("--train.seed many", "many"),
        ("--tuning", "Missing value"),
        ("--tuning Full more", "more"),
        ("stray --tuning Full", "stray"),
        ("--data.train TfdsRecords", "--data.train.name"),
    ],
)
def test_misspelt_and_missing_options_say_what_was_meant(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        changed(CSV, options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_base_of_another_kind_says_all_that_must_go() -> None:
    bilstm = CONFIGS["sst2_bilstm"]
    with pytest.raises(InputError, match=r"add --model None --tokenizer None, or --base None$"):
        changed(bilstm, "--base", "x")
    config = changed(bilstm, "--base x --model None --tokenizer None")
    assert (config.base, config.model, config.tokenizer) == ("x", None, None)
    config = changed(CSV, "--base None --model BilstmConfig --tuning Full")
    assert type(config.model).__name__ == "BilstmConfig"


def test_a_field_of_a_base_that_is_not_here() -> None:
    """Where it is, tests/runs/test_continued.py changes it."""
    with pytest.raises(
        InputError, match=r"^--model.max-length is of the model of base=some/name, w"
    ):
        changed(CONFIGS["adapt"], "--base some/name --model.max-length 256")
    with pytest.raises(InputError, match=r"add --model None, or --base None$"):  # of no base
        changed(CONFIGS["sotu"], "--base some/name --model.max-length 256")
    phase = changed(CONFIGS["phase2_long"], "--base some/name --model.max-length 256")
    assert (phase.base, phase.model.max_length) == ("some/name", 256)


@pytest.mark.parametrize("options", ["--model None --model.max-length 1024", "--model None"])
@pytest.mark.parametrize("name", ["adapt", "phase2_long"])
def test_the_model_of_a_base_with_other_fields(name: str, options: str, tmp_path: Path) -> None:
    """Whatever model the config has; where the base was trained decides no dtype."""
    own = replace(CONFIGS["phase1_short"].model, vocab_size=64, hidden_dim=96, max_length=128)
    trained = replace(CONFIGS["phase1_short"], model=replace(own, dtype="float32"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(configs.to_json(trained))
    config = changed(CONFIGS[name], f"--base {tmp_path} {options}")
    wanted = replace(own, max_length=1024) if "max-length" in options else None
    assert config.model == wanted
    if wanted is not None:
        found = next_model(own, config.model, 64, config.task, config.mesh)
        assert replace(found, num_tokens=None) == wanted


# Options that contradict the config.


def test_other_data_are_not_prepared_by_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    was = CONFIGS["quickstart"]
    assert changed(was, "--data.paths", "mine", "more").prepare is None
    assert "note: mine more is read as it is" in capsys.readouterr().err
    for options in (
        ["--data.paths", "prepared/pydocs", "more"],
        ["--data.paths", "mine", "--prepare", "PrepareConfig"],
        ["--data.paths", "mine", "--prepare.source.glob", "*", "--prepare.source", "TextFiles"],
    ):
        assert changed(was, *options).prepare is not None
    assert changed(was, "--prepare.row-length", "32").prepare == replace(was.prepare, row_length=32)  # pyright: ignore
    assert not capsys.readouterr().err


def test_new_tokens_without_a_tokenizer_are_refused_with_options_that_work() -> None:
    was, more = CONFIGS["quickstart"], "--prepare.extend-vocab 500"
    with pytest.raises(InputError, match=r"prepare\.extend_vocab=500 adds to a .*") as refused:
        changed(was, more)
    smaller = "--prepare.extend-vocab None --prepare.tokenizer.vocab-size 4596"
    message = str(refused.value)
    assert "--base or --prepare.tokenizer.path" in message
    assert smaller in message
    for way in (f"{more} --base x --model None", f"{more} --prepare.tokenizer.path x", smaller):
        assert changed(was, way).prepare


def test_what_ends_a_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert changed(CSV, "--train.epochs", "2").train.epochs == 2
    changed(CSV, "--train.minutes", "2", "--train.epochs", "None")
    assert not capsys.readouterr().err
    changed(CSV, "--train.minutes", "2")
    assert "train.epochs=10 and train.minutes=2: the first" in capsys.readouterr().err
    changed(CONFIGS["sst2_lora"], "--data.validation-fraction", "0.2")
    assert "no effect" in capsys.readouterr().err
    changed(CSV, "--data.validation-fraction", "0.2")
    assert not capsys.readouterr().err


# Help, and the file.


def test_help_shows_the_classes_and_how_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        changed(CSV, "--tuning", "Ia3Config", "--help")
    assert stop.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for path, hint, _ in command_line.choices(replace(CSV, tuning=HeadOnly())):
        names = f"--{path.replace('_', '-')} {{{','.join(command_line.classes(hint))}"
        assert names.replace(" ", "") in text.replace(" ", "")  # long lists are broken
    assert "--tuning.outputs" in text
    with pytest.raises(SystemExit):
        changed(CSV, "--data.train TfdsRecords --help")
    assert "--data.train.name STR" in capsys.readouterr().out
    assert "--model BertConfig puts it in the place" in text


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_a_script_alone_says_what_to_write(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, f"scripts/{script}.py"]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (alone.returncode, alone.stdout) == (2, "")
    kind = PretrainConfig if script == "pretrain" else FinetuneConfig
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(SystemExit) as stop:
        command_line.load(kind, ["--help"])
    assert stop.value.code == 0
    asked = capsys.readouterr().out
    assert alone.stderr.endswith(asked)
    for stem, config in CONFIGS.items():
        assert (f"configs/{stem}.py " in asked) is isinstance(config, kind)
    example = asked.splitlines()[-1].split()
    assert example[:2] == ["Try:", f"{script}.py"]
    assert command_line.load(kind, example[2:]).name == "second"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["configs/quickstart_lor.py"], r"did you mean .*configs/quickstart_lora\.py"),
        (["sst2_full"], r"did you mean .*configs/sst2_full\.py"),
        (["zzz.py"], r"no config file zzz\.py$"),
        (["--tuning", "Full"], "--tuning stands before the config file"),
        ([str(ROOT / "configs/quickstart.py")], "holds a PretrainConfig: use scripts/pretrain"),
    ],
)
def test_no_config_file(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command_line.load(FinetuneConfig, argv)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import jaxlm.tasks.answering", r"did you mean jaxlm\.tasks\.question_answering or .*\?"),
        ("import jaxlm.lora", r"'jaxlm\.lora'; did you mean jaxlm\.peft\.lora\?"),
        ("import jaxlm.hosts", r"jaxlm/CHANGELOG\.md lists names that have changed"),
        (
            "from jaxlm.tasks.masked_lm import MaskedLmConfig",
            r"jaxlm\.tasks\.masked_lm\.MaskedLm\b",
        ),
        ("from jaxlm.config import LoraConfigs", r"did you mean jaxlm\.peft\.lora\.LoraConfig or"),
        ("from jaxlm.config import Table", r"did you mean jaxlm\.data\.labelled\.records\.Table\?"),
        ("import nowhere", r"No module named 'nowhere'$"),
    ],
)
def test_misspelt_and_former_names(tmp_path, line, message):
    (tmp_path / "c.py").write_text(line)
    with pytest.raises(InputError, match=message):
        command_line.read(tmp_path / "c.py")


def test_misspelt_fields():
    unexpected = "{}.__init__() got an unexpected keyword argument {!r}"
    error = TypeError(unexpected.format("OptimizerConfig", "peak_rl"))
    assert misspelt.hint(error) == "; did you mean peak_lr?"
    hint = misspelt.hint(TypeError(unexpected.format("PretrainConfig", "zzz")))
    named = hint.removeprefix("; there are ").split(", ")
    assert set(named) == {field.name for field in dataclasses.fields(PretrainConfig)}
    assert misspelt.hint(TypeError(unexpected.format("Own", "x"))) == ""
