"""Reading files of text, with errors that name the file and the line."""

import hashlib
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.runtime.storage import on_disk

OnRead = Callable[[int], None]  # told the number of bytes just read, for a progress bar


def ignore(_: int) -> None:
    """The :data:`OnRead` of those who do not watch."""


def find(pattern: str) -> list[Path]:
    """The files that match, sorted by path; none of them is empty."""
    on_disk(pattern)
    paths = [Path(name) for name in sorted(glob(pattern, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InputError(
            f"no file matches {pattern!r} (in {Path.cwd()}); check the path, and quote the pattern"
        )
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; fill it, or leave it out of {pattern!r}")
    return paths


def size(paths: list[Path]) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in paths)


def lines(path: Path, on_read: OnRead = ignore) -> Iterator[str]:
    """The lines of a UTF-8 file, each without its end; a byte-order mark is dropped."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                on_read(len(raw))
                yield decode(raw, path, number).rstrip("\r\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def decode(raw: bytes, path: Path, number: int) -> str:
    """A line of a UTF-8 file; the first one tells what the file is instead."""
    if number == 1:
        if raw.startswith(b"\x1f\x8b"):
            raise InputError(f"{path} is compressed; unpack it with gunzip")
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw[:2].count(0) == 1:
            raise InputError(f"{path} is UTF-16; convert it with iconv -f utf-16 -t utf-8")
        if b"\r" in raw.rstrip(b"\r\n") and not raw.endswith(b"\n"):
            raise InputError(f"the lines of {path} end in CR; convert it with tr '\\r' '\\n'")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: byte 0x{raw[error.start]:02x} at column {error.start + 1} is not "
            "UTF-8; convert the file, for example with iconv -f latin1 -t utf-8"
        ) from error


def sha256(paths: list[Path], *settings: str | None) -> str:
    """One digest of the files' contents, in order, and of how they are read."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
