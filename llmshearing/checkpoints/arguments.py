"""`key=value` arguments: read them, and hold them against what a checkpoint says."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from llmshearing.errors import ShearingError

# Keys that set something; every other key states a fact of the model's config, which is checked.
LABEL = "_name_or_path"


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["vocab_size=64", "tokenizer=dir"]` -> values as YAML reads them.

    Raises:
        ShearingError: listing every argument that is no `key=value`, or given twice.
    """
    values: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            problems.append(f"argument {pair!r} must be key=value, such as vocab_size=32000")
        elif key in values:
            problems.append(f"{key} is given twice")
        else:
            try:
                values[key] = yaml.safe_load(text)
            except yaml.YAMLError:
                problems.append(f"{key}={text}: not a value")
    if problems:
        raise ShearingError("; ".join(problems))
    return values


def check_facts(given: Mapping[str, Any], config: Mapping[str, Any], where: str, settable: Iterable[str] = ()) -> None:
    """Compare stated facts with the config.

    Args:
        given: keys of the command line. config: the model's config. where: what holds the config, for messages.
        settable: further keys that are known, and not facts.

    Raises:
        ShearingError: listing every unknown key (with the one that was probably meant) and every contradiction.
    """
    settable = (*settable, LABEL)
    problems = []
    for key, value in given.items():
        if key in settable:
            continue
        if key not in config:
            close = difflib.get_close_matches(key, [*settable, *config], n=1, cutoff=0.6)
            problems.append(f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else ""))
        elif not _same(value, config[key]):
            problems.append(f"{key}={value} was given, but {where} has {key}={config[key]}")
    if problems:
        raise ShearingError("\n".join(problems))


def _same(given: Any, known: Any) -> bool:
    if isinstance(known, float) and not isinstance(given, bool):
        try:
            return math.isclose(float(given), known)  # YAML reads 1e-5 as text
        except (TypeError, ValueError):
            return False
    return bool(given == known) and isinstance(given, bool) == isinstance(known, bool)
