"""Merge a run's adapters into its encoder: ``python scripts/merge_lora.py runs/x merged``.

The folder that comes out is a published encoder's in Hugging Face's layout, with its tokenizer: a
base for further fine-tuning here, or a model for other libraries. A task's head that transformers
has comes with it, and is opened as that task's class; another, or one that pools otherwise, is left
behind, which is said (one over the vocabulary is the base's, and stays). What its answers depend on
beside weights, such as thresholds, is under "jaxlm" in the folder's config.json, which only jaxlm
reads. A RoBERTa comes out as the BERT that computes the same, and what was tuned for embeddings as
a sentence encoder. A README says what it was trained on, and what was measured. A pretrained run
has nothing to merge, and comes out with its head over the vocabulary, if it has one.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxlm.config import PretrainConfig
from jaxlm.convert import huggingface
from jaxlm.errors import report_input_errors
from jaxlm.peft import tuning
from jaxlm.runs import base as bases
from jaxlm.runs import finetuned, model_card
from jaxlm.runs.folder import read_any_config
from jaxlm.runs.task_head import publish
from jaxlm.runtime.storage import locate
from jaxlm.tasks.embedding import Embedding


def main(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    step: int | None = None,
    base: str | None = None,
) -> None:
    """Write the encoder with the run's adapters added, in float32.

    Args:
        run: The folder of a fine-tuned run, or of a pretrained one.
        out: The new folder.
        step: Which checkpoint; None = the best.
        base: The encoder of the adapter, if it has moved: a run folder, a folder or a hub name.
    """
    if isinstance(read_any_config(locate(run)), PretrainConfig):
        trained = bases.load(str(run), step=step)
        bases.save(trained, out)
        print(f"{run} at step {trained.step} is in {out}{trained.left_behind}")
        return
    loaded = finetuned.open_finetuned(run, step=step, base=base)
    merged = loaded.merged()
    lost = tuning.lost_in_bfloat16(loaded.variables["params"], merged)
    params = jax.tree.map(np.asarray, merged)
    model = loaded.config.model
    assert model is not None  # resolved
    task = loaded.task
    longest = loaded.framer.max_length
    head, said, left_out = publish(task, loaded.labels, params.get("head", {}), model, longest)
    head |= params.get("lm_head", {})
    kept = {"encoder": params["encoder"]} | ({"head": head} if head else {})
    embeds = isinstance(task, Embedding)
    huggingface.save(
        out,
        kept,
        model,
        loaded.tokenizer,
        pooling=(task.pooling or "mean") if embeds else None,
        prompts=task.prompts if embeds else None,
        default_prompt_name=next(iter(task.prompts), None) if embeds else None,  # of queries
        max_length=longest if embeds else None,
        task_head=said,
        card=model_card.write(loaded, run, left_out),
    )
    print(
        f"{run} at step {int(loaded.state.step)}, merged, is in {out}, in float32: rounded to "
        f"bfloat16 its weights would differ by {lost:.1%} of what was added{left_out}"
    )


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
