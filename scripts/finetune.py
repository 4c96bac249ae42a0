"""Fine-tune an encoder on labelled data: ``python scripts/finetune.py configs/quickstart_lora.py``.

Every field of the config can be changed behind it, such as ``--tuning.rank 16`` or ``--tuning
Full``; put ``--help`` there for all of them. The same command resumes an
interrupted run.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
from shlex import quote

import jax

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.records import JsonLines, first_path
from jaxlm.runs import command_line, finetuning
from jaxlm.runtime.distributed import joined
from jaxlm.runtime.storage import StoragePath


def hints(config: FinetuneConfig, directory: StoragePath) -> tuple[str, str]:
    """Commands that work as they are: to evaluate the run, and to use it."""
    task, source, run = config.task, config.data.train, quote(str(directory))
    usage = task.usage
    if isinstance(source, JsonLines):
        usage = usage.replace("FILE.jsonl", quote(first_path(source.path)))
    return (
        f"python scripts/evaluate.py {run}",
        f"python scripts/predict.py {run} {task.verb} {usage}",
    )


if __name__ == "__main__":
    with joined():
        wanted = command_line.load(FinetuneConfig)
        directory = finetuning.finetune(wanted)
        if jax.process_index() == 0:
            print(f"in {directory}: loss.png, metrics.jsonl, checkpoints. Try")
            print(*(f"  {hint}" for hint in hints(wanted, directory)), sep="\n")
