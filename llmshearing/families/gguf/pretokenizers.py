"""How byte-level BPE tokenizers split text before they merge, and llama.cpp's name for each way.

llama.cpp knows a fixed number of ways, by names. A `tokenizer.json` says its way as steps: regular expressions, digits
apart, and the bytes. Steps that are the same text are the same way. Its own converter looks at the hash of an encoded
text instead; a cut vocabulary changes that hash, and not the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPELT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{UPPER}*{LOWER}+{ending}|{before}{UPPER}+{LOWER}*{ending}|{digits}{REST_SLASH}"


BYTE_MODEL, PIECE_MODEL = "gpt2", "llama"
"""`tokenizer.ggml.model` of byte-level BPE, and of SentencePiece with merges."""

BYTES = "bytes"
"""The step of the bytes, without a split of its own."""
WORDS_OF_GPT2 = "words"
"""The step of the bytes with its own split, that of GPT-2."""
DIGITS = "digits"
"""The step that takes digits apart."""

# Name of llama.cpp -> steps. Where several names mean one way, the first is written, by whether whole words of the
# vocabulary are taken before merges (``ignore_merges``).
WAYS: list[tuple[str, bool, tuple[str, ...]]] = [
    ("gpt-2", False, (WORDS_OF_GPT2,)),
    ("smollm", False, (DIGITS, WORDS_OF_GPT2)),
    *[
        (name, ignores, (start + WORDS + digits + REST, BYTES))
        for start in (CONTRACTIONS, SPELT)
        for name, ignores, digits in (
            ("llama-bpe", True, r"\p{N}{1,3}"),
            ("dbrx", False, r"\p{N}{1,3}"),
            ("qwen2", False, r"\p{N}"),
        )
    ],
    ("tekken", True, (_cased("", r"\p{N}"), BYTES)),
    ("gpt-4o", False, (_cased(CONTRACTIONS + "?", r"\p{N}{1,3}"), BYTES)),
    (
        "deepseek-v3",
        False,
        (
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
            BYTES,
        ),
    ),
]
PRETOKENIZERS = tuple(dict.fromkeys(name for name, _, _ in WAYS))
"""Names that are found by the steps."""


def pretokenizer_of(steps: Mapping[str, Any] | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the way that a `tokenizer.json` says; None: it has none that is known here.

    Args:
        steps: its ``pre_tokenizer``. ignore_merges: of its model.
    """
    said = _said(steps)
    return next((name for name, ignores, way in WAYS if (ignores, way) == (ignore_merges, said)), None)


def _said(steps: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The steps in the words above; None: one of them is another."""
    listed: Sequence[Mapping[str, Any]] = [] if steps is None else [steps]
    if steps is not None and steps.get("type") == "Sequence":
        listed = steps["pretokenizers"]
    said = [_step(step) for step in listed]
    known = [step for step in said if step is not None]
    return tuple(known) if len(known) == len(said) else None


def _step(step: Mapping[str, Any]) -> str | None:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return WORDS_OF_GPT2 if step.get("use_regex", True) else BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step.get("pattern", {}).get("Regex")
    return None
