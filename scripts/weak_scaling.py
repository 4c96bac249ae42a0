"""Compile for ever more chips, the same rows on each: ``python scripts/weak_scaling.py CONFIG``.

    python scripts/weak_scaling.py configs/bert_base.py --rows 32 --plot weak_scaling.png

A table and a picture of what they send, and what that costs at least; no chip is needed. Put --help
behind it for all options.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported


from jaxlm.compile_check import command
from jaxlm.errors import report_input_errors
from jaxlm.runtime.console import make_console

if __name__ == "__main__":
    with report_input_errors():
        asked, config = command.load(command.ScalingConfig)
        command.run_scaling(asked, config, make_console())
        print(f"drawn in {asked.plot}")
