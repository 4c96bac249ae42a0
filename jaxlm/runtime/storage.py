"""Storage paths: on a disk, or in a bucket of Google Cloud Storage."""

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm.errors import InputError

StoragePath = Path | epath.Path
_PERIOD_S = 60.0


def locate(path: StoragePath | str) -> StoragePath:
    """A path on a disk (``~`` expanded), or one of ``gs://bucket/…`` as what reads and writes it.

    ``gs:/bucket``, which pathlib makes of that, is taken for it too.
    """
    text = os.fspath(path)
    scheme = re.match(r"(\w{2,}):/+", text)
    if scheme is None:
        return _expanded(text)
    if scheme[1] != "gs":
        raise InputError(
            f"{text}: {scheme[1]}:// is not supported; use gs://, or copy it to a disk"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{text} is in a bucket, which needs gcsfs: pip install 'jaxlm[gcs]'")
    return epath.Path(f"gs://{text[scheme.end() :]}")


def absolute(path: StoragePath) -> StoragePath:
    """The same path from any working directory."""
    return path.absolute() if isinstance(path, Path) else path


def without_patterns(path: StoragePath) -> StoragePath:
    """The same folder by a path that nobody takes for a pattern.

    Orbax looks for its own files with a glob, where ``[1]`` or a backslash in the name of any
    folder above them matches something else. Such a folder gets a link in the folder of temporary
    files, whose name is the same in all processes.
    """
    if not isinstance(path, Path) or not re.search(r"[\[\]*?\\]", str(path.absolute())):
        return path
    folder = Path(tempfile.gettempdir()) / f"jaxlm-{os.getuid()}"
    link = folder / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it is somebody else's")
        if link.is_symlink() and link.readlink() == path.absolute():
            return link
        fresh = folder / f"{link.name}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(path.absolute())
        os.replace(fresh, link)
    except OSError as error:
        raise InputError(
            f"{path} has characters that the checkpoint library takes for a pattern, and no link "
            f"to it can be made in {folder} ({error.strerror}): rename the folder, or set TMPDIR"
        ) from error
    return link


@contextlib.contextmanager
def whole(path: StoragePath) -> Iterator[Any]:
    """Write to the file that this yields: it replaces ``path`` once it is complete.

    In a bucket a file appears no earlier anyway, and a pipe is written to as it is.
    """
    if isinstance(path, Path):
        path = path.resolve()  # what a link names is replaced, not the link
    if not isinstance(path, Path) or (path.exists() and not path.is_file()):
        yield path
        return
    unfinished = path.with_name(f".{path.name}")  # the ending may decide the format, so it stays
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: StoragePath, text: str) -> None:
    """Write a file atomically; what UTF-8 has not, as in a file's name, becomes its escape."""
    text = text.encode(errors="backslashreplace").decode()
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def in_bucket(path: StoragePath) -> bool:
    """Whether it is in a bucket and not on a disk."""
    return not isinstance(path, Path)


def on_disk(path: StoragePath | str) -> Path:
    """The path, or :class:`InputError` where it is in a bucket."""
    text = os.fspath(path)
    if re.match(r"\w{2,}:/", text):
        raise InputError(
            f"{text} is in a bucket, which is not supported for this: name a folder on a disk, and "
            "copy it with gcloud storage cp -r"
        )
    return _expanded(text)


def _expanded(path: str) -> Path:
    """With the user's own folder for ``~``, as in a config, which no shell has expanded."""
    return Path(path).expanduser() if path == "~" or path.startswith("~/") else Path(path)


def size_of(file: StoragePath) -> int:
    """Size of a file, in bytes."""
    return file.stat().st_size if isinstance(file, Path) else file.stat().length


def remove(folder: StoragePath) -> None:
    """Delete a folder and all that is in it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.rmtree()


def upload(source: Path, target: StoragePath, *, last: str | None = None) -> None:
    """Copy all files below ``source``; the one named ``last`` shows that the others are there."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda file: file.name == last):
        with whole(target / file.relative_to(source).as_posix()) as unfinished:
            _copy(file, unfinished)


@contextlib.contextmanager
def mirrored(folder: StoragePath, *names: str) -> Iterator[Path]:
    """Where to write small files of ``folder``: itself on a disk, else a copy on the disk.

    Objects in a bucket cannot be appended to. So what is written goes there every minute, and at
    the end; of the files and folders that are there ``names`` are copied first. A kill loses what
    was written since.
    """
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch)
        for name in names:
            _download(folder / name, local / name)
        sent: dict[Path, tuple[int, int]] = {}
        _send_changed(local, folder, sent, only_note=True)
        over = threading.Event()

        def send_until_over() -> None:
            while not over.wait(_PERIOD_S):
                with contextlib.suppress(Exception):  # the next time, or the end, may be luckier
                    _send_changed(local, folder, sent)

        thread = threading.Thread(target=send_until_over, daemon=True)
        thread.start()
        try:
            yield local
        finally:
            over.set()
            thread.join()
            try:
                _send_changed(local, folder, sent)
            except Exception as error:  # gcsfs raises its own, too
                raise InputError(f"{folder} cannot be written ({error})") from error


def _send_changed(
    local: Path, folder: StoragePath, sent: dict[Path, tuple[int, int]], *, only_note: bool = False
) -> None:
    for path in sorted(local.rglob("*")):
        if path.is_file() and not path.name.startswith("."):  # those are not finished
            stat = path.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if sent.get(path) != state and not only_note:
                _copy(path, folder / path.relative_to(local).as_posix())
            sent[path] = state


def _copy(source: StoragePath, target: StoragePath) -> None:
    with _open(source, "rb") as reading, _open(target, "wb") as writing:
        shutil.copyfileobj(reading, writing)


def _open(path: StoragePath, mode: str) -> Any:
    return path.open(mode)


def _download(source: StoragePath, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True)
        for path in source.iterdir():
            _download(path, target / path.name)
    elif source.exists():
        _copy(source, target)
