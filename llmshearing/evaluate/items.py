"""Items of tasks in JSONL files, checked line by line before a model is asked.

    choices        {"query": text, "choices": [text, ...], "gold": number}
    contexts       {"context_options": [text, ...], "continuation": text, "gold": number}
    continuation   {"context": text, "continuation": text}

`gold` counts from 0. Other fields are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmshearing.errors import ShearingError

TEXT, TEXTS, NUMBER = "a text", "a list of two texts or more", "a whole number from 0"
FORMS: dict[str, dict[str, str]] = {
    "choices": {"query": TEXT, "choices": TEXTS, "gold": NUMBER},
    "contexts": {"context_options": TEXTS, "continuation": TEXT, "gold": NUMBER},
    "continuation": {"context": TEXT, "continuation": TEXT},
}
MOST = 20
"""Problems told at once."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


CHECKS: dict[str, Callable[[Any], bool]] = {
    TEXT: _is_text,
    TEXTS: lambda value: isinstance(value, list) and len(value) > 1 and all(map(_is_text, value)),
    NUMBER: lambda value: type(value) is int and value >= 0,
}


def check_items(path: Path, form: str) -> int:
    """Check a file of items; their number.

    Raises:
        ShearingError: the file is absent or empty, or naming each line that lacks a field or has a wrong one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ShearingError(f"items {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ShearingError(f"items {path} are not UTF-8: {error.reason} at byte {error.start}") from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ShearingError(f"items {path}: the file is empty; a line is {_described(form)}")
    problems = [f"{path}:{number} {said}" for number, line in filled for said in _problems(line, form)]
    if problems:
        more = [f"and {len(problems) - MOST} more"] if len(problems) > MOST else []
        raise ShearingError("\n".join([*problems[:MOST], *more, f"a line is {_described(form)}"]))
    return len(filled)


def _described(form: str) -> str:
    return "; ".join(f"{name}: {kind}" for name, kind in FORMS[form].items())


def _problems(line: str, form: str) -> list[str]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [f"is no JSON: {error}"]
    if not isinstance(item, Mapping):
        return [f"is a {type(item).__name__}, not an object"]
    fields = FORMS[form]
    said = [f"has no field {name!r}" for name in fields if name not in item]
    wrong = [name for name, kind in fields.items() if name in item and not CHECKS[kind](item[name])]
    said += [f"has {name} = {item[name]!r}: must be {fields[name]}" for name in wrong]
    listed = next((item[name] for name, kind in fields.items() if kind == TEXTS and name in item), None)
    if not said and listed is not None and item["gold"] >= len(listed):
        said.append(f"has gold = {item['gold']}, and {len(listed)} choices from 0 to {len(listed) - 1}")
    return said
