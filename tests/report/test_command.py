"""`llmshearing report`: redrawing, comparing, and bad input in one clear error each."""

import logging
import re
import subprocess
import sys

import pytest
from helpers_report import pruning
from helpers_runs import ROOT

from llmshearing.cli import main
from llmshearing.report.record import PAGE_FILE, RUN_FILE


@pytest.fixture
def command(caplog):
    """Run `llmshearing report`: (exit code, what it logged)."""

    def execute(*words):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            code = main(["report", *map(str, words)])
        return code, [record.getMessage() for record in caplog.records]

    return execute


def test_redraws_where_the_run_is(command, tmp_path):
    run = pruning(tmp_path / "run", title="redrawn")
    code, said = command(run)
    assert (code, said) == (0, [f"wrote {run / PAGE_FILE}"])
    text = (run / PAGE_FILE).read_text()
    assert "redrawn" in text and text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    (run / PAGE_FILE).unlink()
    assert command(run / RUN_FILE, "--output", tmp_path / "new" / "a.html")[0] == 0  # the file itself, another place
    assert (tmp_path / "new" / "a.html").read_text() == text and not (run / PAGE_FILE).exists()


def test_nothing_of_it_is_elsewhere(command, tmp_path):
    command(pruning(tmp_path / "run", title="alone"))
    text = (tmp_path / "run" / PAGE_FILE).read_text()
    assert not re.search(r"<[^>]*\s(src|href|srcset|data)\s*=", text) and "@import" not in text and "url(" not in text
    assert len(text) < 100_000


def test_several_need_an_output(command, tmp_path):
    one, two = pruning(tmp_path / "a" / "run"), pruning(tmp_path / "b" / "run", 10)
    code, said = command(one, two)
    assert code == 1 and len(said) == 1 and "give --output FILE.html" in said[0]
    assert not list(tmp_path.rglob("*.html"))
    assert command(one, two, "--output", tmp_path / "both.html")[0] == 0
    text = (tmp_path / "both.html").read_text()
    assert f'<th scope="col">{one}</th><th scope="col">{two}</th>' in text  # alike names: told apart by their paths


def test_a_run_that_never_evaluated_is_drawn_and_says_so(command, tmp_path):
    run = pruning(tmp_path / "run", evaluated=False)
    code, said = command(run)
    assert code == 0 and len(said) == 2 and "was never evaluated" in said[0] and "eval_interval" in said[0]
    assert "This run was never evaluated" in (run / PAGE_FILE).read_text()


def test_a_run_without_a_batch(command, tmp_path):
    run = pruning(tmp_path / "run", batches=0, end=False)
    code, said = command(run)
    assert code == 0 and "No batch of this run was finished." in said[-2]
    assert "it is running, or was cut off" in (run / PAGE_FILE).read_text()


def test_bad_input(command, tmp_path):
    good = pruning(tmp_path / "good")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    broken = pruning(tmp_path / "broken")
    lines = (broken / RUN_FILE).read_text().splitlines()
    (broken / RUN_FILE).write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]))
    code, said = command(good, tmp_path / "model", broken, tmp_path / "absent", "--output", tmp_path / "out.html")
    assert code == 1 and len(said) == 1  # all problems at once
    assert f"{tmp_path / 'model'} is no run: it has no {RUN_FILE}" in said[0] and "save_folder of train" in said[0]
    assert f"{broken / RUN_FILE}, line 5 is damaged" in said[0]
    assert f"{tmp_path / 'absent'}: there is no such folder" in said[0]
    assert not (tmp_path / "out.html").exists()
    code, said = command(good, "--output", tmp_path)
    assert code == 1 and "is a directory; give the name of a file" in said[0]


def test_it_needs_no_heavy_module(tmp_path):
    run = pruning(tmp_path / "run")
    code = f"import sys; from llmshearing.cli import main; assert main(['report', {str(run)!r}]) == 0; "
    code += "sys.exit(bool({'torch', 'transformers', 'composer', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
