"""A tokenizer of transformers as the keys of a GGUF file: vocabulary, merges or scores, special tokens, chat template.

Two kinds can be told to llama.cpp, both with merges of pairs (BPE):

    bytes            each byte is a symbol; text is split first, in a way that has a name (`tokenizer.ggml.pre`)
    SentencePiece    spaces are "▁"; rare text falls back to bytes; llama.cpp merges the pair with the highest score

What counts is the tokenizer that `AutoTokenizer` makes of a folder, so that both programs have the same. A score is
minus the rank of the first merge that makes a token: the best score is then the first merge.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmshearing.errors import ShearingError
from llmshearing.families.gguf import BYTE_MODEL, PIECE_MODEL, PRETOKENIZERS, pretokenizer_of

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type` (gguf.TokenType)."""
SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""Role of a special token -> its key. The separator's is spelt so."""
PROBE = "ab"


def tokenizer_keys(source: Path | str, size: int, pre: str | None = None) -> dict[str, Any]:
    """Key of the file -> value, for the tokenizer of a folder or name.

    Args:
        size: rows of the embedding; ids without a token become unused ones. pre: llama.cpp's name for the way that
            text is split, in place of what the tokenizer says.

    Raises:
        ShearingError: it cannot be loaded, has more tokens than the model, or llama.cpp has none of its kind.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ShearingError(f"tokenizer {source} cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ShearingError(f"tokenizer {source} is a {type(tokenizer).__name__}, which tells neither merges nor steps")
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = told["model"]
    if model.get("type") != "BPE":
        raise ShearingError(
            f"tokenizer {source}: its model is {model.get('type')}; llama.cpp merges pairs: only BPE can be written"
        )
    try:
        kind = _sentencepiece(told) if model.get("byte_fallback") else _bytes(told, pre)
    except ShearingError as error:
        raise ShearingError(f"tokenizer {source}: {error}") from error
    tokens, types = _tokens(str(source), told, tokenizer, size)
    if model.get("byte_fallback"):
        ranks = _ranks(model["merges"])
        kind["scores"] = [-float(ranks.get(token, len(ranks))) for token in tokens]
    else:
        kind["merges"] = [" ".join(pair) for pair in _pairs(model["merges"])]
    keys = {"tokens": tokens, "token_type": types, **kind, **_special(tokenizer)}
    told_keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    template = getattr(tokenizer, "chat_template", None)
    return {**told_keys, **({"tokenizer.chat_template": template} if isinstance(template, str) else {})}


NO_TOKENIZER = {"tokenizer.ggml.model": "none"}
"""The keys of a file without a tokenizer: its tokens have numbers alone."""


def _bytes(told: Mapping[str, Any], pre: str | None) -> dict[str, Any]:
    _check_normalizer(told, allowed=("NFC",))
    found = pretokenizer_of(told.get("pre_tokenizer"), bool(told["model"].get("ignore_merges")))
    if pre is None and found is None:
        raise ShearingError(
            f"its pre_tokenizer has no known name in llama.cpp: {json.dumps(told.get('pre_tokenizer'))}. Found are "
            f"{', '.join(PRETOKENIZERS)}; give --pre NAME if llama.cpp has it"
        )
    return {"model": BYTE_MODEL, "pre": pre or found, "add_space_prefix": False}


def _sentencepiece(told: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a space is put before the text, of either form that transformers writes."""
    steps = _steps(told.get("normalizer"), "normalizers")
    before = any(step["type"] == "Prepend" for step in steps)
    for step in _steps(told.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            before = before or step.get("prepend_scheme", "always") != "never"
    known = {"Prepend", "Replace", "NFC"}
    if other := [step["type"] for step in steps if step["type"] not in known]:
        raise ShearingError(f"its normalizer has {', '.join(other)}, which llama.cpp has not")
    return {"model": PIECE_MODEL, "pre": "default", "add_space_prefix": before}


def _steps(step: Mapping[str, Any] | None, name: str) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]


def _check_normalizer(told: Mapping[str, Any], allowed: Sequence[str]) -> None:
    kinds = [step["type"] for step in _steps(told.get("normalizer"), "normalizers")]
    if other := [kind for kind in kinds if kind not in allowed]:
        raise ShearingError(f"its normalizer has {', '.join(other)}, which llama.cpp has not")
    if kinds:
        log.warning("warning: the tokenizer composes text (%s), which llama.cpp leaves as it is", ", ".join(kinds))


def _tokens(
    source: str, told: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, size: int
) -> tuple[list[str], list[int]]:
    """Token and type of every row of the embedding."""
    added = {entry["id"]: entry for entry in told.get("added_tokens") or ()}
    by_id = {number: token for token, number in told["model"]["vocab"].items()}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    if by_id and max(by_id) >= size:
        raise ShearingError(f"tokenizer {source} has ids up to {max(by_id)}; the model has {size} tokens")
    falls_back, unknown = bool(told["model"].get("byte_fallback")), told["model"].get("unk_token")
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            kind, token = UNUSED, f"[PAD{number}]"
        elif token == unknown:
            kind = UNKNOWN
        elif number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
            token = token.replace(SPACE, " ") if falls_back and kind == USER_DEFINED else token
        else:
            kind = BYTE if falls_back and _BYTE.fullmatch(token) else NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, ...]]:
    """Merges of either form of the file."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _ranks(merges: Sequence[str | Sequence[str]]) -> dict[str, int]:
    """Token -> number of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_pairs(merges)):
        ranks.setdefault("".join(pair), rank)
    return ranks


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Ids of special tokens, and which of them a text gets.

    Raises:
        ShearingError: a text gets others than one at its beginning and one at its end.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    keys: dict[str, Any] = {f"{ROLES[role]}_token_id": number for role, number in ids.items() if number is not None}
    plain, whole = (tokenizer.encode(PROBE, add_special_tokens=special) for special in (False, True))
    at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
    before, after = (whole, []) if at is None else (whole[:at], whole[at + len(plain) :])
    expected = [[], [ids["bos"]]], [[], [ids["eos"]]]
    if at is None or before not in expected[0] or after not in expected[1]:
        log.warning(
            "warning: the tokenizer puts the tokens %s before a text and %s behind it; llama.cpp can put bos and eos, "
            "and puts none", before, after,
        )  # fmt: skip
        before = after = []
    return {**keys, "add_bos_token": bool(before), "add_eos_token": bool(after)}
