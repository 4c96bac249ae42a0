"""Draw what configs reach with few examples and with many: ``python scripts/learning_curve.py``.

    python scripts/learning_curve.py configs/sst2_bilstm.py configs/sst2_lora.py \\
        configs/sst2_full.py --sizes 8 32 128 512 1000 --seeds 3

The same command resumes where it was stopped; put --help behind it for all options.
"""

from pathlib import Path

from jaxlm.errors import report_input_errors
from jaxlm.sweep import curve
from jaxlm.sweep.process import processes

if __name__ == "__main__":
    with report_input_errors():
        asked, plans = curve.load()
        with processes(Path(__file__).parent) as run_trial:
            directory = curve.curve(asked, plans, run_trial)
        print(f"in {directory}: curve.md, curve.json, curve.png, and a folder for each config")
