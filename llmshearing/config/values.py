"""What one value may be: time strings, choices, ranges. Each check stands beside its field in `schema`.

`checked(default, parse)` makes a dataclass field whose `parse` returns the value in its canonical form or
raises ValueError saying what would be right.
"""

import re
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

from omegaconf import MISSING

AUTO = "auto"
"""What is told by the rest of the configuration."""

UNITS = ("iter", "ep", "ba", "sp", "tok", "dur", "sec")
"""Composer's time units: iterations, epochs, batches, samples, tokens, fraction of max_duration, seconds."""

_TIME = re.compile(rf"^\s*([0-9][0-9.e+]*)\s*({'|'.join(UNITS)})?\s*$", re.IGNORECASE)


class TimeValue(NamedTuple):
    """A parsed time string: `value` of `unit`s; whole, except for `dur` (a fraction of max_duration)."""

    value: float
    unit: str


def parse_time(text: str | int) -> TimeValue:
    """Parse Composer's time strings (`640ba`, `1ep`, `3e9tok`, `0.2dur`); a plain number counts batches.

    Raises:
        ValueError: `text` is none of these.
    """
    wanted = "a time string such as 640ba, 1ep, 3e9tok or 0.2dur (a plain whole number counts batches)"
    match = _TIME.match(str(text))
    if match is None:
        raise ValueError(wanted)
    try:
        value = float(match[1])
    except ValueError:
        raise ValueError(wanted) from None
    unit = (match[2] or "ba").lower()
    if unit != "dur" and value != int(value):
        raise ValueError(f"a whole number of {unit}")
    if unit == "dur" and value > 1:
        raise ValueError("a fraction of max_duration, 0dur to 1dur")
    return TimeValue(value, unit)


def fraction_of(text: str, share: float) -> str:
    """A part of a time, as a time string; rounded down to a whole number where its unit needs one."""
    value, unit = parse_time(text)
    part = round(value * share, 9) if unit == "dur" else int(value * share)
    return f"{part}{unit}"


def checked(default: Any, parse: Callable[[Any], Any]) -> Any:
    """A dataclass field whose given value goes through `parse` (None never does)."""
    return field(default=default, metadata={"parse": parse})


def time(default: str | None = MISSING, *, positive: bool = False) -> Any:
    """A time string, kept as one with its unit written out. `positive` refuses 0."""

    def parse(text: str) -> str:
        value, unit = parse_time(text)
        if positive and value == 0:
            raise ValueError("more than 0")
        return f"{int(value) if value == int(value) else value}{unit}"

    return checked(default, parse)


def choice(default: str | None, *options: str) -> Any:
    """One of `options`."""

    def parse(value: str) -> str:
        if value not in options:
            raise ValueError("one of " + ", ".join(options))
        return value

    return checked(default, parse)


def number(default: Any = MISSING, *, low: float, high: float = float("inf"), above: bool = False) -> Any:
    """A number in [low, high], or in (low, high] when `above`."""

    def parse(value: float) -> float:
        if not (low < value if above else low <= value) or not value <= high:
            if low == high:
                raise ValueError(f"{low:g}")
            lower = f"more than {low:g}" if above else f"at least {low:g}"
            raise ValueError(lower + ("" if high == float("inf") else f" and at most {high:g}"))
        return value

    return checked(default, parse)


def count(default: Any = MISSING, *, low: int = 1) -> Any:
    """A whole number, at least `low`."""
    return number(default, low=low)


def parse_microbatch(value: int | str) -> int | str:
    """A positive number of samples, or `auto`."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError("a whole number of samples, at least 1, or auto")
    return value


def parse_rate(value: float | str) -> float | str:
    """A learning rate, or `auto`."""
    try:
        number_given = None if isinstance(value, (bool, list, dict)) else float(value)
    except ValueError:
        number_given = None
    if value != AUTO and (number_given is None or not 0 <= number_given < float("inf")):
        raise ValueError(f"a number of at least 0, or {AUTO}")
    return AUTO if number_given is None else number_given


def parse_momentum(value: float) -> float:
    """The decay rate of a moment."""
    if not 0 <= value < 1:
        raise ValueError("a number in [0, 1), such as 0.95")
    return value


def parse_betas(value: list[float]) -> list[float]:
    """Adam's two decay rates."""
    if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
        raise ValueError("two numbers in [0, 1), such as [0.9, 0.95]")
    return value


def parse_subset(*options: str) -> Callable[[list[str]], list[str]]:
    """A non-empty list of distinct `options`."""

    def parse(value: list[str]) -> list[str]:
        if not value or set(value) - set(options) or len(set(value)) < len(value):
            raise ValueError("a list of some of " + ", ".join(options) + ", each once")
        return value

    return parse
