"""The files of a tokenizer with fewer tokens: its models, and all else that names tokens by id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmshearing.data.json_file import read_json
from llmshearing.data.text.codec import load_file
from llmshearing.errors import ShearingError
from llmshearing.prune.methods.vocabulary.files import READERS

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
# Files that name tokens by their text, not by id.
COPIED = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def added_ids(directory: Path) -> set[int]:
    """Ids of tokens that transformers adds to a tokenizer's own, and that its files may not know."""
    found: set[Any] = set()
    if (directory / ADDED).is_file():
        found |= set(read_json(directory / ADDED, "tokenizer").values())
    if (directory / CONFIG).is_file():
        found |= set(read_json(directory / CONFIG, "tokenizer").get("added_tokens_decoder") or ())
    try:
        return {int(number) for number in found}
    except (ValueError, TypeError) as error:
        raise ShearingError(f"tokenizer {directory}: an added token has no whole number as its id: {error}") from None


def write_tokenizer(directory: Path, new: Mapping[int, int], folder: Path) -> None:
    """Write the tokenizer of ``directory`` with the tokens ``new`` (old id -> new id) only into ``folder``.

    Raises:
        ShearingError: a file would give a token another id than its row has.
    """
    for name, read in READERS.items():
        if (directory / name).is_file():
            tokens = read(directory / name)
            (folder / name).write_bytes(tokens.cut(new))
            _check_ids(folder / name, {text: new[i] for text, i in tokens.ids.items() if i in new})
    for name in COPIED:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, folder / name)
    _rewrite(directory, folder, CONFIG, lambda data: _renumber_decoder(data, new))
    for name in (ADDED, "vocab.json"):
        _rewrite(directory, folder, name, lambda data: {text: new[i] for text, i in data.items() if i in new})
    if (directory / "merges.txt").is_file() and (folder / "tokenizer.json").is_file():
        merges = json.loads((folder / "tokenizer.json").read_bytes())["model"]["merges"]
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def _rewrite(directory: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if (directory / name).is_file():
        data = change(read_json(directory / name, "tokenizer"))
        (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _renumber_decoder(data: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    if decoder := data.get("added_tokens_decoder"):
        data["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in decoder.items() if int(i) in new}
    return data


def _check_ids(path: Path, wanted: Mapping[str, int]) -> None:
    """The libraries number added tokens themselves, so that gaps between ids would move them."""
    model = load_file(path)
    lookup = model.piece_to_id if path.suffix == ".model" else model.token_to_id
    wrong = [f"{text!r} is {lookup(text)}, its row is {i}" for text, i in wanted.items() if lookup(text) != i]
    if wrong:
        raise ShearingError(f"{path.name} without the cut tokens gives wrong ids: {'; '.join(wrong[:3])}")
