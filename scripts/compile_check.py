"""Compile a train step for chips you do not have: ``python scripts/compile_check.py CONFIG ...``.

    pip install "jaxlm[tpu]"  # or, for GPUs, "jax[cuda12-local]"
    python scripts/compile_check.py configs/bert_base.py --topology v5e:16x16 \\
        --mesh.fsdp 8 --mesh.tensor 4
    python scripts/compile_check.py configs/bert_base.py --topology v5e:4x4 --search

Says whether it fits, what it sends and what that costs at least; exits with 1 where it does not
fit. Put --help behind it for all options.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported


from jaxlm.compile_check import command
from jaxlm.errors import report_input_errors
from jaxlm.runtime.console import make_console

if __name__ == "__main__":
    with report_input_errors():
        asked, config = command.load(command.CheckConfig)
        fits = command.run_check(asked, config, make_console())
        raise SystemExit(0 if fits else 1)
