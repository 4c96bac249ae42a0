"""Building a folder that appears only when complete, with a progress bar."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from jaxlm.data.files import OnRead
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, remove, upload


@contextmanager
def building(target: StoragePath, last: str | None = None) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place if all goes well, and else vanishes.

    For a target in a bucket, where nothing can be renamed, it is a temporary folder that is copied,
    its file ``last`` at the end. What errors say of the new folder names the target.
    """
    if not isinstance(target, Path):
        with TemporaryDirectory() as folder:
            yield Path(folder)
            if target.exists():
                remove(target)
            upload(Path(folder), target, last=last)
        return
    scratch = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        if target.exists():
            target.rename(replaced)
        scratch.rename(target)
    except (OSError, InputError) as error:
        said = str(error).replace(str(scratch), str(target))
        if isinstance(error, InputError):
            raise InputError(said) from error
        raise InputError(
            f"{target} cannot be written ({said}); make room there, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def say(console: Console | None, message: str) -> None:
    """Print, if there is a console."""
    if console is not None:
        console.print(message, highlight=False)


@contextmanager
def bar(console: Console | None, description: str, total: int | None) -> Iterator[OnRead]:
    """A progress bar, if there is a console; yields what moves it on by an amount."""
    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        task = progress.add_task(description, total=total)
        try:
            yield lambda amount: progress.advance(task, amount)
        except BaseException:
            progress.live.transient = True  # nothing stands between what was done and the error
            raise
