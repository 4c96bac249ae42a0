"""Reading files of text, with errors that name the file and the line."""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import BinaryIO

from jaxlm.errors import InputError
from jaxlm.runtime.storage import on_disk

OnRead = Callable[[int], None]  # told the number of bytes just read, for a progress bar
_HEAD = 1 << 16
_NO_TEXT = re.compile(rb"[\x01-\x08\x0e-\x19\x1b-\x1f\x7f]")
_UNPACK = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_UNPACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_PACKED = (".gz", ".bz2", ".xz")
_BOMS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
PARQUET, ARROW, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_TABLE = "read it as JSON lines are read: source jsonl, or JsonLines in a configuration"
_SPLITS = "dataset_dict.json"  # what `datasets` writes by save_to_disk beside the tables
_ABOUT = ("dataset_info.json", "state.json")
_BINARY = {  # first bytes: what a file is, and the way out
    PARQUET: ("a Parquet table", _TABLE),
    ARROW: ("an Arrow table", _TABLE),
    ARROW_STREAM: ("an Arrow table", _TABLE),
    b"PK\x03\x04": ("a zip archive", "unpack it with python -m zipfile -e {path} FOLDER"),
    b"\xd0\xcf\x11\xe0": ("a document of Excel or Word", "save it there as CSV UTF-8 or as text"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it with zstd -dc {path} > {new}"),
    b"SQLite format 3": (
        "an SQLite database",
        "write a table of it with sqlite3 -header -csv {path} 'SELECT * FROM TABLE' > {table}",
    ),
    b"%PDF": ("a PDF", "write its text with pdftotext {path} {new}"),
    b"\x80\x03": ("a Python pickle", "write what it holds as JSON lines with Python"),
    b"\x80\x04": ("a Python pickle", "write what it holds as JSON lines with Python"),
    b"\x80\x05": ("a Python pickle", "write what it holds as JSON lines with Python"),
}


def ignore(_: int) -> None:
    """The :data:`OnRead` of those who do not watch."""


def find(pattern: str) -> list[Path]:
    """The file of that name, those of a folder, or those that match; sorted, and none is empty.

    Names that begin with . or _ in a folder are left out, as other programs do. Brackets are
    ordinary characters where nothing matches them as a pattern.
    """
    path = on_disk(pattern)
    try:
        found, is_folder = path.is_file(), path.is_dir()
        special = path.exists() and not (found or is_folder)
    except OSError as error:  # too long a name, or a folder that is closed
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if special:
        raise InputError(
            f"{path} is a pipe or a device, which can be read only once: write it into a file, or "
            "name the compressed file itself, which is read as it is"
        )
    if is_folder:
        names = [inner for inner in path.iterdir() if inner.name[0] not in "._"]
        if any(inner.name == _SPLITS for inner in names):
            splits = ", ".join(sorted(str(inner) for inner in names if inner.is_dir()))
            raise InputError(f"the folder {path} holds splits in folders: name one of {splits}")
        if any(inner.suffix == ".arrow" for inner in names):
            names = [inner for inner in names if inner.name not in _ABOUT]
    else:
        names = [path] if found else map(Path, _matching(path))
    paths = sorted(name for name in names if name.is_file())
    if not paths:
        if is_folder:
            raise InputError(f"the folder {path} holds no files; name another, or a pattern")
        if re.search(r"[*?[]", pattern):
            raise InputError(
                f"no file matches {pattern!r} (in {Path.cwd()}); check the path, and quote the "
                "pattern"
            )
        raise InputError(f"there is no file {pattern!r} (in {Path.cwd()}); check the path")
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; fill it, or leave it out of {pattern!r}")
    return paths


def _matching(path: Path) -> list[str]:
    folder = next(parent for parent in path.parents if parent.exists())  # as it is named
    rest = str(path.relative_to(folder))
    for pattern in (rest, rest.replace("[", "[[]")):
        if found := glob(str(Path(escape(str(folder)), pattern)), recursive=True):
            return found
    return []


def ending(path: Path) -> str:
    """Such as '.csv', also of a compressed file; in lower case."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def size(paths: list[Path]) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in paths)


def head(path: Path, encoding: str | None = None) -> bytes:
    """The first bytes, unpacked, and in UTF-8 where they are text."""
    with _reading(path), path.open("rb", buffering=_HEAD) as raw:
        data = _unpacked(raw).peek(_HEAD)
    encoding = encoding or _wide(data)
    return data if encoding is None else _decoder(encoding, data).encode()


def _decoder(encoding: str, data: bytes) -> str:
    try:
        return data.decode(encoding, "ignore").removeprefix("\ufeff")
    except LookupError as error:
        raise InputError(f"encoding {encoding!r} is not known; try windows-1252") from error


def lines(path: Path, on_read: OnRead = ignore, encoding: str | None = None) -> Iterator[str]:
    """The lines of a file of text, each without its end; a byte-order mark is dropped.

    Without an ``encoding`` it is UTF-8, or UTF-16 where the first bytes are. What gzip, bz2 or xz
    have compressed is unpacked.
    """
    with _reading(path), path.open("rb", buffering=_HEAD) as raw:
        yield from lines_of(raw, path, on_read, encoding)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is compressed, and damaged ({error}); copy it again") from error
    except IsADirectoryError as error:
        raise InputError(
            f"{path} is a folder, where one file is read: name a file in it"
        ) from error
    except FileNotFoundError as error:
        raise InputError(
            f"there is no file {str(path)!r} (in {Path.cwd()}); check the path"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def lines_of(
    raw: BinaryIO, path: Path, on_read: OnRead = ignore, encoding: str | None = None
) -> Iterator[str]:
    """The same of a stream that is open, which is read once."""
    file = _unpacked(raw)
    first = file.peek(_HEAD)
    refuse_binary(first, path)
    wide = encoding if (encoding or "").lower()[:6] in ("utf-16", "utf-32") else None
    wide = wide or (_wide(first) if encoding is None else None)
    source: Iterator[bytes] = iter(file)
    if wide is not None:
        source = _narrow(io.TextIOWrapper(file, wide, newline="\n"), path, wide)
        encoding = None
    elif b"\r" in first.rstrip(b"\r\n") and b"\n" not in first.rstrip(b"\r\n"):
        source = iter(io.BytesIO(file.read().replace(b"\r", b"\n")))  # as old Macs end their lines
    direct, done = file is raw and wide is None, 0
    for number, line in enumerate(source, start=1):
        if direct:
            on_read(len(line))
        elif on_read is not ignore:
            on_read(raw.tell() - done)
            done = raw.tell()
        line = line if line.endswith(b"\n") else line.removesuffix(b"\x1a")  # the end, to DOS
        if line:
            yield decode(line, path, number, encoding, first).rstrip("\r\n")


def _unpacked(raw: BinaryIO) -> io.BufferedReader:
    file = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)  # pyright: ignore
    for magic, unpack in _UNPACK.items():
        if file.peek(8).startswith(magic):
            return io.BufferedReader(unpack(file), _HEAD)  # pyright: ignore[reportArgumentType]
    return file


def _wide(first: bytes) -> str | None:
    """UTF-16 or UTF-32, if these are the first bytes of such a file."""
    for bom, name in _BOMS.items():
        if first.startswith(bom):
            return name
    pairs = max(len(first) // 2, 1)
    zeros = first[0::2].count(0), first[1::2].count(0)  # of ASCII: spaces alone are a tenth of text
    if min(zeros) == 0 and max(zeros) > 0.05 * pairs and len(first) % 2 == 0:
        # A few of them, in what is text without them, are in the text.
        if max(zeros) < 0.4 * pairs and _is_utf8(first):
            return None
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return None


def _is_utf8(first: bytes) -> bool:
    """Whether it is UTF-8, which may end within a character, of letters and the like."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(first)
    except UnicodeDecodeError:
        return False
    return not _NO_TEXT.search(first)


def _narrow(text: io.TextIOWrapper, path: Path, encoding: str) -> Iterator[bytes]:
    try:
        for line in text:
            yield line.encode(errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not {encoding} to its end ({error.reason})") from error
    finally:
        text.detach()  # who opened the file closes it


def refuse_binary(first: bytes, path: Path) -> None:
    """Say what a file is that holds no text."""
    found = next((rest for magic, rest in _BINARY.items() if first.startswith(magic)), None)
    if first[257:262] == b"ustar":
        found = "a tar archive", "unpack it with tar -xf {path}"
    elif b"[Content_Types].xml" in first[:4096]:
        found = "an Excel workbook or a Word document", "save it there as CSV UTF-8 or as text"
    if found is not None:
        if not path.is_file():
            raise InputError(f"{path} is {found[0]}, not text: write it into a file, and name that")
        new = path.with_suffix("") if path.suffix in (".zst", ".zstd") else _renamed(path)
        what, how = found
        names = {"path": path, "new": new, "table": path.with_name(f"{path.stem}_table.csv")}
        how = how.format_map({name: shlex.quote(str(value)) for name, value in names.items()})
        raise InputError(f"{path} is {what}, not text: {how}")


def _renamed(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_utf8")


def decode(
    raw: bytes, path: Path, number: int, encoding: str | None = None, others: bytes = b""
) -> str:
    """A line of a file of text; its number, and some of the ``others``, are for the error."""
    try:
        text = raw.decode(encoding or "utf-8")
        return text.removeprefix("\ufeff") if number == 1 else text
    except LookupError as error:
        raise InputError(f"encoding {encoding!r} is not known; try windows-1252") from error
    except UnicodeDecodeError as error:
        where = f"{path}:{number}: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        way_out = _recode(others + raw, path)
        raise InputError(f"{where} is not {encoding or 'UTF-8'}; {way_out}") from error


def _recode(content: bytes, path: Path) -> str:
    """What makes UTF-8 of a file with this content."""
    characters = content.decode(errors="replace")
    if sum(not c.isascii() for c in characters) > 2 * characters.count("\ufffd"):
        return f"correct the line, or drop such bytes{_iconv('-c -f utf-8 -t utf-8', path)}"
    try:
        content.decode("windows-1252")  # in latin1 its quotation marks are control characters
    except UnicodeDecodeError:
        return "set encoding to the one that it was written in"
    return (
        "set encoding to the one that it was written in, as often windows-1252, or convert it"
        f"{_iconv('-f windows-1252 -t utf-8', path)}"
    )


def _iconv(options: str, path: Path) -> str:
    """How: the command for a file, or what a pipe may go through."""
    if not path.is_file():
        return f" on its way, through iconv {options}"
    with path.open("rb") as file:
        magic = file.read(6)
    new = path.with_suffix("") if path.suffix in _PACKED else path
    old, new = shlex.quote(str(path)), shlex.quote(str(_renamed(new)))
    tool = next((name for start, name in _UNPACKERS.items() if magic.startswith(start)), None)
    if tool is not None:
        return f": {tool} -dc < {old} | iconv {options} > {new}"
    return f": iconv {options} {old} > {new}"


def given(*settings: str | None) -> list[str]:
    """Those that are not None: settings that came later leave older fingerprints as they were."""
    return [setting for setting in settings if setting is not None]


def sha256(paths: list[Path], *settings: str | None) -> str:
    """One digest of the files' contents, in order, and of how they are read."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
