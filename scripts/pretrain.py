"""Pretrain by filling in text: ``python scripts/pretrain.py configs/quickstart.py``.

Every field of the config can be changed behind it, such as ``--optimizer.peak-lr 3e-4``; put
``--help`` there for all of them. The same command resumes an interrupted run.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

import jax  # noqa: E402  (the allocator is settled before JAX starts)

from jaxlm.config import PretrainConfig  # noqa: E402
from jaxlm.runs import command_line, pretraining  # noqa: E402
from jaxlm.runtime.distributed import joined  # noqa: E402

if __name__ == "__main__":
    with joined():
        wanted = command_line.load(PretrainConfig)
        directory = pretraining.pretrain(wanted)
        if jax.process_index() == 0:
            print(
                f"in {directory}: loss.png, metrics.jsonl, checkpoints. Try\n"
                f"  python scripts/predict.py {directory} {wanted.task.verb} {wanted.task.usage}\n"
                f"  python scripts/evaluate.py {directory}"
            )
