"""The thresholds of a run's labels: chosen when training ends, and kept in a file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.errors import InputError, note
from jaxlm.runs.folder import read_json
from jaxlm.runtime.storage import StoragePath, write_whole

THRESHOLDS = "thresholds.json"


def write(directory: StoragePath, steps: Sequence[int], chosen: Mapping[str, float]) -> None:
    """Keep those that were chosen for the checkpoint of a step, or the mean of several."""
    found = {"steps": list(steps), "thresholds": dict(chosen)}
    write_whole(directory / THRESHOLDS, json.dumps(found))


def read(task: Any, directory: StoragePath, steps: Sequence[int]) -> Any:
    """The task with those that were chosen for the checkpoints of these steps, if they were yet."""
    path = directory / THRESHOLDS
    if not path.exists():
        return task
    found = read_json(path)
    try:
        if not isinstance(found.get("thresholds"), dict):  # as they were written before
            return task.with_thresholds(found)
        if found["steps"] == list(steps):
            return task.with_thresholds(found["thresholds"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    note(
        f"{path} holds thresholds of the checkpoints of steps {found['steps']}, and those read are "
        f"of {list(steps)}: 0.5 is taken for all; a run chooses them where its training ends"
    )
    return task
