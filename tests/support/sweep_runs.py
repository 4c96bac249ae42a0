"""Run folders for sweeps that train nothing."""

import json

from jaxlm.config import Config
from jaxlm.train.restore import seal


def leave_run(
    config: Config, evaluations: dict[int, dict[str, float]], newest: int, base: str = "a"
) -> None:
    """What training leaves in a run folder, as far as a sweep reads it."""
    meta = config.directory / "checkpoints" / str(newest) / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    (meta / "metadata").write_text(json.dumps(seal({"cursor": {"base_sha256": base}})))
    lines = [
        {"step": step, **{f"eval/{name}": x for name, x in metrics.items()}}
        for step, metrics in evaluations.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (config.directory / "metrics.jsonl").write_text(text)
