import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from jaxlm.convert import hub, huggingface
from jaxlm.errors import InputError


@pytest.fixture
def asked(monkeypatch):
    """Whom the hub was asked for, and for how long: there is no network."""
    calls = []

    def model_info(self, name, *, timeout):
        huggingface_hub.utils.validate_repo_id(name)
        calls.append((name, timeout))
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return calls


def test_a_folder_is_used_before_all(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert hub.find("org/name") == Path("org/name")
    assert hub.find(tmp_path / "org") == tmp_path / "org"
    assert asked == []


@pytest.mark.parametrize("name", ["./name", "/nowhere/name", "~/nowhere/name", "models/name", ".."])
def test_what_looks_like_a_path_is_never_downloaded(name, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    if name == "..":
        assert hub.find(name) == Path("..")
    else:
        with pytest.raises(InputError, match=r"^there is no folder /.*name$"):
            hub.find(name)
    assert asked == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match=r"config.json is a file: give the folder"):
        hub.find(tmp_path / "config.json")


def test_without_a_network(tmp_path, asked):
    with pytest.raises(InputError) as raised:
        huggingface.load("org/name", cache=tmp_path / "cache")
    assert str(raised.value) == (
        "'org/name' is neither a folder nor in the cache, and cannot be downloaded (no route to "
        "host): fetch it on a machine with a network, with 'hf download org/name', and give the "
        "folder; a run of your own must be trained first, or --base must give its path"
    )
    ((name, timeout),) = asked
    assert name == "org/name"
    assert timeout <= 5


def test_a_network_that_does_not_answer(monkeypatch, tmp_path):
    never = threading.Event()
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, name, *, timeout: never.wait()
    )
    monkeypatch.setattr(hub, "_TIMEOUT", 0.05)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no answer within 0\.05 s\)"):
        hub.find("org/name", tmp_path)
    never.set()


@pytest.mark.parametrize("files", [["flax_model.msgpack"], ["model.safetensors"], []])
def test_an_old_flax_checkpoint_is_taken_where_there_is_nothing_else(files, monkeypatch, tmp_path):
    def snapshot_download(name, *, allow_patterns, **options):
        assert ("flax_model.msgpack" in allow_patterns) == ("model.safetensors" not in files)
        return str(tmp_path)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, *, timeout: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find("org/name", tmp_path) == tmp_path


def test_without_a_network_but_downloaded_before(tmp_path, asked):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert hub.find("org/name", tmp_path) == snapshot
    assert len(asked) == 1


def test_names_that_cannot_be(asked, tmp_path):
    for name in ("a/b/c", "bad name!"):
        with pytest.raises(InputError, match="neither a folder nor a model that you can"):
            hub.find(name, tmp_path)


def test_names_that_nobody_has(monkeypatch, tmp_path):
    def model_info(self, name, *, timeout):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(InputError, match=r"^'org/name' is neither .* check the name$"):
        hub.find("org/name", tmp_path)


def test_a_download_takes_what_is_read_and_no_more(monkeypatch, tmp_path):
    def snapshot_download(name, *, cache_dir, allow_patterns, local_files_only):
        there = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
        there += ["pytorch_model.bin", "onnx/model.safetensors", "tf_model.h5", "vocab.txt"]
        taken = huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns)
        assert set(taken) == {*there[:3], "vocab.txt"}
        assert (name, local_files_only) == ("org/name", False)
        return str(cache_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, *, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find("org/name", tmp_path) == tmp_path


def test_a_download_that_breaks_off(monkeypatch, tmp_path):
    def snapshot_download(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, *, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"cannot be downloaded \(TimeoutError\)"):
        hub.find("org/name", tmp_path)


COMMIT = "1" * 40
WEIGHTS = bytes(range(256)) * 4096


class FakeHub(http.server.BaseHTTPRequestHandler):
    """A hub with one model, which breaks off in the middle of its weights."""

    protocol_version = "HTTP/1.1"
    sent = WEIGHTS
    ranges: ClassVar[list[str | None]]

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.rpartition("/")[2].partition("?")[0]
        content = {"config.json": b"{}", "model.safetensors": self.sent}.get(name)
        if self.path.startswith("/api/"):
            files = [{"rfilename": name} for name in ("config.json", "model.safetensors")]
            content = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode()
            if "/tree/" in self.path:
                listed = [{"type": "file", "path": f["rfilename"], "oid": "0" * 40} for f in files]
                content = json.dumps([x | {"size": 2} for x in listed]).encode()
        if content is None:
            self.send_error(404)
            return
        asked = self.headers["Range"]
        begin = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        large = name == "model.safetensors"
        digest = hashlib.sha256(WEIGHTS).hexdigest() if large else "2" * 40
        for key, value in {
            "Content-Length": len(content) - begin,
            "Content-Type": "application/json",
            "ETag": f'"{digest}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": len(content),
            "Accept-Ranges": "bytes",
            **(
                {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
                if asked
                else {}
            ),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = large and not self.ranges
        if large:
            self.ranges.append(asked)
        self.wfile.write(content[begin : len(content) // 2 if breaks else None])
        self.close_connection = True


@pytest.fixture
def served(monkeypatch) -> Iterator[type[FakeHub]]:
    handler = type("Handler", (FakeHub,), {"ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield handler
    server.shutdown()
    server.server_close()


def test_a_download_is_resumed_and_kept(served, tmp_path, monkeypatch):
    folder = hub.find("org/name", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    whole, rest = served.ranges
    assert whole is None
    assert int(rest.removeprefix("bytes=").rstrip("-")) > 0  # what had come was not sent again
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.find("org/name", tmp_path) == folder  # of the cache
    assert len(served.ranges) == 2


def test_what_was_damaged_on_its_way_is_removed(served, tmp_path):
    served.sent = WEIGHTS[:-1] + b"?"
    served.ranges.append(None)  # does not break off
    with pytest.raises(InputError, match=r"model.safetensors was damaged on its way from the hub"):
        hub.find("org/name", tmp_path)
    served.sent = WEIGHTS
    assert (hub.find("org/name", tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
