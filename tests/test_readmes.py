"""Every link, Python block and command of the Markdown files: they resolve, run and parse."""

import argparse
import functools
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import tyro
from tiny_runs import make_config
from xla_flags import xla_flags

from jaxlm.compile_check import command
from jaxlm.errors import report_input_errors
from jaxlm.runs import adapter, finetuning, pretraining
from jaxlm.runtime import allocator, distributed
from jaxlm.sweep import curve, sweep

ROOT = Path(__file__).parent.parent
STRANGERS = ("torch", "transformers", "peft")
FILES = [
    path
    for folder in (".github", "configs", "jaxlm", "scripts", "tests")
    for path in sorted((ROOT / folder).rglob("*.md"))
] + [ROOT / "README.md"]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# Links.


def anchors(text: str) -> list[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^(#+ .*)$", without_blocks(text), re.MULTILINE)
    seen: Counter[str] = Counter()
    found = []
    for heading in headings:
        words = re.sub(r"[^\w\- ]", "", heading.lstrip("#").strip().lower())
        slug = words.replace(" ", "-")
        found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))
    return [link for link in found if not link.startswith(("http://", "https://"))]


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = folder / name
        exists = not name or target.exists()
        if not exists or (anchor and anchor not in anchors(target.read_text() if name else text)):
            broken.append(link)
    return broken


@files
def test_links(path: Path) -> None:
    assert broken_links(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("# A b\n[x](#a-b) [y](test_readmes.py)\n```\n[z](none)\n```\n", []),
        ("# A `b`: c\n## A\n## A\n[x](#a-b-c) [x](#a-1)", []),
        ("# A\n[x](#b)", ["#b"]),
        ("![x](none.png) [y](https://none)", ["none.png"]),
        ("[x](../README.md#none)", ["../README.md#none"]),
    ],
)
def test_broken_links_are_found(text: str, broken: list[str]) -> None:
    assert broken_links(text, Path(__file__).parent) == broken


@pytest.mark.parametrize("folder", ["configs", "jaxlm", "scripts", "tests"])
def test_every_section_is_in_the_table_of_contents(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text()
    top, *sections = without_blocks(text).split("\n## ")
    listed = {link.removeprefix("#") for link in links(top)}
    assert len(sections) > 2
    assert set(anchors("\n".join(f"## {section}" for section in sections))) <= listed


def test_the_readme_is_short_and_names_the_field() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 200
    first = text.split("\n\n")[1]
    words = ("BERT", "masked language modelling", "LoRA", "JAX", "GPUs", "TPUs")
    assert [word for word in words if word not in first] == []


# Python blocks.


def write_tiny_configs(folder: Path) -> None:
    """Files of the names that the pages use, whose configs are tiny; and data for them."""
    (folder / "configs").mkdir()
    make_config(folder, steps=2)  # writes text.txt
    start = f"""
import runpy
from dataclasses import replace
from pathlib import Path
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.pydocs import PyDocsTopics
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig
from jaxlm.data.sources import TextFiles

real = lambda name: runpy.run_path({str(ROOT / "configs")!r} + "/" + name)["config"]
train = dict(steps=2, num_evals=1, log_every=1)
short = lambda config: replace(config, train=replace(config.train, **train))
"""
    (folder / "configs" / "quickstart.py").write_text(
        start
        + """
config = short(real("quickstart.py"))
config = replace(
    config,
    prepare=PrepareConfig(
        source=TextFiles(glob="text.txt", document="line"),
        tokenizer=TokenizerConfig(vocab_size=60),
        row_length=16,
    ),
    model=replace(config.model, num_layers=1, hidden_dim=16, mlp_dim=32),
    optimizer=replace(config.optimizer, name="adamw"),  # compiled sooner than muon
)
"""
    )
    (folder / "configs" / "gpt_quickstart.py").write_text(
        start
        + """
config = short(real("gpt_quickstart.py"))
config = replace(
    config,
    prepare=PrepareConfig(
        source=TextFiles(glob="text.txt", document="line"),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300),
        row_length=16,
    ),
    model=replace(config.model, num_layers=1, hidden_dim=16, mlp_dim=32),
    optimizer=replace(config.optimizer, name="adamw"),
)
"""
    )
    (folder / "configs" / "quickstart_lora.py").write_text(
        start
        + """
config = short(real("quickstart_lora.py"))
config = replace(config, data=LabelledConfig(train=PyDocsTopics(package="scipy"), batch_size=8))
"""
    )
    for name in ("adapt.py", "csv_classifier.py", "gpt_instruct.py", "multi30k.py"):
        (folder / "configs" / name).write_text(start + f'config = short(real("{name}"))\n')
    write_data(folder)


def write_data(folder: Path) -> None:
    """The files that the pages call a user's own."""
    texts = [f"the {word} cat is number {i}" for i, word in enumerate(["red", "blue"] * 20)]
    rows = [f"{text},{len(text.split()[1])}\n" for text in texts]
    (folder / "reviews.csv").write_text("".join(["review,stars\n", *rows]))
    (folder / "new.csv").write_text("review\nthe blue cat\n")
    topics = [f"{text},{topic}\n" for text, topic in zip(texts, ["io", "linalg"] * 20, strict=True)]
    (folder / "labelled.csv").write_text("".join(["text,label\n", *topics]))
    (folder / "sentences.txt").write_text("The [MASK] cat.\nA [MASK].\n")
    for name, keys in {"prompts": ("prompt", "response"), "pairs": ("en", "de")}.items():
        objects = [json.dumps(dict.fromkeys(keys, text)) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(objects))
    (folder / "new.jsonl").write_text('{"prompt": "What is a cat?"}\n')
    parts = {"train": texts[:30], "val": texts[30:35], "test": texts[35:]}
    for (name, part), language in itertools.product(parts.items(), ("en", "de")):
        (folder / f"{name}.{language}").write_text("\n".join(part))
    (folder / "mytext").mkdir()
    for path in FILES:
        name = "-".join(path.relative_to(ROOT).parts)
        (folder / "mytext" / f"{name}.txt").write_text(without_blocks(path.read_text()))


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tiny_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(text: str) -> None:
    """In order, in one namespace, as somebody would paste them."""
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks(text, "python"), start=1):
        exec(compile(block, f"<block {number}>", "exec"), namespace)


