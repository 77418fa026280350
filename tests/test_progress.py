"""Progress: one line that rewrites itself in a terminal, plain lines at intervals elsewhere."""

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from llmshearing.progress import AboveTheLine, tqdm, trange

WORK = """
import logging, sys, time
from llmshearing.progress import AboveTheLine, trange
logging.basicConfig(level="INFO", format="%(message)s", handlers=[AboveTheLine(sys.stderr)])
for i in trange(20, desc="counting", unit="thing"):
    time.sleep(0.03)
    if i == 10:
        logging.info("half of it")
"""


def test_a_file_gets_plain_lines_at_intervals(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSHEARING_PROGRESS_SECONDS", "0.2")
    with open(tmp_path / "log", "w") as file:
        subprocess.run([sys.executable, "-c", WORK], stderr=file, check=True)
    text = (tmp_path / "log").read_text()
    lines = text.splitlines()
    assert not {"\r", "\x1b"} & set(text)
    told = [line for line in lines if line.startswith("counting: ")]
    assert 2 <= len(told) <= 0.03 * 20 * 10 and set(lines) - set(told) == {"half of it"}
    assert "20/20" in told[-1] and "thing/s" in told[-1]


def test_a_terminal_gets_one_line_that_rewrites_itself() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.Popen([sys.executable, "-c", WORK], stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 4096):
            text += piece
    except OSError:  # Linux: the other side has closed it
        pass
    assert done.wait() == 0
    drawn = [part for part in text.decode().split("\r") if part.startswith("counting: ")]
    assert len(drawn) > 3 and "20/20" in drawn[-1]
    # only the record ends a line before the last; it stands on a line that was wiped
    lines = text.decode().replace("\r\n", "\n").split("\n")
    assert len(lines) == 3 and lines[0].split("\r")[-1] == "half of it" and not lines[2]
    assert not lines[0].split("\r")[-2].strip()


def test_short_work_says_nothing_in_a_file() -> None:
    file = io.StringIO()
    assert list(trange(5, file=file)) == list(range(5))
    with tqdm(total=3, file=file, leave=False) as bar:
        bar.update(3)
        bar.set_description("other")
        bar.set_postfix(loss=1)
    assert file.getvalue() == ""


@pytest.mark.parametrize("given", ["0", "-1", "soon"])
def test_an_impossible_interval_counts_as_not_given(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSHEARING_PROGRESS_SECONDS", given)
    assert tqdm([], file=io.StringIO()).interval == 30


def test_records_do_not_bring_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is written to often leaves the interval as it is."""
    monkeypatch.setenv("LLMSHEARING_PROGRESS_SECONDS", "0.05")
    file = io.StringIO()
    log = logging.Logger("test")
    log.addHandler(AboveTheLine(file))
    with tqdm(total=9, file=file) as bar:
        for _ in range(3):
            log.warning("said")
        assert file.getvalue() == "said\n" * 3
        time.sleep(0.06)
        bar.update(9)
    assert file.getvalue().count("9/9") == 2  # when it was time, and at the end
