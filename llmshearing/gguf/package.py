"""The package `gguf`, which the extra of the same name installs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llmshearing.errors import ShearingError


def gguf() -> Any:
    """The package.

    Raises:
        ShearingError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ShearingError(f"GGUF files need the package gguf: pip install 'llmshearing[gguf]' ({error})") from error
