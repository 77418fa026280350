"""Which model a teacher is: hashes of its config, its tensors and its tokenizer, whatever the files are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from llmshearing.checkpoints.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from llmshearing.checkpoints.hf_config import read_config
from llmshearing.errors import ShearingError
from llmshearing.progress import tqdm
from llmshearing.storage import open_weights

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Keys of a config that do not change what is computed from given tensors, or are as transformers is."""


def identify(name: Path | str) -> dict[str, str]:
    """``name`` and the hashes ``config``, ``weights`` and, where there is one, ``tokenizer``.

    Reads the weights once, one tensor at a time. A model that is saved again, in other shards, has the same hashes;
    with another dtype it is another model.

    Raises:
        ShearingError: it cannot be read.
    """
    config, tokenizer = describe(name)
    weights: Mapping[str, Tensor] = open_weights(name) if not is_checkpoint(name) else _checkpoint(name).weights
    found = {"name": str(name), "config": _hash_config(config.to_dict()), "weights": _hash_weights(weights)}
    if (read := tokenizer_hash(tokenizer)) is not None:
        found["tokenizer"] = read
    return found


def describe(name: Path | str) -> tuple[PretrainedConfig, str | None]:
    """Config, and directory of the tokenizer, of a Hugging Face directory or name or a checkpoint.

    Raises:
        ShearingError: it cannot be read, or is a checkpoint with masks.
    """
    if not is_checkpoint(name):
        return read_config(name), str(name)
    checkpoint = _checkpoint(name)
    if checkpoint.masks:
        raise ShearingError(f"teacher {name} still has its pruning masks; fold it first")
    return checkpoint.info.config, checkpoint.info.tokenizer


def _checkpoint(name: Path | str) -> Checkpoint:
    return read_checkpoint(name, verify=False)  # each tensor is compared with its checksum as it is read


def tokenizer_hash(directory: str | None) -> str | None:
    """Name and SHA-256 of the tokenizer's file in a directory; None where it has none.

    Of a `tokenizer.json` its tokens and their ids count: written again, it may look different.
    """
    for name in TOKENIZERS if directory else ():
        file = Path(str(directory)) / name
        if file.is_file():
            return f"{name} {sha256(said_by(file)).hexdigest()}"
    return None


def said_by(file: Path) -> bytes:
    """What a tokenizer's file says: of a `tokenizer.json` tokens and ids, of others, and of broken ones, the bytes."""
    if file.suffix != ".json":
        return file.read_bytes()
    try:
        return json.dumps(sorted(Tokenizer.from_file(str(file)).get_vocab().items())).encode()
    except Exception:  # tokenizers raises bare exceptions
        return file.read_bytes()


def _hash_config(values: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in values.items() if key not in PASSING}
    return sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _hash_weights(weights: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name in tqdm(sorted(weights), desc="identifying the teacher", unit="tensor", leave=False):
        value = weights[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
