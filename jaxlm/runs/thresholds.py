"""The thresholds of a run's labels: chosen when training ends, and kept in a file."""

import json
from collections.abc import Mapping
from dataclasses import replace

from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath
from jaxlm.tasks.classification import Classification

THRESHOLDS = "thresholds.json"


def read(task: Classification, directory: StoragePath) -> Classification:
    """With those that were chosen, if they were yet."""
    path = directory / THRESHOLDS
    try:
        return replace(task, thresholds=given(json.loads(path.read_text())))
    except FileNotFoundError:
        return replace(task, thresholds=())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def given(thresholds: Mapping[str, float]) -> tuple[str, ...]:
    """As :attr:`jaxlm.tasks.classification.Classification.thresholds` has them."""
    return tuple(f"{label}={value!r}" for label, value in thresholds.items())
