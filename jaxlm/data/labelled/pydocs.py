"""The documentation of Python or a package as a labelled data set: which topic a text is about."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxlm.data import files, pydocs
from jaxlm.data.labelled.records import Record

# Packages and modules of the standard library, by what they are for.
TOPICS: dict[str, tuple[str, ...]] = {
    "concurrency": (
        "asyncio",
        "concurrent",
        "multiprocessing",
        "queue",
        "sched",
        "selectors",
        "subprocess",
        "threading",
    ),
    "data types": (
        "_pydatetime",
        "_pydecimal",
        "bisect",
        "calendar",
        "collections",
        "copy",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "heapq",
        "numbers",
        "random",
        "statistics",
        "types",
        "typing",
        "weakref",
    ),
    "files": (
        "_pyio",
        "bz2",
        "fileinput",
        "genericpath",
        "glob",
        "gzip",
        "lzma",
        "os",
        "pathlib",
        "posixpath",
        "shutil",
        "tarfile",
        "tempfile",
        "zipfile",
    ),
    "network": (
        "email",
        "ftplib",
        "http",
        "imaplib",
        "mailbox",
        "poplib",
        "smtplib",
        "socket",
        "socketserver",
        "ssl",
        "urllib",
        "wsgiref",
        "xmlrpc",
    ),
    "program text": ("ast", "dis", "importlib", "inspect", "pdb", "pkgutil", "pydoc", "tokenize"),
    "testing": ("doctest", "unittest"),
    "text": ("csv", "difflib", "html", "json", "re", "string", "textwrap", "xml"),
    "user interface": ("cmd", "curses", "tkinter", "turtle"),
}


@dataclass(frozen=True, kw_only=True)
class PyDocsTopics:
    """Docstrings of the running interpreter (``text``), labelled by where they stand (``topic``).

    Nothing to download; it differs a little between versions of Python. Texts of fewer than
    ``min_words`` words say too little to be told apart.
    """

    min_words: int = 6
    package: str | None = None
    """An installed package, such as scipy, whose docstrings are read instead; their topics are its
    subpackages. None = Python's own."""

    def records(self) -> Iterator[Record]:
        """One for each docstring of a module that belongs to a topic."""
        topic_of = {name: topic for topic, names in TOPICS.items() for name in names}
        for path, texts in pydocs.by_module(self.package):
            first = path.parts[0].removesuffix(".py")
            if self.package is None:
                topic = topic_of.get(first)
            else:
                topic = None if len(path.parts) < 2 or first.startswith("_") else first
            for number, text in enumerate(texts if topic else (), start=1):
                if len(text.split()) >= self.min_words:
                    origin = f"{path.as_posix()}, docstring {number}"
                    yield Record(fields={"text": text, "topic": topic}, origin=origin)

    def fingerprint(self) -> str:
        """A sha256 of the modules' contents."""
        modules = pydocs.modules(self.package)
        return files.sha256(modules, "topics", str(self.min_words), repr(TOPICS))
