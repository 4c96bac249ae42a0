import subprocess
import sys

import pytest

PRINTS = "while True: print('a line')"
OTHER = "raise BrokenPipeError('a socket')"


@pytest.mark.parametrize(("body", "said"), [(PRINTS, ""), (OTHER, "BrokenPipeError: a socket")])
def test_only_output_that_nobody_reads_ends_without_a_word(body, said):
    source = (
        f"from jaxlm.errors import report_input_errors\nwith report_input_errors():\n    {body}"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", source], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    if said == "":
        process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 1
    assert error.strip().endswith(said)
    assert bool(error) == bool(said)
    process.stdout.close()
    process.stderr.close()
