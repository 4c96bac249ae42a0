"""Run folders for sweeps that train nothing."""

import json

from jaxlm.config import Config


def leave_run(config: Config, evaluations: dict[int, dict[str, float]], newest: int) -> None:
    """What training leaves in a run folder, as far as a sweep reads it."""
    (config.directory / "checkpoints" / str(newest)).mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, **{f"eval/{name}": x for name, x in metrics.items()}}
        for step, metrics in evaluations.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (config.directory / "metrics.jsonl").write_text(text)
