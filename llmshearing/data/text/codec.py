"""Text to ids and back by a tokenizer's own file, for tokenizers without BOS and EOS too.

Text that merely spells a special token (`</s>` in a web page) stays text. Importing this needs neither torch nor
transformers.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from llmshearing.data.text.long import encode_all
from llmshearing.errors import ShearingError

FILES = ("tokenizer.json", "tokenizer.model")


class Codec:
    """Text to ids and back by the first of these files that a directory has.

    Raises:
        ShearingError: neither is there, or it cannot be loaded.
    """

    def __init__(self, directory: Path | str, *files: str) -> None:
        names = files or FILES
        found = [Path(directory) / name for name in names if (Path(directory) / name).is_file()]
        if not found:
            raise ShearingError(f"{directory} has no {' and no '.join(names)}")
        self.path = found[0]
        self.model = load_file(self.path)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids without BOS and EOS."""
        if self.path.suffix == ".model":
            return self.model.encode(texts, out_type=int)
        return encode_all(self.model, texts)

    def decode(self, ids: list[int]) -> str:
        return (
            self.model.decode(ids)
            if self.path.suffix == ".model"
            else self.model.decode(ids, skip_special_tokens=False)
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def load_file(path: Path) -> Any:
    """The library's object of a tokenizer file: tokenizers' or sentencepiece's.

    Raises:
        ShearingError: it cannot be loaded.
    """
    try:
        if path.suffix == ".model":
            from sentencepiece import SentencePieceProcessor

            return SentencePieceProcessor(model_file=str(path))
        from tokenizers import Tokenizer

        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # both raise many kinds
        raise ShearingError(f"tokenizer {path} cannot be loaded: {error}") from error
    as_plain_text(loaded)
    return loaded


def as_plain_text(backend: Any) -> None:
    """Have a tokenizer encode the whole of every text, and what spells a special token as the characters it is made of.

    SentencePiece does so anyway.
    """
    if hasattr(backend, "encode_special_tokens"):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
