"""An architecture and an objective of one's own: a file each, and two edits besides."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from xla_flags import xla_flags

ROOT = Path(__file__).parent.parent
TOY = ROOT / "tests" / "support" / "toy"
# What README tells who adds a model or a task: the unions of config.py, the rows of sharding.AXES.
EDITS = {
    "config.py": [
        ("Model = (\n", "Model = (\n    ToyConfig |"),
        ("PretrainingTask = MaskedLm", "PretrainingTask = MaskedLm | NextToken"),
        (
            "from jaxlm.errors import InputError\n",
            "from jaxlm.errors import InputError\n"
            "from jaxlm.models.toy import ToyConfig\n"
            "from jaxlm.tasks.toy import NextToken\n",
        ),
    ],
    "sharding.py": [
        (
            '    (r"head/bias", "vocab"),\n',
            '    (r"head/bias", "vocab"),\n'
            '    (r"blend/kernel", "embed -> embed_out"),\n'
            '    (r"blend/bias", "norm"),\n',
        )
    ],
}


def test_a_model_and_an_objective_are_a_file_each_and_two_edits(tmp_path: Path) -> None:
    library = tmp_path / "library" / "jaxlm"
    shutil.copytree(ROOT / "jaxlm", library, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(TOY / "model.py", library / "models" / "toy.py")
    shutil.copyfile(TOY / "task.py", library / "tasks" / "toy.py")
    for name, edits in EDITS.items():
        text = (library / name).read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{old!r} in {name}"
            text = text.replace(old, new)
        (library / name).write_text(text)
    paths = [str(library.parent), str(ROOT / "tests" / "support")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": xla_flags(4),
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "",  # the scripts' start again is for runs
    }
    done = subprocess.run(
        [sys.executable, str(TOY / "journey.py"), str(tmp_path), str(ROOT / "scripts")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pretraining"][-1] < 0.8 * found["pretraining"][0]
    assert found["fine-tuning"][-1] < 0.5 * found["fine-tuning"][0]
    assert "loss" in found["pretrained evaluated"]
    assert "accuracy           1.0000" in found["tuned evaluated"]
    assert len(found["pretrained used"].split()) == 5
    assert found["tuned used"].split()[1] == "1"
    assert min(found["pretraining flops"], found["fine-tuning flops"]) > 0
