"""The two kinds of tokenizer files, read for what must stay and how pieces come about, and written for what is kept.

    SentencePiece `.model`     pieces with a type and a score; BPE joins two neighbours if the whole is a piece, best
                               score first; unigram joins nothing
    `tokenizer.json`, BPE      vocab, ranked merges, added tokens; byte-level (256 symbols) or with byte pieces

A piece comes about by merges of smaller ones. While those smaller ones are kept too, it still does: of the merges that
were possible the best was taken, and with fewer possible ones it is still the best. So a text whose tokens are all kept
is tokenized as before, and any text comes down to kept pieces, since the single symbols stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from llmshearing.errors import ShearingError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Rank of a merge of two neighbours, the lowest first; None: they do not merge.
Rank = Callable[[str, str], "float | None"]


class Tokens(Protocol):
    """A tokenizer file. ids: every token's, by its text. must: ids that stay. special: ids that no text makes."""

    ids: dict[str, int]
    must: set[int]
    special: set[int]

    def parts(self, number: int) -> set[int]:
        """Ids of all pieces that a token is merged from, itself included; of an id that is not here, itself."""
        ...

    def cut(self, new: Mapping[int, int]) -> bytes:
        """The file with the tokens ``new`` (old id -> new id) only."""
        ...


def derivation(piece: str, rank: Rank) -> set[str]:
    """All symbols on the way from a piece's characters to the piece by merges; empty if they do not lead there."""
    symbols, seen = list(piece), set(piece)
    while len(symbols) > 1:
        ranks = [(rank(a, b), at) for at, (a, b) in enumerate(pairwise(symbols))]
        possible = [(value, at) for value, at in ranks if value is not None]
        if not possible:
            return set()
        at = min(possible)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        seen.add(symbols[at])
    return seen


class SentencePiece:
    """A SentencePiece model, BPE or unigram (see :class:`Tokens`)."""

    def __init__(self, path: Path) -> None:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        schema: Any = sentencepiece_model_pb2  # generated: mypy sees no names in it
        self.model = schema.ModelProto()
        try:
            self.model.ParseFromString(path.read_bytes())
        except DecodeError as error:
            raise ShearingError(f"tokenizer {path} is no SentencePiece model: {error}") from error
        kind, trainer = schema.ModelProto.SentencePiece, self.model.trainer_spec
        if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
            raise ShearingError(f"tokenizer {path}: only BPE and unigram models can be cut, this is another kind")
        self._merges = trainer.model_type == trainer.BPE
        pieces = self.model.pieces
        self.ids = {piece.piece: number for number, piece in enumerate(pieces)}
        self.must = {i for i, piece in enumerate(pieces) if piece.type != kind.NORMAL or len(piece.piece) == 1}
        self.special = {i for i, piece in enumerate(pieces) if piece.type in (kind.CONTROL, kind.UNKNOWN)}
        mergeable = (kind.NORMAL, kind.USER_DEFINED, kind.UNUSED)
        self._score = {piece.piece: piece.score for piece in pieces if piece.type in mergeable}
        self._texts = [piece.piece for piece in pieces]

    def parts(self, number: int) -> set[int]:
        if not self._merges or number >= len(self._texts) or self._texts[number] not in self._score:
            return {number}
        symbols = derivation(self._texts[number], self._rank)
        return {number, *(self.ids[symbol] for symbol in symbols if symbol in self.ids)}

    def _rank(self, left: str, right: str) -> float | None:
        score = self._score.get(left + right)
        return None if score is None else -score

    def cut(self, new: Mapping[int, int]) -> bytes:
        model = type(self.model)()
        model.CopyFrom(self.model)
        model.DiscardUnknownFields()  # the model's self-test, which is of the old pieces
        kept = sorted((number for number in new if number < len(self._texts)), key=new.__getitem__)
        del model.pieces[:]
        model.pieces.extend(self.model.pieces[number] for number in kept)
        trainer = model.trainer_spec
        trainer.vocab_size = len(kept)
        for field in ("unk_id", "bos_id", "eos_id", "pad_id"):
            if getattr(trainer, field) >= 0:
                setattr(trainer, field, new.get(getattr(trainer, field), -1))
        return model.SerializeToString()


class TokenizerJson:
    """A `tokenizer.json` whose model is BPE (see :class:`Tokens`)."""

    def __init__(self, path: Path) -> None:
        try:
            self.data = json.loads(path.read_text(encoding="utf-8"))
            model = self.data["model"]
            pieces: dict[str, int] = model["vocab"]
            added = {token["content"]: token["id"] for token in self.data.get("added_tokens") or ()}
            self._merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model.get("merges") or ()]
            named = set(_named(self.data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShearingError(f"tokenizer {path} is not what tokenizers writes for BPE: {error!r}") from error
        affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if model.get("type", "BPE") != "BPE" or affixes:
            what = f"BPE with {affixes[0]}" if affixes else f"a {model['type']} model"
            raise ShearingError(f"tokenizer {path}: only plain BPE can be cut, this is {what}")
        self.ids = {**pieces, **added}
        if not self.ids or not all(type(number) is int and number >= 0 for number in self.ids.values()):
            raise ShearingError(f"tokenizer {path} has no vocabulary of whole numbers")
        self.special = set(added.values())
        unknown = {pieces[model["unk_token"]]} if model.get("unk_token") in pieces else set()
        single = {i for piece, i in pieces.items() if len(piece) == 1 or _BYTE.fullmatch(piece)}
        if lost := named - set(self.ids.values()):
            raise ShearingError(f"tokenizer {path}: padding or post_processor name ids {sorted(lost)} of no token")
        self.must = self.special | unknown | single | named
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._piece_of = {number: piece for piece, number in pieces.items()}

    def parts(self, number: int) -> set[int]:
        if number not in self._piece_of:
            return {number}
        symbols = derivation(self._piece_of[number], lambda left, right: self._ranks.get((left, right)))
        return {number, *(self.ids[symbol] for symbol in symbols if symbol in self.ids)}

    def cut(self, new: Mapping[int, int]) -> bytes:
        data = json.loads(json.dumps(self.data))
        model = data["model"]
        model["vocab"] = {self._piece_of[i]: new[i] for i in sorted(self._piece_of) if i in new}
        model["merges"] = [
            merge
            for merge, pair in zip(model.get("merges") or (), self._merges, strict=True)
            if all(piece in model["vocab"] for piece in (*pair, "".join(pair)))
        ]
        for token in data.get("added_tokens") or ():
            token["id"] = new[token["id"]]
        if data.get("padding"):
            data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
        _renumber_processor(data.get("post_processor"), new)
        return json.dumps(data, ensure_ascii=False, indent=2).encode()


def _named(data: Mapping[str, Any]) -> Iterator[int]:
    """Ids that padding and the post-processor put beside a text."""
    if data.get("padding"):
        yield data["padding"]["pad_id"]
    waiting = [data.get("post_processor")]
    while waiting:
        if processor := waiting.pop():
            waiting += processor.get("processors") or ()
            for token in (processor.get("special_tokens") or {}).values():
                yield from token["ids"]
            yield from (processor[name][1] for name in ("sep", "cls") if name in processor)


def _renumber_processor(processor: dict[str, Any] | None, new: Mapping[int, int]) -> None:
    """Ids inside of the post-processor, in place."""
    if processor is None:
        return
    for inner in processor.get("processors") or ():
        _renumber_processor(inner, new)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[number] for number in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], new[processor[name][1]]]


READERS: dict[str, Callable[[Path], Tokens]] = {"tokenizer.json": TokenizerJson, "tokenizer.model": SentencePiece}
