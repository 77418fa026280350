"""The command `llmshearing`: one name for each of the package's commands.

A command's module is imported when it runs, and not before: help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from llmshearing import __version__
from llmshearing.commands import INTERRUPTED, lacking, run, typed
from llmshearing.errors import ShearingError

COMMANDS: dict[str, tuple[str, str, str]] = {
    "data prepare": ("data.prepare.run", "main", "turn folders of text into the data that training reads"),
    "data inspect": ("data.inspect", "main", "show what prepared data holds"),
    "data plots": ("data.plots", "main", "plot how the mixture's updates behave"),
    "target-loss": ("utils.target_loss", "main", "give each domain's target loss"),
    "distill cache": ("training.cache.cli", "main", "write a teacher's targets, to train without it"),
    "train": ("train", "main", "learn what to prune, or continue the pretraining"),
    "prune": ("prune.__main__", "main", "prune in one shot: a choice, no training"),
    "fold": ("checkpoints.cli", "fold", "cut a pruning run's checkpoint to the compact model"),
    "convert": ("megatron.cli", "convert", "between checkpoints, Hugging Face directories and Megatron's shards"),
    "compare": ("checkpoints.cli", "test_composer_hf_eq", "compare a Hugging Face model with a checkpoint"),
    "evaluate": ("evaluate.__main__", "main", "judge models side by side: loss, tasks, cost, speed"),
    "finetune": ("finetune.__main__", "main", "train a directory on text, prompts or chats; LoRA too"),
    "report": ("report.__main__", "main", "draw a run's report.html again, or compare runs"),
    "pad": ("prune.pad", "main", "fill layers of unequal sizes to a plain model"),
}
"""What the user types -> the module below the package, its function of the arguments, one line."""

WAY = """
From a model to a smaller one, with training:
  llmshearing data prepare --input corpus --tokenizer models/source --output data/mds --max_seq_len 4096
  llmshearing target-loss source --model models/source --data data/mds
  llmshearing train prune.yaml data_local=data/mds model.path=models/source save_folder=out/prune
  llmshearing fold out/prune/latest-rank0.pt
  llmshearing train continue.yaml data_local=data/mds model.path=out/prune/pruned-latest-rank0.pt save_folder=out/more
  llmshearing convert out/more/latest-rank0.pt out/hf
On N processes (GPUs): composer -n N llmshearing/train.py in place of llmshearing train.

In one shot, without training:
  llmshearing prune obs --model models/source --output out/small --ratio 0.25 --calibration data/mds

Finetuned, on text or on the answers of chats:
  llmshearing finetune out/small chats.jsonl --output out/chat --lora

What it is worth:
  llmshearing evaluate out/small --source models/source --data data/mds
  llmshearing report out/prune out/more --output comparison.html
"""
HELP = ("-h", "--help")


class UnknownCommand(ShearingError):
    """What was typed is no command; the exit code is that of wrong usage."""

    exit_code = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Find the command and run it; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is None:
        return run(lambda: _tell(words))
    module, function, _ = COMMANDS[name]
    try:
        command = getattr(import_module(f"llmshearing.{module}"), function)
        with typed(f"llmshearing {name}"):
            return int(command(words[len(name.split()) :]))
    except KeyboardInterrupt:  # while it was imported
        return INTERRUPTED
    except ModuleNotFoundError as error:  # likewise
        if (absent := lacking(error, f"llmshearing {name}")) is None:
            raise
        return run(lambda: _fail(absent))


def _fail(error: ShearingError) -> int:
    raise error


def _tell(words: Sequence[str]) -> int:
    """Help or version, or an error."""
    first, rest = (words[0], words[1:]) if words else ("--help", [])
    below = {name: line for name, (_, _, line) in COMMANDS.items() if name.startswith(f"{first} ")}
    if first == "--version":
        sys.stdout.write(f"llmshearing {__version__}\n")
    elif first in HELP:
        every = {name: line for name, (_, _, line) in COMMANDS.items()}
        sys.stdout.write(f"usage: llmshearing COMMAND ...\n{WAY}\n{_listed(every)}")
    elif below and (not rest or rest[0] in HELP):
        sys.stdout.write(f"usage: llmshearing {first} COMMAND ...\n\n{_listed(below)}")
    else:
        _refuse(" ".join(words[:2]) if below else first)
    return 0


def _listed(lines: dict[str, str]) -> str:
    text = "".join(f"  {name:<14}{line}\n" for name, line in lines.items())
    return f"Commands (llmshearing COMMAND --help tells its options):\n{text}"


def _refuse(given: str) -> None:
    (nearest,) = get_close_matches(given, COMMANDS, n=1, cutoff=0.0)
    raise UnknownCommand(f"there is no command {given!r}; the nearest is {nearest!r}. llmshearing --help lists all")
