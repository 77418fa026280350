"""The command `llmshearing`: help at once, every command found, unknown ones refused."""

import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from llmshearing import __version__
from llmshearing.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_shows_the_way_and_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, _, line) in COMMANDS.items():
        assert f"  {name:<14}{line}\n" in text
    assert max(map(len, text.splitlines())) <= 120
    way = text.partition("Commands")[0]
    steps = re.findall(r"^  llmshearing (data \S+|\S+)", way, flags=re.MULTILINE)
    assert steps == ["data prepare", "target-loss", "train", "fold", "train", "convert", "prune"]
    assert len(way.splitlines()) <= 16


def test_help_needs_no_heavy_module():
    code = """
import sys
from llmshearing.cli import main
assert main(["--help"]) == 0
heavy = {"torch", "transformers", "composer", "streaming", "numpy", "yaml"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    result = call("-c", code)
    assert result.returncode == 0, result.stderr


def test_help_comes_in_half_a_second():
    """The best of five, against what Python itself needs on this machine just then."""

    def seconds(*words: str) -> float:
        began = time.monotonic()
        assert call(*words).returncode == 0
        return time.monotonic() - began

    bare = min(seconds("-c", "pass") for _ in range(5))
    ours = min(seconds("-m", "llmshearing", "--help") for _ in range(5))
    assert ours < max(0.5, 10 * bare), (ours, bare)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_help(name, capsys):
    """In this process: the imports are those of the whole package."""
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_reach_the_function(name, monkeypatch):
    module, function, _ = COMMANDS[name]
    got = []
    monkeypatch.setattr(import_module(f"llmshearing.{module}"), function, lambda words: got.append(words) or 7)
    assert main([*name.split(), "a", "--b", "data"]) == 7 and got == [["a", "--b", "data"]]


@pytest.mark.parametrize(
    ("words", "given", "nearest"),
    [
        (["pruen", "obs"], "pruen", "prune"),
        (["data", "prepre"], "data prepre", "data prepare"),
        (["converted"], "converted", "convert"),
        (["--verson"], "--verson", ""),
    ],
)
def test_an_unknown_command_is_refused_with_the_nearest(words, given, nearest, caplog):
    assert main(words) == 2
    (record,) = caplog.records
    assert f"no command '{given}'; the nearest is '{nearest}" in record.getMessage()


def test_a_group_lists_its_commands(capsys):
    assert main(["data"]) == main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("  data prepare") == text.count("  data inspect") == 2 and "convert" not in text


def test_version_and_no_word_at_all(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmshearing {__version__}\n"
    assert main([]) == 0 and "usage: llmshearing" in capsys.readouterr().out


def test_fold_works_with_and_without_the_old_word(tmp_path, caplog):
    missing = str(tmp_path / "absent.pt")
    for words in ([missing], ["prune_and_save_model", missing]):
        caplog.clear()
        assert main(["fold", *words]) == 1
        assert "absent.pt" in caplog.text


def test_an_error_ends_the_process_with_its_code(tmp_path):
    result = call("-m", "llmshearing", "data", "inspect", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and str(tmp_path) in result.stderr and "Traceback" not in result.stderr


def test_the_installed_name_leads_here():
    (target,) = re.findall(r'"llmshearing=([\w.]+:\w+)"', (ROOT / "setup.py").read_text())
    module, _, function = target.partition(":")
    assert getattr(import_module(module), function) is main
