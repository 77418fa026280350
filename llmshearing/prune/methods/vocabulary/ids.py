"""Token ids inside of a config or generation config: which there are, and the same with new ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmshearing.errors import ShearingError

# Lists of ids that generation keeps from coming up; an id that is cut cannot, and leaves the list.
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
BAD_WORDS = "bad_words_ids"
# Of these an id that is cut could not simply be left out.
UNSUPPORTED = ("sequence_bias", "force_words_ids", "forced_decoder_ids")


def _special(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys such as eos_token_id whose value is an id or a list of ids; -1 stands for none."""
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_ids", "_token_index")) and value is not None:
            yield key, value


def ids_of(config: Mapping[str, Any]) -> set[int]:
    """Ids that must stay since a config names them.

    Raises:
        ShearingError: a key with ids that cannot follow.
    """
    if unsupported := [key for key in UNSUPPORTED if config.get(key)]:
        raise ShearingError(f"the generation config's {', '.join(unsupported)} cannot follow a smaller vocabulary")
    values = [value if isinstance(value, list) else [value] for _, value in _special(config)]
    return {number for value in values for number in value if number >= 0}


def renumbered(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The keys of a config that hold ids, with new ones. new: old id -> new id."""

    def follow(value: int) -> int:
        return new[value] if value >= 0 else value

    result: dict[str, Any] = {
        key: [follow(number) for number in value] if isinstance(value, list) else follow(value)
        for key, value in _special(config)
    }
    for key in SUPPRESSED:
        if config.get(key):
            result[key] = [new[number] for number in config[key] if number in new]
    if config.get(BAD_WORDS):
        words = config[BAD_WORDS]
        result[BAD_WORDS] = [[new[i] for i in word] for word in words if all(i in new for i in word)] or None
    return result
