"""The text in a line of JSON. What stands beside it need not be understood: it is skipped, however odd it is."""

import codecs
import json
import re
from typing import NamedTuple

KEYS_SHOWN = 10
LINE, ROW, FILE, REST = "line", "row", "whole file", "rest of a file"
PLURALS = {LINE: "lines", ROW: "rows", FILE: "whole files", REST: "rests of files"}


class Problem(NamedTuple):
    """What is wrong, naming file and line, and what is left out with it."""

    said: str
    what: str = LINE


class NoText(Exception):
    """What is wrong with a line."""


# For texts. The values of whole numbers are of no use here, and those of many digits would take long or stop Python.
# Control characters inside of strings, which JSON wants escaped (`strict` is json's word for that), are taken as they
# are (docs/inputs.md).
_DECODER = json.JSONDecoder(parse_int=len, strict=False)
_NESTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)


def text_of(line: bytes, name: str) -> str | None:
    """The text in the field `name` of a line; None for a blank line, "" for an empty document.

    Of a key that stands twice the last counts, as in `json`. Raises NoText.
    """
    while line.startswith(codecs.BOM_UTF8):  # editors write it, and `cat` brings it into the middle
        line = line[len(codecs.BOM_UTF8) :]
    if not line or line.isspace():
        return None
    broken = None
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:  # which may be beside the text
        broken, content = error, line.decode("utf-8", "surrogateescape")
    try:
        document = _parsed(content.strip())
    except json.JSONDecodeError as error:
        if broken:
            raise NoText(_not_utf8(broken)) from None
        raise NoText(f"is not JSON: {error.msg} at column {error.colno}") from None
    text = document.get(name) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise NoText(f"has no string in field {name!r}; it has {shown(document)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        if broken:
            raise NoText(_not_utf8(broken)) from None
        raise NoText(f"has a lone surrogate in field {name!r}, which is no text") from None
    return text


def record_of(line: bytes) -> object:
    """What a line holds, numbers included; None for a blank line. Bytes that are no UTF-8 become lone surrogates.

    Programs write records of several fields, and escape control characters: unlike in texts, these are refused.

    Raises NoText.
    """
    content = line.decode("utf-8", "surrogateescape").lstrip("\ufeff").strip()
    if not content:
        return None
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise NoText(f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # of digits, or of nesting, beyond Python's limits
        raise NoText(f"is JSON that cannot be read: {error}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: {error.reason} at byte {error.start}"


def _parsed(content: str) -> object:
    try:
        return _DECODER.decode(content)
    except RecursionError:
        return _DECODER.decode(_flat(content))


def _flat(content: str) -> str:
    """JSON without what is inside of the values of the outermost object: `{"a": [[1]]}` -> `{"a": null}`."""
    parts, depth, start = [], 0, 0
    for found in _NESTED.finditer(content):
        if (mark := found.group()) in "[{":
            depth += 1
            if depth == 2:
                parts.append(content[start : found.start()])
        elif mark in "]}":
            depth -= 1
            if depth == 1:
                parts.append("null")
                start = found.end()
    return "".join(parts) + (content[start:] if depth <= 1 else "")


def shown(document: object) -> str:
    """The keys of an object, the first ones of many; the kind of anything else."""
    if not isinstance(document, dict):
        return type(document).__name__
    keys = sorted(document)
    return f"{keys[:KEYS_SHOWN]}" + (f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else "")
