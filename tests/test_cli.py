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
from llmshearing.errors import RankLost, ShearingError, Stopped

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
    trained = ["data prepare", "target-loss", "train", "fold", "train", "convert"]
    assert steps == [*trained, "prune", "finetune", "evaluate", "report"]
    assert len(way.splitlines()) <= 22


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
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith(f"usage: llmshearing {name} ")
    example = "composer -n 8 llmshearing/train.py" if name == "train" else f"llmshearing {name}"
    assert "python" not in said and f":\n  {example} " in said


@pytest.mark.parametrize("name", ["post_pruning_processing", "composer_to_hf", "test_composer_hf_eq"])
def test_the_old_names_show_the_old_names(name, capsys):
    prog = f"python3 -m llmshearing.utils.{name}"
    with pytest.raises(SystemExit):
        getattr(import_module("llmshearing.checkpoints.cli"), name)(["--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {prog}") and f"\n  {prog} " in said and "llmshearing fold" not in said


# name -> arguments that are right, and the function of the command's module that does the work
WORK = {
    "data prepare": ("--input a --tokenizer b --output c --max_seq_len 8", "prepare"),
    "data inspect": ("a", "inspect"),
    "data plots": ("a.png", "plot_simulation"),
    "target-loss": ("source --losses a.json --set_names web", "source_losses"),
    "distill cache": ("--teacher a --data b --output c", "cache_targets"),
    "train": ("a.yaml", "load_config"),
    "fold": ("a.pt", "prune_and_save_model"),
    "convert": ("a b.pt", "convert_plain"),
    "compare": ("a b.pt", "compare"),
    "prune": ("random --model a --output b --ratio 0.5", "prune"),
    "pad": ("--model a --output b", "pad"),
    "evaluate": ("models/a --no_speed", "evaluate"),
    "finetune": ("models/a a.jsonl --output b", "Path"),  # its work is imported when it runs
    "report": ("out/a", "_read"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("error", [ShearingError("mine"), Stopped("mine"), RankLost("mine")], ids=["1", "75", "76"])
def test_every_command_ends_with_the_errors_code(name, error, monkeypatch, caplog):
    def fails(*arguments, **options):
        raise error

    words, function = WORK[name]
    monkeypatch.setattr(import_module(f"llmshearing.{COMMANDS[name][0]}"), function, fails)
    assert main([*name.split(), *words.split()]) == error.exit_code
    last = caplog.records[-1]
    assert (last.getMessage(), last.levelname, last.exc_info) == ("error: mine", "ERROR", None)


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


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(lab, tmp_path):
    """Each in a process of its own: preparing starts further ones, which import the main module again."""
    source, data, small = lab.source, tmp_path / "mds", tmp_path / "small"
    budget = ["--max_seq_len", "32", "--eval_fraction", "0.15", "--for_prune_fraction", "0.4", "--processes", "2"]
    for words in (
        ["data", "prepare", "--input", lab.corpus, "--tokenizer", source, "--output", data, *budget],
        ["data", "inspect", data, "--samples", "1", "--tokenizer", source],
        ["target-loss", "source", "--model", source, "--data", data],
        ["prune", "random", "--model", source, "--output", small, "--ratio", "0.5"],
        ["convert", small, f"{small}.pt"],
        ["compare", small, f"{small}.pt"],
    ):
        result = call("-m", "llmshearing", *map(str, words))
        assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert "PASS" in result.stderr


def test_train_is_the_same_by_both_names(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["configs/llama2/7b.yaml", "optimizer.lr=0.125", "--dry-run", "data_local=x"]
    assert main(["train", *words]) == 0
    said = capsys.readouterr().out
    assert "lr: 0.125" in said and import_module("llmshearing.train").main(words) == 0
    assert capsys.readouterr().out == said


def test_the_installed_name_leads_here():
    (target,) = re.findall(r'"llmshearing=([\w.]+:\w+)"', (ROOT / "setup.py").read_text())
    module, _, function = target.partition(":")
    assert getattr(import_module(module), function) is main
