import os
import subprocess
import sys

import pytest

REPORT = "from jaxlm.errors import report_input_errors\nwith report_input_errors():\n    "
PRINTS = "while True: print('a line')"
OTHER = "raise BrokenPipeError('a socket')"


@pytest.mark.parametrize(("body", "said"), [(PRINTS, ""), (OTHER, "BrokenPipeError: a socket")])
def test_only_output_that_nobody_reads_ends_without_a_word(body, said):
    command = [sys.executable, "-c", REPORT + body]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
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


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('a line')", "error: the output cannot be written: No space left on device"),
        (PRINTS, "error: the output cannot be written: No space left on device"),
        ("print('a line'); raise KeyboardInterrupt", "interrupted"),
        ("open('n' * 300)", f"error: {'n' * 300}: File name too long; name a shorter one"),
        ("raise OSError(5, 'a socket')", "OSError: [Errno 5] a socket"),
    ],
)
def test_full_disks_and_long_names_are_one_sentence(body, said):
    command = f"exec '{sys.executable}' -c \"$0\" {'> /dev/full' if 'line' in body else ''}"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.run(
        ["sh", "-c", command, REPORT + body],
        capture_output=True,
        text=True,
        check=False,
        env=buffered,
    )
    lines = process.stderr.splitlines()
    assert lines[-1] == said
    code = 130 if said == "interrupted" else 2
    assert (process.returncode, len(lines)) == (code, 1) or "Traceback" in lines[0]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_an_encoding_lacks_ends_nothing(encoding):
    body = "print('a cat \\U0001f600 \\u2501'); print('an end')"
    command = [sys.executable, "-c", REPORT + body]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"an end" in done.stdout
    plain = subprocess.run([sys.executable, "-c", body], env=env, capture_output=True)
    assert bool(plain.returncode) == (encoding != "utf-8")  # the control
