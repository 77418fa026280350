"""Where results go: nothing foreign is overwritten, nothing half-written is left."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmshearing.errors import ShearingError
from llmshearing.files import whole_folder
from llmshearing.report.record import PAGE_FILE, RUN_FILE

# Tokenizer files of transformers; they are copied as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What the prune command keeps beside a model.
SELECTION, REPORT = "selection.safetensors", "prune.json"
FINETUNING = "finetune.json"
"""What the finetune command keeps beside a model."""
PARITY = "parity.json"
"""The certificate of an export (`checkpoints/parity.py`)."""
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
    rf"|{re.escape(SELECTION)}|{re.escape(REPORT)}|{re.escape(FINETUNING)}|{re.escape(PARITY)}"
    rf"|{re.escape(RUN_FILE)}|{re.escape(PAGE_FILE)}"
)


def history_of(model: Path | str) -> list[str]:
    """How a directory's model was made, line by line; empty where nothing tells it."""
    for name in (FINETUNING, REPORT):
        try:
            history = json.loads((Path(model) / name).read_text())["history"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return [str(line) for line in history] if isinstance(history, list) else []
    return []


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file that exists (unless ``overwrite``) or cannot be one."""
    if path.is_dir():
        raise ShearingError(f"output {path} is a directory; give the name of a file")
    if path.exists() and not overwrite:
        raise ShearingError(f"output {path} exists; give another name, or --overwrite to replace it")


def check_directory(path: Path, overwrite: bool) -> None:
    """Refuse an output directory with anything in it; with ``overwrite``, with anything that is not our export."""
    if path.exists() and not path.is_dir():
        raise ShearingError(f"output {path} is a file; give the name of a directory")
    names = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in names if not (_OURS.fullmatch(name) or name in TOKENIZER_FILES or name == "README.md")]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ShearingError(f"output {path} exists with something else in it: {', '.join(foreign[:3])}{more}")
    if names and not overwrite:
        raise ShearingError(f"output {path} exists and holds a model; give another name, or --overwrite to replace it")


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the name ``path`` when all went well; see :func:`check_directory`."""
    check_directory(path, overwrite)
    with whole_folder(path) as temporary:
        yield temporary
