"""A model in any form -> a GGUF file with its tokenizer, checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmshearing.checkpoints.arguments import LABEL
from llmshearing.checkpoints.card import tokenizer_of
from llmshearing.checkpoints.checkpoint import CheckpointInfo
from llmshearing.checkpoints.hf_read import check_given, looks_local
from llmshearing.checkpoints.output import check_file
from llmshearing.checkpoints.parity import certify, parity_file
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.gguf.metadata import context
from llmshearing.families.names import VOCAB
from llmshearing.files import whole
from llmshearing.gguf.check import gguf_parity
from llmshearing.gguf.tokenizer import NO_TOKENIZER, tokenizer_keys
from llmshearing.gguf.write import check_held, write_gguf
from llmshearing.storage import lazily

log = logging.getLogger(__name__)

SUFFIX = ".gguf"


def export_gguf(
    weights: Mapping[str, Tensor],
    info: CheckpointInfo,
    output: Path,
    given: Mapping[str, Any],
    *,
    where: str,
    dtype: str | None = None,
    pre: str | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """Write a model and what is known of it as a GGUF file.

    Args:
        given: facts to check; or tokenizer (directory or name), _name_or_path (the model's name). where: what holds
            the model, for messages. dtype: see :func:`~.write.write_gguf`. pre: see :func:`~.tokenizer.tokenizer_keys`.

    Raises:
        ShearingError: llama.cpp cannot hold the model or its tokenizer, a fact is wrong, or the output exists.
        ParityError: what was written is another function; it is kept under another name.
    """
    check_file(output, overwrite)
    config = info.config
    check_given({key: value for key, value in given.items() if key != "dtype"}, config, where)
    table = table_for(config)
    check_held(config, table)
    keys = _tokenizer(given.get("tokenizer"), info, table.sizes()[VOCAB], pre, output)
    if (longest := context(config, table)) < (getattr(config, "max_position_embeddings", None) or longest):
        log.warning(
            "warning: llama.cpp has no windows for this family: the file says %d tokens, up to which it is the same",
            longest,
        )
    name = str(given.get(LABEL) or config.name_or_path or Path(where).name)
    entries = lazily(weights).entries
    with whole(output) as temporary:
        write_gguf(weights, config, temporary, name=name, dtype=dtype, tokenizer=keys)
        if check:
            parity = gguf_parity(temporary, entries, config)
            certify(parity, temporary, output, parity_file(output))
            log.info("checked: %s", parity.said())
    log.info("wrote a GGUF file (%s parameters) to %s", f"{table.count():,}", output)
    return output


def _tokenizer(given: Any, info: CheckpointInfo, size: int, pre: str | None, output: Path) -> Mapping[str, Any]:
    """Keys of the tokenizer: of the one that was asked for, or else of the model's own where it has one."""
    source = str(given) if given is not None else tokenizer_of(info)
    if source is None or (given is None and looks_local(source) and not _has_tokenizer(Path(source))):
        log.warning("warning: %s has no tokenizer (tokenizer=DIR adds one): none is known", output)
        return NO_TOKENIZER
    if looks_local(source) and not Path(source).exists():
        raise ShearingError(f"tokenizer {source} does not exist")
    return tokenizer_keys(source, size, pre)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
