"""Compare choices of a config's fields over seeds: ``python scripts/sweep.py CONFIG --set ...``.

    python scripts/sweep.py configs/quickstart_lora.py \\
        --set optimizer.peak_lr=1e-3,3e-3 --set tuning.rank=4,8 --seeds 3
    python scripts/sweep.py configs/quickstart_lora.py \\
        --set optimizer.peak_lr=1e-4..1e-2:log --set tuning.rank=2..32:log --random 20 --halving 3

Every trial is a run folder. The same command resumes where it was stopped.
"""

from pathlib import Path

from jaxlm.errors import report_input_errors
from jaxlm.sweep import sweep
from jaxlm.sweep.process import processes

if __name__ == "__main__":
    with report_input_errors():
        plan = sweep.load()
        with processes(Path(__file__).parent) as run_trial:
            directory = sweep.sweep(plan, run_trial)
        print(f"in {directory}: sweep.md, sweep.json, sweep.png, and a run folder for each trial")
