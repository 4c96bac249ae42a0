"""The thresholds of a run's labels: chosen when training ends, and kept in a file."""

from typing import Any

from jaxlm.errors import InputError
from jaxlm.runs.folder import read_json
from jaxlm.runtime.storage import StoragePath

THRESHOLDS = "thresholds.json"


def read(task: Any, directory: StoragePath) -> Any:
    """The task with those that were chosen, if they were yet."""
    path = directory / THRESHOLDS
    try:
        return task.with_thresholds(read_json(path)) if path.exists() else task
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
