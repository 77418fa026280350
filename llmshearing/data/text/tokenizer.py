"""One view on three kinds of tokenizers: a Hugging Face directory, a `tokenizer.json`, a SentencePiece model.

Documents are encoded without special tokens, and text that merely spells one (`</s>` in a web page) stays
text, so a document can never forge the BOS and EOS that `prepare` puts around it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshearing.data.json_file import read_json
from llmshearing.data.text.codec import as_plain_text, load_file
from llmshearing.data.text.long import encode_all
from llmshearing.errors import ShearingError

# BOS, EOS of widely used models, tried in this order where a bare tokenizer.json does not say which they are
COMMON_PAIRS = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


@dataclass(frozen=True)
class TextTokenizer:
    """Maps texts to ids below `vocab_size`. Travels to other processes without its files."""

    backend: Any
    """tokenizers' Tokenizer or sentencepiece's SentencePieceProcessor."""
    bos_id: int
    eos_id: int
    vocab_size: int
    fingerprint: str
    """SHA-256 of everything that decides the ids."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS. On all cores, or on one where TOKENIZERS_PARALLELISM is false."""
        if hasattr(self.backend, "encode_batch_fast"):
            return encode_all(self.backend, texts)
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1
        return self.backend.encode(texts, out_type=int, num_threads=threads)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        as_plain_text(self.backend)  # which does not travel with it


def load_tokenizer(path: Path | str, bos_token: str | None = None, eos_token: str | None = None) -> TextTokenizer:
    """Load from `path`; `bos_token` and `eos_token` override what the tokenizer says.

    Raises ShearingError if there is no tokenizer, or it has no BOS or EOS.
    """
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
        path = path / "tokenizer.model"
    if path.is_file() and path.suffix == ".model":
        return _from_sentencepiece(path, bos_token, eos_token)
    if path.is_dir() and any((path / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        backend, bos, eos = _from_directory(path)
    elif path.is_dir() and (path / "tokenizer.json").is_file():
        backend, bos, eos = _from_json(path / "tokenizer.json")
    elif path.is_file() and path.suffix == ".json":
        backend, bos, eos = _from_json(path)
    else:
        raise ShearingError(
            f"tokenizer {path} is none of: a Hugging Face directory with tokenizer_config.json, "
            "a tokenizer.json file, a SentencePiece .model file"
        )
    return _from_backend(path, backend, bos_token or bos, eos_token or eos)


def load_decoder(path: Path | str) -> Callable[[list[int]], str]:
    """Maps ids to text, special tokens shown; raises ShearingError if there is no tokenizer at `path`."""
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        path = path / "tokenizer.model"
    if path.suffix == ".model" and path.is_file():
        return load_file(path).decode
    backend = _from_json(path / "tokenizer.json" if path.is_dir() else path)[0]
    return lambda ids: backend.decode(ids, skip_special_tokens=False)


def _from_directory(path: Path) -> tuple[Any, str | None, str | None]:
    from transformers import AutoTokenizer  # slow to import, and not needed for the other kinds

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), use_fast=True, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for broken or foreign directories
        raise ShearingError(f"tokenizer {path} cannot be loaded: {error}") from error
    if not loaded.is_fast:
        raise ShearingError(f"tokenizer {path} ({type(loaded).__name__}) has no fast version; give its .model file")
    return loaded.backend_tokenizer, loaded.bos_token, loaded.eos_token


def _from_json(path: Path) -> tuple[Any, str | None, str | None]:
    backend = load_file(path)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path.parent / name).is_file():
            names = read_json(path.parent / name, "tokenizer")
            bos, eos = (_content(names.get(key)) for key in ("bos_token", "eos_token"))
            if bos or eos:
                return backend, bos, eos
    for bos, eos in COMMON_PAIRS:
        if backend.token_to_id(bos) is not None and backend.token_to_id(eos) is not None:
            return backend, bos, eos
    return backend, None, None


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _from_backend(path: Path, backend: Any, bos: str | None, eos: str | None) -> TextTokenizer:
    bos_id, eos_id = _special_ids(path, backend.token_to_id, bos, eos)
    as_plain_text(backend)
    fingerprint = _fingerprint(backend.to_str().encode(), bos_id, eos_id)
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
    return TextTokenizer(backend, bos_id, eos_id, vocab_size, fingerprint)


def _from_sentencepiece(path: Path, bos: str | None, eos: str | None) -> TextTokenizer:
    model = load_file(path)

    def lookup(token: str) -> int | None:
        found = model.piece_to_id(token)
        return None if found == model.unk_id() else found

    def own(number: int) -> str | None:
        return None if number < 0 else model.id_to_piece(number)

    bos_id, eos_id = _special_ids(path, lookup, bos or own(model.bos_id()), eos or own(model.eos_id()))
    fingerprint = _fingerprint(model.serialized_model_proto(), bos_id, eos_id)
    return TextTokenizer(model, bos_id, eos_id, model.get_piece_size(), fingerprint)


def _special_ids(path: Path, lookup: Callable[[str], int | None], bos: str | None, eos: str | None) -> tuple[int, int]:
    ids, missing = [], []
    for kind, token in (("BOS", bos), ("EOS", eos)):
        found = None if token is None else lookup(token)
        if found is None:
            missing.append(kind if token is None else f"{kind} ({token!r} is not in the vocabulary)")
        else:
            ids.append(found)
    if missing:
        raise ShearingError(f"tokenizer {path} has no {', no '.join(missing)}; name one with --bos_token / --eos_token")
    return ids[0], ids[1]


def _fingerprint(content: bytes, bos_id: int, eos_id: int) -> str:
    return hashlib.sha256(content + json.dumps([bos_id, eos_id]).encode()).hexdigest()
