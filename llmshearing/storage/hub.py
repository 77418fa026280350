"""The weights of a Hugging Face model, directory or name, read tensor by tensor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from llmshearing.errors import ShearingError
from llmshearing.files import is_plain_name
from llmshearing.storage.lazy import LazyTensor, LazyTensors
from llmshearing.storage.torch_file import TorchFile
from llmshearing.storage.write import DTYPES

log = logging.getLogger(__name__)

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_BY_NAME = {name: dtype for dtype, (_, name) in DTYPES.items()}


def open_weights(model: Path | str) -> LazyTensors:
    """All tensors of a model, from the files that transformers would take.

    That is the single file before the index of shards, and safetensors before files of torch.save. What else is there,
    such as shards of an earlier version, is left aside, and said.

    Raises:
        ShearingError: there are none, a file is missing or damaged, or the index names a file elsewhere.
    """
    for name, read in ((SAFETENSORS, _safetensors), (PICKLED, _pickled)):
        if (found := _find(model, name)) is not None:
            _say_others(model, found)
            return _merged(model, found, read)
    raise ShearingError(f"Hugging Face model {model} has no {SAFETENSORS} and no {PICKLED}, whole or with {_INDEX}")


@dataclass(frozen=True)
class _Found:
    """Files of one form; of shards also the index, and the tensors that it lists."""

    files: list[Path]
    index: Path | None = None
    listed: frozenset[str] = frozenset()


def _merged(model: Path | str, found: _Found, read: Callable[[Path], dict[str, LazyTensor]]) -> LazyTensors:
    entries: dict[str, LazyTensor] = {}
    for file in found.files:
        # A tensor that the index does not list is left aside, as transformers does.
        part = {name: entry for name, entry in read(file).items() if found.index is None or name in found.listed}
        if twice := sorted(entries.keys() & part):
            raise ShearingError(f"Hugging Face model {model}: {twice[0]} is in {file.name} and in another file")
        entries |= part
    return LazyTensors(entries)


def _find(model: Path | str, name: str) -> _Found | None:
    """The files of one form: the single one, or those that its index lists."""
    single = find_file(model, name)
    if single is not None:
        return _Found([single])
    index = find_file(model, name + _INDEX)
    return None if index is None else _listed(model, index)


def _say_others(model: Path | str, taken: _Found) -> None:
    """Log which further files of weights a directory has."""
    folder = Path(model)
    if folder.is_dir():
        patterns = ("model*.safetensors", "pytorch_model*.bin", f"*{_INDEX}")
        there = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
        used = {file.name for file in (*taken.files, *filter(None, [taken.index]))}
        if others := [name for name in there if name not in used]:
            main = taken.index or taken.files[0]
            log.warning(
                "warning: %s: taking %s, as transformers does; left aside: %s", model, main.name, ", ".join(others)
            )


def _listed(model: Path | str, index: Path) -> _Found:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
        outside = [shard for shard in shards if not is_plain_name(shard)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShearingError(f"{index} is no index of weights: {type(error).__name__}: {str(error)[:80]}") from error
    if outside:
        raise ShearingError(f"{index} names the file {outside[0]!r}, which is not beside it")
    if not shards:
        raise ShearingError(f"{index} lists no tensor")
    files = {shard: find_file(model, shard) for shard in shards}
    if missing := [shard for shard, file in files.items() if file is None]:
        raise ShearingError(f"Hugging Face model {model}: {missing[0]}, which its index lists, is missing")
    return _Found([file for file in files.values() if file is not None], index, frozenset(places))


def find_file(model: Path | str, name: str) -> Path | None:
    """A file of the model, from the hub if need be; None where it has no such file."""
    try:
        found = cached_file(str(model), name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ShearingError(f"Hugging Face model {model} cannot be loaded: {error}") from error
    return Path(found) if found is not None else None


def _safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {
                name: LazyTensor(tuple(part.get_shape()), _BY_NAME[part.get_dtype()], partial(_read, file, name))
                for name in opened.keys()  # noqa: SIM118 - not a mapping
                for part in [opened.get_slice(name)]
            }
    except KeyError as error:
        raise ShearingError(f"{file} has tensors of {error}; there are {', '.join(_BY_NAME)}") from error
    except Exception as error:  # safetensors raises its own kind, and others for strange files
        raise ShearingError(f"{file} is damaged or no file of safetensors: {error}") from error


def _read(file: Path, name: str) -> Tensor:
    """A copy: safetensors maps the file, and mapped pages count as memory for as long as it is open."""
    try:
        with safe_open(str(file), framework="pt") as opened, torch.no_grad():
            return opened.get_tensor(name).clone()
    except Exception as error:
        raise ShearingError(f"{file}: {name} cannot be read: {error}") from error


def _pickled(file: Path) -> dict[str, LazyTensor]:
    values = TorchFile(file).subtree()
    if not isinstance(values, dict) or not all(isinstance(value, LazyTensor) for value in values.values()):
        raise ShearingError(f"{file} holds something else than tensors by name")
    return values
