"""A JSON file that others wrote, read whole or refused in one sentence."""

import json
from pathlib import Path
from typing import Any

from llmshearing.errors import ShearingError


def read_json(path: Path, what: str, kind: type = dict) -> Any:
    """The content of a file, in UTF-8, UTF-16 or UTF-32, with or without a mark (BOM) at its beginning.

    what: how messages call the file. kind: what JSON must be, `dict` or `list`.

    Raises:
        ShearingError: it cannot be read, or is no JSON of that kind.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ShearingError(f"{what} {path} cannot be read: {error or type(error).__name__}") from error
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ShearingError(f"{what} {path} cannot be read: it holds a {type(found).__name__}, not {wanted}")
    return found
