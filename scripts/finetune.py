"""Fine-tune an encoder on labelled data: ``python scripts/finetune.py configs/quickstart_lora.py``.

Every field of the config can be changed behind it, such as ``--tuning.rank 16`` or ``--tuning
Full``; put ``--help`` there for all of them. The same command resumes an
interrupted run.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

from shlex import quote  # noqa: E402  (the allocator is settled before JAX starts)

import jax  # noqa: E402  (the allocator is settled before JAX starts)

from jaxlm.config import FinetuneConfig  # noqa: E402
from jaxlm.data.labelled.records import JsonLines  # noqa: E402
from jaxlm.runs import command_line, finetuning  # noqa: E402
from jaxlm.runtime.distributed import joined  # noqa: E402

if __name__ == "__main__":
    with joined():
        wanted = command_line.load(FinetuneConfig)
        directory = finetuning.finetune(wanted)
        if jax.process_index() == 0:
            source, usage = wanted.data.train, wanted.task.usage
            if isinstance(source, JsonLines):  # a hint that works as it is
                usage = usage.replace("FILE.jsonl", quote(source.path))
            print(
                f"in {directory}: loss.png, metrics.jsonl, checkpoints. Try\n"
                f"  python scripts/evaluate.py {quote(str(directory))}\n"
                f"  python scripts/predict.py {quote(str(directory))} {wanted.task.verb} "
                f"{usage}"
            )
