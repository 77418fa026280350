"""Composer checkpoints as plain values: one `.pt` file in, weights, masks and what they are out, and back.

    {"state": {"model":     {"model.<name in transformers>": tensor, "masks.<name in L0Masks>": tensor},
               "callbacks": {"CheckpointInfo": {hf_config, masks, run_config, tokenizer, history}}, ...}, ...}

Training writes such files through Composer, the converters through :func:`save_checkpoint`. Everything loads with
``weights_only=True``; weights are mapped from the file, not read into memory.
"""

from __future__ import annotations

import datetime
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from llmshearing.axes import Table
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.masks.l0 import L0Masks

LATEST = "latest-rank0.pt"
WEIGHTS, MASKS, INFO = "model.", "masks.", "CheckpointInfo"
# What a file without CheckpointInfo does not tell and its reader must.
SHAPE_KEYS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")


@dataclass(frozen=True)
class CheckpointInfo:
    """What the tensors of a checkpoint are. Plain data."""

    hf_config: dict[str, Any]
    """``config.to_dict()`` of the model in the file."""
    masks: dict[str, Any] | None = None
    """kinds, target, target_sparsity, start_sparsity, seed, head_mode of its masks; None: it has none."""
    run_config: str | None = None
    """YAML of the training run."""
    tokenizer: str | None = None
    """Path or name of the tokenizer."""
    history: list[str] = field(default_factory=list)
    """What was done to make it, oldest first."""
    generation_config: dict[str, Any] | None = None
    """The source's, where it had one."""
    evaluation: dict[str, Any] | None = None
    """``batch``, ``loss`` and ``domains`` (nats per token) of the last evaluation of the model that is in the file, or
    that its masks fold to; None: there was none."""

    @property
    def config(self) -> PretrainedConfig:
        """The model's config as an object of transformers."""
        try:
            return AutoConfig.for_model(**self.hf_config)
        except (TypeError, ValueError, KeyError) as error:
            raise ShearingError(f"config of the checkpoint cannot be used: {error}") from error

    def then(self, done: str, **changes: Any) -> CheckpointInfo:
        """This information after one more step of its history."""
        return replace(self, history=[*self.history, done], **changes)


@dataclass(frozen=True)
class Checkpoint:
    """weights: transformers' names -> tensor (mapped from the file); masks: names of L0Masks -> tensor."""

    path: Path
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    info: CheckpointInfo

    @property
    def table(self) -> Table:
        """The model's table, with its heads cut as its masks cut them."""
        return table_for(self.info.config, (self.info.masks or {}).get("head_mode", "group"))


def checkpoint_file(path: Path | str) -> Path:
    """The file meant by ``path``: itself, or the newest checkpoint of a directory.

    Raises:
        ShearingError: there is no such file.
    """
    path = Path(path)
    file = path / LATEST if path.is_dir() else path
    if not file.is_file():
        hint = f"the directory has no {LATEST}" if path.is_dir() else "no such file"
        raise ShearingError(f"checkpoint {path}: {hint}")
    return file


