"""From the name of a model to a folder: one that exists, or a download from the hub."""

import hashlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.convert.flax_msgpack import WEIGHTS as OLD
from jaxlm.errors import InputError

FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",  # whether that is lower-cased
    "added_tokens.json",
    "modules.json",  # and what else a sentence encoder has
    "*_*/config.json",
    "*_*/model.safetensors",
    "*sentence*.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_TIMEOUT = 5.0  # seconds
_CLOCKS = 60.0  # seconds that those of a file system may be behind


def find(name_or_path: str | Path, cache: str | Path | None = None) -> Path:
    """The folder of that path; if there is none, the model of that name, downloaded once.

    ``cache`` is the folder that keeps downloads; None, the one of ``huggingface_hub``.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file: give the folder that holds {FILES[0]}")
    looks_like_path = str(name_or_path).startswith((".", "/", "~"))
    if looks_like_path or (path.parent != Path() and path.parent.exists()):
        raise InputError(f"there is no folder {path.absolute()}")
    return _download(str(name_or_path), cache)


def _download(name: str, cache: str | Path | None) -> Path:
    # Only here: it takes a while to import, and a local folder does not need it.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    failure, start = None, time.time()
    patterns: list[str] = list(FILES)
    try:
        # Asked first, because the download waits for an answer without a limit.
        info = _within(_TIMEOUT, lambda: HfApi().model_info(name, timeout=_TIMEOUT))
        names = [one.rfilename for one in getattr(info, "siblings", None) or ()]
        if not any(name.endswith(".safetensors") for name in names):
            patterns.append(OLD)
    except Exception as error:  # the HTTP client's are of no class that the hub's package names
        failure = error
    try:
        folder = snapshot_download(
            name,
            cache_dir=cache,
            allow_patterns=patterns,
            local_files_only=failure is not None,
        )
    except Exception as error:
        failure = failure or error
        if isinstance(failure, HFValidationError | RepositoryNotFoundError):
            raise InputError(
                f"{name!r} is neither a folder nor a model that you can read on the hub: "
                "check the name"
            ) from error
        reason = str(failure).partition("\n")[0].rstrip(".") or type(failure).__name__
        raise InputError(
            f"{name!r} is neither a folder nor in the cache, and cannot be downloaded ({reason}): "
            f"fetch it on a machine with a network, with 'hf download {name}', and give the "
            "folder; a run of your own must be trained first, or --base must give its path"
        ) from error
    _check(Path(folder), start - _CLOCKS)
    return Path(folder)


def _check(folder: Path, since: float) -> None:
    """Raise where a file that has come since then is not what its name in the cache says.

    That is the sha256 of large ones; ``huggingface_hub`` compares sizes alone.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not re.fullmatch("[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < since:
            continue
        with blob.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != blob.name:
            blob.unlink()
            path.unlink(missing_ok=True)
            raise InputError(
                f"{path.name} was damaged on its way from the hub and is removed (its sha256 is "
                f"{digest[:12]}…, not {blob.name[:12]}…): run this again"
            )


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns; raises where that takes longer.

    A time limit of the connection's alone would hold for each address of the host anew.
    """
    returned: list[Any] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            returned.append(call())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)  # which does not hold up the end
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return returned[0]
