"""The weights of a Hugging Face model, directory or name, read tensor by tensor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
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
        files = list(_files(model, name))
        if files:
            _say_others(model, files)
            return _merged(model, files, read)
    raise ShearingError(f"Hugging Face model {model} has no {SAFETENSORS} and no {PICKLED}, whole or with {_INDEX}")


def _merged(model: Path | str, files: list[Path], read: Callable[[Path], dict[str, LazyTensor]]) -> LazyTensors:
    entries: dict[str, LazyTensor] = {}
    for file in files:
        found = read(file)
        if twice := sorted(entries.keys() & found):
            raise ShearingError(f"Hugging Face model {model}: {twice[0]} is in {file.name} and in another file")
        entries |= found
    return LazyTensors(entries)


def _files(model: Path | str, name: str) -> Iterator[Path]:
    """The files of one form: the single one, or those that its index lists."""
    single = find_file(model, name)
    if single is not None:
        return iter([single])
    index = find_file(model, name + _INDEX)
    return iter(()) if index is None else _listed(model, index)


def _say_others(model: Path | str, files: list[Path]) -> None:
    """Log which further files of weights a directory has."""
    folder = Path(model)
    if folder.is_dir():
        patterns = ("model*.safetensors", "pytorch_model*.bin", f"*{_INDEX}")
        found = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        used = {file.name for file in files} | ({SAFETENSORS + _INDEX, PICKLED + _INDEX} if len(files) > 1 else set())
        if others := [name for name in found if name not in used]:
            log.warning(
                "warning: %s: taking %s, as transformers does; left aside: %s",
                *(model, files[0].name if len(files) == 1 else f"{len(files)} shards", ", ".join(others)),
            )


def _listed(model: Path | str, index: Path) -> Iterator[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [shard for shard in shards if not is_plain_name(shard)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShearingError(f"{index} is no index of weights: {error!r}") from error
    if outside:
        raise ShearingError(f"{index} names the file {outside[0]!r}, which is not beside it")
    for shard in shards:
        file = find_file(model, shard)
        if file is None:
            raise ShearingError(f"Hugging Face model {model}: {shard}, which its index lists, is missing")
        yield file


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
