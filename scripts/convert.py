"""Read a published model, and write it anew: ``python scripts/convert.py FOLDER new``.

BERTs and their kin, ModernBERT, GPT-2, Llama, T5 and XLNet, with the heads that are known here,
also from the old Flax classes of transformers. What comes out is safetensors in float32, in the
layout that transformers and sentence-transformers read. ``--dry-run`` writes nothing: it shows
which tensor becomes which parameter, and everything that does not fit.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
from pathlib import Path
from typing import Annotated

import tyro

from jaxlm.convert import hub, huggingface, report
from jaxlm.errors import InputError, report_input_errors


def main(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path | None, tyro.conf.Positional] = None,
    /,
    dry_run: bool = False,
) -> None:
    """Convert one folder.

    Args:
        source: A folder in Hugging Face's layout, or a name on the hub.
        out: The new folder.
        dry_run: Show the mapping, and all that does not fit, and write nothing.
    """
    path = hub.find(source)
    if dry_run:
        found = report.read(path)
        print(*found.rows, *found.others, sep="\n")
        for difference in found.differences:
            print(f"does not fit: {difference}")
        print(f"{len(found.rows)} parameters, {len(found.differences)} that do not fit")
        raise SystemExit(1 if found.differences else 0)
    if out is None:
        raise InputError("name a new folder, or give --dry-run")
    published = huggingface.unread(path)
    head = published.head or {
        **(published.lm_head or {}),
        **({"pooler": published.pooler} if published.pooler else {}),
    }
    says = published.sentence_encoder
    if says is not None and (says.beyond_pooling or not says.normalized):
        raise InputError(
            f"{path} makes vectors with {says.beyond_pooling or 'no scaling to length 1'}, which "
            "cannot be written here: use the folder as it is"
        )
    huggingface.save(
        out,
        {**published.params, **({"head": head} if head else {})},
        published.config,
        published.tokenizer,
        pooling=says.pooling if says else None,
        prompts=says.prompts if says else None,
        default_prompt_name=says.default_prompt_name if says else None,
        max_length=says.max_length if says else None,
        truncate_dim=says.truncate_dim if says else None,
        task_head=published.task_head,
    )
    print(f"{source} is in {out}")


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