def needs_runs(path: Path) -> bool:
    return "runs/quickstart" in "".join(blocks(path.read_text(), "python"))


@files
def test_python_blocks(path: Path) -> None:
    if not needs_runs(path):  # else test_the_readme_from_top_to_bottom, which leaves runs
        run_blocks(path.read_text())


@pytest.mark.parametrize("block", ["x = ", "x = 1\nassert x == 2", "import jaxlm.nothing"])
def test_blocks_can_fail(block: str) -> None:
    with pytest.raises((SyntaxError, AssertionError, ImportError)):
        run_blocks(f"```python\nx = 1\n```\n\n```python\n{block}\n```\n")


# Commands.


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of all shell blocks, with variables of their own put in."""
    lines = []
    for block in blocks(text, "bash", "console"):
        joined = block.replace("\\\n", " ").splitlines()
        typed = [line.removeprefix("$ ") for line in joined if line.startswith("$ ")]
        lines += typed or ([] if block in blocks(text, "console") else joined)
    for block in re.findall(r"(?<=\n\n)(?:    .+\n)+", without_blocks(text)):  # indented ones
        lines += block.replace("\\\n", " ").splitlines()
    variables: dict[str, str] = {}
    for line in lines:
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and re.fullmatch(r"[A-Z]+=.*", words[0]):
            name, _, variables[name] = words[0].partition("=")
            continue
        simple: list[str] = []
        for word in [*words, "&&"]:
            if word == "&&":
                if simple:
                    yield simple
                simple = []
            else:
                simple.append(word)


def script_of(words: list[str]) -> list[str] | None:
    """``scripts/X.py`` and what follows, whatever launches it."""
    names = [i for i, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)]
    return words[names[0] :] if names else None


class Parsed(BaseException):
    """Raised where a script has read its command line and would begin its work."""


def parsed(*_: Any, **__: Any) -> Any:
    raise Parsed


class Missing(MetaPathFinder):
    """Has the libraries of the benchmarks missing, as they are without the extra ``bench``."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname.partition(".")[0] in STRANGERS:
            raise ModuleNotFoundError(fullname, name=fullname)


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Runs a script here, from its beginning, as if it were the program."""
    monkeypatch.setattr(allocator, "tune_process", lambda: None)
    monkeypatch.setattr(distributed, "joined", report_input_errors)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # scripts of the compile check set it

    def run_script(words: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.syspath_prepend(str(ROOT / "scripts"))
            try:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            except SystemExit as ended:
                if ended.code:
                    pytest.fail(f"{shlex.join(words)}: exit code {ended.code}")

    return run_script


@pytest.fixture
def parse(
    run_script: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], None]:
    """Has a script read its command line, and do no more."""
    cli, dict_cli = tyro.cli, tyro.extras.subcommand_cli_from_dict
    parse_args = argparse.ArgumentParser.parse_args

    def script_cli(form: Any, *args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] != "__main__":
            return cli(form, *args, **options)
        if not isinstance(form, type):  # a function, which would be called
            form = functools.wraps(form)(lambda *_, **__: None)
        return parsed(cli(form, *args, **options))

    monkeypatch.setattr(tyro, "cli", script_cli)
    for where, name in (
        (pretraining, "pretrain"),
        (finetuning, "finetune"),
        (adapter, "load"),
        (sweep, "sweep"),
        (curve, "curve"),
        (command, "run_check"),
        (command, "run_scaling"),
    ):
        monkeypatch.setattr(where, name, parsed)

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: parsed(function(*args, **options))

    def parse(words: list[str]) -> None:
        if words == ["scripts/minimal.py"]:
            return  # it reads no command line
        with monkeypatch.context() as patch:
            if words[0] == "scripts/benchmark.py":
                patch.setattr(tyro.extras, "subcommand_cli_from_dict", after(dict_cli))
                patch.setattr(tyro, "cli", cli)
            for name in STRANGERS:
                patch.delitem(sys.modules, name, raising=False)
                if words[0] == "scripts/compare_peft.py":  # imports them before it reads anything
                    patch.setitem(sys.modules, name, MagicMock())
            patch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
            if words[0] == "scripts/compare_peft.py":
                patch.setattr(argparse.ArgumentParser, "parse_args", after(parse_args))
            with pytest.raises(Parsed):
                run_script(words)

    return parse


@files
def test_commands(
    path: Path, parse: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(path.read_text()):
        for word in words:
            if re.fullmatch(r"(scripts/\w+\.(py|sh)|configs/\w+\.py)", word):
                assert (ROOT / word).is_file(), shlex.join(words)
            for extra in re.findall(r"(?:\.|jaxlm)\[(.+)\]", word):
                assert set(extra.split(",")) <= EXTRAS.keys(), shlex.join(words)
        script = script_of(words)
        if script is not None:
            parse(script)


@pytest.mark.parametrize(
    "line",
    [
        "python scripts/pretrain.py configs/quickstart.py --optimizer.peak-l 1e-3",
        "python scripts/pretrain.py configs/none.py",
        "python scripts/evaluate.py runs/quickstart --none",
        "python scripts/prepare.py --out x none",
        "python scripts/sweep.py configs/quickstart_lora.py --set optimizer.none=1",
        "python scripts/compile_check.py configs/bert_base.py --topology v5e:4x4 --none 1",
        "python scripts/benchmark.py none",
        "python scripts/adapter.py none",
    ],
)
def test_misspelt_commands_are_found(
    line: str, parse: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ((*_, words),) = (list(commands(f"```bash\n{line}\n```\n")),)
    script = script_of(words)
    assert script is not None
    with pytest.raises(pytest.fail.Exception, match="exit code"):
        parse(script)


def test_commands_are_read_as_a_shell_would() -> None:
    text = (
        '```bash\nW="--out x"  # a comment\npip install -e ".[tpu]" && python scripts/a.py $W \\\n'
        "  'b c'\nA=1 python scripts/b.py\n```\n\n```console\n$ python scripts/c.py\n 94.1%  x\n```"
        "\n\n    python scripts/d.py\n"
    )
    found = [script_of(words) for words in commands(text)]
    assert found == [
        None,
        ["scripts/a.py", "--out", "x", "b c"],
        ["scripts/b.py"],
        ["scripts/c.py"],
        ["scripts/d.py"],
    ]


def quick_path() -> list[list[str]]:
    scripts = map(script_of, commands((ROOT / "README.md").read_text()))
    return [words for words in scripts if words is not None]


@pytest.mark.slow  # CI has test_scripts.py, and test_commands for every command line
def test_the_readme_from_top_to_bottom(
    user_folder: Path,
    run_script: Callable[[list[str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Word for word, with tiny configs of the same names; then blocks that read its runs."""
    for words in quick_path():
        run_script(words)
        capsys.readouterr()
    assert (user_folder / "merged" / "model.safetensors").is_file()
    assert len((user_folder / "answers.jsonl").read_text().splitlines()) == 1
    pages = list(filter(needs_runs, FILES))
    assert pages
    for path in pages:
        check_notebook(run_notebook(blocks(path.read_text(), "python")))


