"""The texts of a file or a folder of files, for what reads text without preparing it: counting tokens, calibration."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from llmshearing.data.text.lines import Problem
from llmshearing.data.text.sources import SUFFIXES, has_documents, is_plain_text, read_chunks
from llmshearing.errors import ShearingError

OPEN_FILES = 128  # read in turn at once
JSON_SUFFIXES = (".json", ".jsonlines")  # of a file that is named itself; in folders they are rarely text


def corpus_texts(path: Path, field: str = "text", *, what: str = "corpus", in_turn: bool = False) -> Iterator[str]:
    """Texts of JSONL, Parquet or plain text: of one file, or of all such files in a folder, sorted by path.

    Plain text comes in blocks of lines. A named file of any other kind is read as plain text. in_turn: one text of each
    file after another, so that a few of them are of every file. what: how messages call the path.

    Raises:
        ShearingError: there is no such file, or something in one is no text; the message names file and line.
    """
    files = _files(path, what)
    if not in_turn:
        for file in files:
            yield from _texts(file, field)
        return
    groups = -(-len(files) // OPEN_FILES)
    for group in range(groups):
        for row in zip_longest(*(_texts(file, field) for file in files[group::groups])):
            yield from filter(None, row)


def _files(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = [file for file in inside if has_documents(file) or is_plain_text(file)]
    if not files:
        raise ShearingError(f"{what} {path} has no file ending in .txt or {', '.join(SUFFIXES)}")
    return files


def _texts(path: Path, field: str) -> Iterator[str]:
    problems: list[Problem] = []
    as_text = not has_documents(path) and path.suffix not in JSON_SUFFIXES
    for chunk in read_chunks([path], field, lambda size: None, plain_text=as_text):
        for text in chunk.texts(field, problems):
            if problems:
                break
            yield text
        if problems:
            raise ShearingError("\n".join(problem.said for problem in problems))
