import threading
from pathlib import Path
from types import SimpleNamespace

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
