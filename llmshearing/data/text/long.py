"""Ids of a long text, piece by piece: tokenizers needs about 90 bytes a character, 1.3 GB for 14.5 million.

    ..........|....overlap....|              one piece
              |....overlap....|..........    the next one
                     ^ cut: RUN tokens before and after it are the same in both

Both pieces end inside the text, where their tokens can be others than those of the whole. The cut lies as far from both
ends as it can, and only where the two agree on RUN tokens and their places on both sides. For BPE this gives the ids of
the whole: a sequence of tokens is what BPE makes of a text exactly if every two neighbours are what it makes of theirs,
and each two neighbours here are neighbours in one of the pieces. Where no such place is found the piece grows.
"""

from typing import Any, NamedTuple

import numpy as np

LONG = 1 << 20  # characters; a text above is worked off in pieces
PIECE = 1 << 18  # characters
OVERLAP = 1 << 13  # characters
RUN = 8  # tokens


class Tokens(NamedTuple):
    """Tokens [n] of a piece: their ids, and where in the whole text each begins."""

    ids: np.ndarray
    starts: np.ndarray


def encode_all(backend: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text by tokenizers' `Tokenizer`, without special tokens; long texts in pieces."""
    short = [text for text in texts if len(text) <= LONG]
    encoded = iter(backend.encode_batch_fast(short, add_special_tokens=False))
    return [next(encoded).ids if len(text) <= LONG else encode_long(backend, text) for text in texts]


def encode_long(backend: Any, text: str) -> list[int]:
    """Ids of one text, however long, as `backend` gives them for the whole."""
    ids: list[int] = []
    start, end, skip = 0, PIECE, 0  # of the piece; and its tokens that the one before has given
    tokens = _encoded(backend, text, start, end)
    while end < len(text):
        begin = end - OVERLAP
        following = _encoded(backend, text, begin, begin + PIECE)
        cut = _cut(tokens, following, end - OVERLAP // 2)
        if cut is None:
            end += end - start
            longer = _encoded(backend, text, start, end)
            if not np.array_equal(longer.ids[:skip], tokens.ids[:skip]):
                return backend.encode(text, add_special_tokens=False).ids
            tokens = longer
            continue
        ids += tokens.ids[skip : cut[0]].tolist()
        start, end, skip, tokens = begin, begin + PIECE, cut[1], following
    return ids + tokens.ids[skip:].tolist()


def _encoded(backend: Any, text: str, start: int, end: int) -> Tokens:
    encoded = backend.encode(text[start:end], add_special_tokens=False)
    starts = np.fromiter((first for first, _ in encoded.offsets), np.int64, len(encoded.offsets))
    return Tokens(np.array(encoded.ids, np.int64), starts + start)


def _cut(one: Tokens, two: Tokens, middle: int) -> tuple[int, int] | None:
    """The first token after a common boundary near `middle`, in each of two pieces; None: there is none."""
    near = np.flatnonzero(np.abs(two.starts - middle) <= OVERLAP // 4)
    for at in near[np.argsort(np.abs(two.starts[near] - middle), kind="stable")].tolist():
        # Several tokens of one character begin at the same place: the first of them is meant in both.
        first, second = (int(np.searchsorted(tokens.starts, two.starts[at])) for tokens in (one, two))
        if min(first, second) < RUN or first + RUN > len(one.ids) or second + RUN > len(two.ids):
            continue
        mine, its = slice(first - RUN, first + RUN), slice(second - RUN, second + RUN)
        if np.array_equal(one.ids[mine], two.ids[its]) and np.array_equal(one.starts[mine], two.starts[its]):
            return first, second
    return None
