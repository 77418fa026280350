"""Each main answers errors, interrupts and closed pipes in one way."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmshearing.commands import parser, run
from llmshearing.errors import ShearingError, Stopped

ROOT = Path(__file__).resolve().parent.parent


def failing(error):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ShearingError("key = 1, must be 2"), 1, "error: key = 1, must be 2"),
        (Stopped("saved"), 75, "error: saved"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 1, "x.json"),
    ],
)
def test_an_error_is_one_line_and_its_code(error, code, said, caplog):
    assert run(failing(error)) == code
    (record,) = caplog.records
    assert said in record.getMessage() and record.levelno == logging.ERROR and record.exc_info is None


def test_a_code_of_its_own_is_kept():
    assert [run(lambda: 0), run(lambda: 3)] == [0, 3]


def test_what_nobody_expects_keeps_its_traceback(caplog):
    with pytest.raises(KeyError):
        run(failing(KeyError("x")))
    with pytest.raises(PermissionError):
        run(failing(PermissionError()), expected=(ShearingError,))
    assert not caplog.records


def test_a_pipe_that_is_not_the_output_is_an_error(caplog):
    assert run(failing(BrokenPipeError(32, "Broken pipe"))) == 1
    assert "Broken pipe" in caplog.text


def start(code: str, **pipes) -> subprocess.Popen:
    words = [sys.executable, "-c", f"import sys, time\nfrom llmshearing.commands import run\n{code}"]
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("lines", [1, 100_000], ids=["seen at the end", "seen in the middle"])
def test_output_that_nobody_reads_ends_quietly(lines):
    code = f"time.sleep(0.5)\nsys.exit(run(lambda: sys.stdout.write('line\\n' * {lines}) * 0))"
    process = start(code)
    process.stdout.close()  # as `head` does; the process writes later
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, "")


def test_an_interrupt_ends_quietly():
    process = start("def work():\n  print('ready', flush=True)\n  time.sleep(60)\nsys.exit(run(work))")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


def test_the_log_goes_to_standard_error():
    process = start("import logging\nsys.exit(run(lambda: logging.getLogger('x').info('told') or 0))")
    assert process.communicate(timeout=60) == ("", "told\n") and process.returncode == 0


def test_help_keeps_the_lines_of_the_examples():
    text = parser("python -m x", "Do x.", "x a \\\n    --b c\nx d").format_help()
    assert text.endswith("examples:\n  x a \\\n      --b c\n  x d\n") and "Do x." in text
    assert parser("python -m x", "Do x.", "x a").format_help().endswith("example:\n  x a\n")