ENCODERS = ("bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2")


@pytest.mark.slow
def test_the_page_of_scripts_from_pretraining_on(
    user_folder: Path,
    run_script: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In order, with tiny configs of the same names, and runs of ours for models of the hub."""
    text = (ROOT / "scripts" / "README.md").read_text()
    chosen = text[text.index("\n## Pretraining") : text.index("\n## Sweeps")]
    for words in filter(None, map(script_of, commands(chosen))):
        if not any(word.startswith("dslim/") for word in words):
            monkeypatch.setattr("sys.stdin", io.StringIO("\n"))  # ends a chat
            run_script(["runs/quickstart" if word in ENCODERS else word for word in words])
    made = ("filled.jsonl", "measured/eval.json", "vectors.npy", "test.hyp", "adapter/README.md")
    assert [name for name in made if not (user_folder / name).is_file()] == []


def run_notebook(sources: list[str]) -> Any:
    """Each in a cell, in a kernel of its own in the working directory; with what they show."""
    import nbclient  # here, so that the other tests of this file run without
    import nbformat

    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the kernel's client
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env=env)
    return notebook


def check_notebook(notebook: Any) -> None:
    """Training shows one line of progress, which is that of its end, and one plot."""
    (cell,) = [cell for cell in notebook.cells if "finetune(" in cell.source]
    shown = [output["data"] for output in cell.outputs if "data" in output]
    bars = [one["text/plain"] for one in shown if one["text/plain"].startswith("━")]
    assert len(bars) == 1, shown
    assert re.match("━{20} step 2/2 · 100% · loss ", bars[0])
    assert sum("image/png" in one for one in shown) == 1
    printed = "".join(one["text/plain"] for one in shown)
    assert printed.count("validation loss") == 2


@pytest.mark.slow
def test_the_readme_from_top_to_bottom_with_its_own_configs(tmp_path: Path) -> None:
    write_data(tmp_path)
    for folder in ("configs", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)}
    for words in quick_path():
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