def read_checkpoint(path: Path | str, *, foreign: Mapping[str, Any] | None = None, verify: bool = True) -> Checkpoint:
    """Read a checkpoint and check it against its family's table.

    Args:
        path: a `.pt` file, or a directory with `latest-rank0.pt`.
        foreign: config keys to use where the file has no CheckpointInfo (another program wrote it).
        verify: compare every record with its checksum (one pass over the file).

    Raises:
        ShearingError: missing, damaged, no checkpoint, or its tensors and its config disagree.
    """
    file = checkpoint_file(path)
    state = _load(file, verify)
    if not isinstance(state, dict) or not isinstance((state.get("state") or {}).get("model"), dict):
        raise ShearingError(f"{file} is no Composer checkpoint: it has no ['state']['model']")
    tensors = {name.removeprefix("module."): value for name, value in state["state"]["model"].items()}
    weights = {name[len(WEIGHTS) :]: value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    masks = {name[len(MASKS) :]: value for name, value in tensors.items() if name.startswith(MASKS)}
    unknown = [name for name in tensors if not name.startswith((WEIGHTS, MASKS))]
    if unknown or not weights:
        shown = ", ".join((unknown or ["none"])[:3])
        raise ShearingError(f"{file}: its model's keys ({shown}, ...) are not {WEIGHTS}<name in transformers>")
    info = _info(file, (state["state"].get("callbacks") or {}).get(INFO), foreign or {})
    checkpoint = Checkpoint(file, weights, masks, info)
    _check_weights(checkpoint)
    return checkpoint


def load_masks(checkpoint: Checkpoint) -> L0Masks:
    """The masks of a pruning run, strictly.

    Raises:
        ShearingError: the checkpoint has none, or they do not fit its model.
    """
    about = checkpoint.info.masks
    if about is None or not checkpoint.masks:
        raise ShearingError(
            f"{checkpoint.path}: checkpoint without masks, there is nothing to fold. Give one that a pruning run "
            "(model.l0_module) saved; a model that is already compact goes to composer_to_hf as it is"
        )
    keys = ("kinds", "target", "target_sparsity", "start_sparsity", "seed")
    try:
        masks = L0Masks(checkpoint.table, **{key: about[key] for key in keys})
        masks.load_state_dict(checkpoint.masks, strict=True)
    except KeyError as error:
        raise ShearingError(f"{checkpoint.path}: CheckpointInfo does not tell {error} of the masks") from error
    except RuntimeError as error:
        raise ShearingError(f"{checkpoint.path}: masks do not fit the model: {error}") from error
    bad = [name for name, value in masks.named_parameters() if not value.isfinite().all()]
    if bad:
        raise ShearingError(f"{checkpoint.path}: masks are not finite: {', '.join(bad)}")
    return masks.requires_grad_(False)


def save_checkpoint(
    path: Path | str,
    weights: Mapping[str, Tensor],
    info: CheckpointInfo,
    masks: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint in Composer's layout: under a temporary name, synced, then renamed."""
    path = Path(path)
    model = {WEIGHTS + name: _own(value) for name, value in weights.items()}
    model |= {MASKS + name: _own(value) for name, value in (masks or {}).items()}
    state = {"state": {"model": model, "callbacks": {INFO: asdict(info)}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _own(value: Tensor) -> Tensor:
    """Detached, and without the rest of a larger storage, which torch.save would write too."""
    value = value.detach()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def _load(file: Path, verify: bool) -> Any:
    try:
        if verify and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if bad := archive.testzip():
                    raise ShearingError(f"checkpoint {file} is damaged: checksum of its record {bad} is wrong")
        with torch.serialization.safe_globals(plain_types()):
            return torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if isinstance(error, ShearingError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShearingError(f"checkpoint {file} is damaged or no checkpoint of torch.save: {reason}") from error


def plain_types() -> list[Any]:
    """The types beyond torch's own list in Composer's files: RNG and timestamps. None of them runs code."""
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    # Its module moved between numpy 1 and 2: files of either load.
    arrays = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    dtypes = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SUO"]
    return [*arrays, np.ndarray, np.dtype, *dtypes, datetime.timedelta, torch.torch_version.TorchVersion]


def _info(file: Path, told: Any, foreign: Mapping[str, Any]) -> CheckpointInfo:
    if isinstance(told, dict) and isinstance(told.get("hf_config"), dict):
        known = {item.name for item in fields(CheckpointInfo)}
        return CheckpointInfo(**{key: value for key, value in told.items() if key in known})
    missing = [key for key in SHAPE_KEYS if key not in foreign]
    if missing:
        raise ShearingError(
            f"{file} has no CheckpointInfo (another program wrote it), so its shape must be given on the command line; "
            f"missing: {' '.join(f'{key}=' for key in missing)} (and vocab_size=, num_key_value_heads= and whatever "
            "else differs from the defaults of LlamaConfig)"
        )
    try:
        config = AutoConfig.for_model(**{"model_type": "llama", **foreign})
    except (TypeError, ValueError) as error:
        raise ShearingError(f"{file}: the shape on the command line makes no config: {error}") from error
    return CheckpointInfo(config.to_dict(), history=[f"read {file.name}, which does not tell how it was made"])


def _check_weights(checkpoint: Checkpoint) -> None:
    """Names and shapes against the table; tied tensors against the tensor that they are."""
    weights = checkpoint.weights
    tied = {name: spec.alias for name, spec, _ in checkpoint.table.instances() if spec.alias}
    for name, alias in tied.items():
        if alias in weights:
            weights.setdefault(name, weights[alias])
    try:
        checkpoint.table.check({name: tuple(value.shape) for name, value in weights.items()})
    except ShearingError as error:
        raise ShearingError(f"{checkpoint.path}: {error}") from error
    for name, alias in tied.items():
        one, other = weights[name], weights[alias]
        if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):
            raise ShearingError(f"{checkpoint.path}: {name} and {alias} differ, but the config ties them")
        weights[name] = other
