"""Read Composer checkpoints as plain values (weights, masks, and a description of both), and write them.

    {"state": {"model":     {"model.<name in transformers>": tensor, "masks.<name in L0Masks>": tensor},
               "callbacks": {"CheckpointInfo": {hf_config, masks, run_config, tokenizer, history}}, ...}, ...}

Training writes this through Composer, as one `.pt` file or as a sharded folder; the converters write `.pt` files
through :func:`save_checkpoint`. :mod:`llmshearing.storage` reads both forms. It unpickles plain data only. Each weight
stays on disk until it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from llmshearing.checkpoints.generation import constructible
from llmshearing.compat import of_config
from llmshearing.errors import ShearingError
from llmshearing.families import DEFAULT, table_for
from llmshearing.families.names import GROUPS, HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB
from llmshearing.families.portable import portable
from llmshearing.families.table import Table
from llmshearing.masks.l0 import L0Masks, no_energy
from llmshearing.storage import Archive, LazyTensor, LazyTensors, lazily, open_archive, write_torch_file
from llmshearing.storage.archive import is_sharded

LATEST = "latest-rank0.pt"
WEIGHTS, MASKS, INFO = "model.", "masks.", "CheckpointInfo"
# Sizes that the user must give for a file without CheckpointInfo.
NEEDED = (HIDDEN, HEADS, LAYERS, INTERMEDIATE)


@dataclass(frozen=True)
class CheckpointInfo:
    """Describes the tensors of a checkpoint. Plain data."""

    hf_config: dict[str, Any]
    """``config.to_dict()`` of the model in the file."""
    masks: dict[str, Any] | None = None
    """kinds, target, target_sparsity, start_sparsity, seed, constraint, noise, energy (whether norms count it) and
    head_mode of its masks; None: it has none."""
    run_config: str | None = None
    """YAML of the training run."""
    tokenizer: str | None = None
    """Path or name of the tokenizer."""
    history: list[str] = field(default_factory=list)
    """What was done to make it, oldest first."""
    generation_config: dict[str, Any] | None = None
    """The source's, where it had one."""
    evaluation: dict[str, Any] | None = None
    """The last evaluation of this model, or of the model that its masks fold to: ``batch``, ``loss`` and ``domains``,
    in nats per token. None: there was none."""

    @property
    def config(self) -> PretrainedConfig:
        """The model's config as an object of transformers."""
        try:
            return constructible(AutoConfig.for_model(**self.hf_config))
        except Exception as error:  # transformers takes any key, and each may fail in its own way
            raise ShearingError(f"config of the checkpoint cannot be used: {of_config(error)}") from error

    def then(self, done: str, **changes: Any) -> CheckpointInfo:
        """This information after one more step of its history."""
        return replace(self, history=[*self.history, done], **changes)


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """A config as JSON would keep it, under keys that transformers 4.57 and 5 read; torch dtypes become names."""
    return json.loads(json.dumps(portable(config.to_dict()), default=str))


MAPPINGS = ("hf_config", "masks", "generation_config", "evaluation")  # saved by a run as lists of pairs
_OR_NONE = type(None)
_INFO_TYPES: dict[str, Any] = {
    "masks": (dict, _OR_NONE),
    "run_config": (str, _OR_NONE),
    "tokenizer": (str, _OR_NONE),
    "history": list,
    "generation_config": (dict, _OR_NONE),
    "evaluation": (dict, _OR_NONE),
}


@dataclass(frozen=True)
class Checkpoint:
    """weights: names in transformers -> tensor; each is read on access. masks: names of L0Masks -> tensor."""

    path: Path
    weights: LazyTensors
    masks: dict[str, Tensor]
    info: CheckpointInfo

    @property
    def table(self) -> Table:
        """The model's table, in the head mode of its masks."""
        return table_for(self.info.config, (self.info.masks or {}).get("head_mode", "group"))


def checkpoint_file(path: Path | str) -> Path:
    """The checkpoint that ``path`` means: the file or sharded folder itself, or the newest one of a run's directory.

    Raises:
        ShearingError: there is no such file.
    """
    path = Path(path)
    file = path / LATEST if path.is_dir() and not is_sharded(path) else path
    if not file.is_file() and not is_sharded(file):
        hint = f"the directory has no {LATEST}" if path.is_dir() else "no such file"
        raise ShearingError(f"checkpoint {path}: {hint}")
    return file


def is_checkpoint(path: Path | str) -> bool:
    """Whether ``path`` means a checkpoint: a file, a sharded folder, a folder with one, or a name in `.pt`."""
    path = Path(path)
    return path.is_file() or path.suffix == ".pt" or (path / LATEST).exists() or is_sharded(path)


def read_checkpoint(path: Path | str, *, foreign: Mapping[str, Any] | None = None, verify: bool = True) -> Checkpoint:
    """Read a checkpoint and check it against its family's table. Each weight is read later, when it is used.

    Args:
        path: a `.pt` file, a sharded folder, or a directory whose `latest-rank0.pt` is one of these.
        foreign: config keys to use if the file has no CheckpointInfo (another program wrote it).
        verify: compare the whole checkpoint with its checksums now, in one pass. Each later read compares its part.

    Raises:
        ShearingError: it is missing, damaged or no checkpoint, or its tensors and its config disagree. A later read of
            a weight raises it too, if the checksum is wrong.
    """
    file = checkpoint_file(path)
    archive = open_archive(file)
    if verify:
        archive.verify()
    weights, masks = _tensors(archive)
    info = _info(file, archive.subtree("state", "callbacks", INFO), foreign or {})
    table = table_for(info.config, (info.masks or {}).get("head_mode", "group"))
    masks_in_memory = {name: mask.make() for name, mask in masks.items()}
    return Checkpoint(file, check_weights(str(file), weights, table), masks_in_memory, info)


def _tensors(archive: Archive) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Weights and masks by name."""
    model = archive.subtree("state", "model")
    if not isinstance(model, dict):
        raise ShearingError(f"{archive.path} is no Composer checkpoint: it has no ['state']['model']")
    tensors = {str(name).removeprefix("module."): value for name, value in model.items()}
    weights = {name[len(WEIGHTS) :]: value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    masks = {name[len(MASKS) :]: value for name, value in tensors.items() if name.startswith(MASKS)}
    unknown = [name for name in tensors if not name.startswith((WEIGHTS, MASKS))]
    if unknown or not weights:
        shown = ", ".join((unknown or ["none"])[:3])
        raise ShearingError(f"{archive.path}: its model's keys ({shown}, ...) are not {WEIGHTS}<name in transformers>")
    if other := [name for name, value in tensors.items() if not isinstance(value, LazyTensor)]:
        raise ShearingError(f"{archive.path}: {other[0]} is no tensor")
    return weights, masks


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
    later = ("constraint", "noise")  # older checkpoints do not tell them: they have the defaults
    try:
        told = {key: about[key] for key in keys} | {key: about[key] for key in later if key in about}
        masks = L0Masks(checkpoint.table, **told)
        if about.get("energy"):
            masks.count_energy(no_energy(masks.table))
        masks.load_state_dict(checkpoint.masks, strict=True)
    except KeyError as error:
        raise ShearingError(f"{checkpoint.path}: CheckpointInfo does not tell {error} of the masks") from error
    except ShearingError as error:
        raise ShearingError(f"{checkpoint.path}: {error}") from error
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
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
    progress: Callable[[], object] | None = None,
) -> Path:
    """Write a checkpoint in Composer's layout: tensor by tensor, under a temporary name, synced, then renamed.

    Args:
        weights: by name in transformers. :class:`LazyTensors` are made one at a time.
        progress: called after each tensor.
    """
    model = {WEIGHTS + name: entry for name, entry in lazily(weights).entries.items()}
    model |= {MASKS + name: entry for name, entry in lazily(masks or {}).entries.items()}
    state = {"state": {"model": model, "callbacks": {INFO: asdict(info)}}}
    return write_torch_file(Path(path), state, progress)


def _info(file: Path, told: Any, foreign: Mapping[str, Any]) -> CheckpointInfo:
    if isinstance(told, dict):
        told = {key: _mapping(value) if key in MAPPINGS else value for key, value in told.items()}
    if isinstance(told, dict) and isinstance(told.get("hf_config"), dict):
        known = {item.name for item in fields(CheckpointInfo)}
        info = CheckpointInfo(**{key: value for key, value in told.items() if key in known})
        if wrong := [key for key, kinds in _INFO_TYPES.items() if not isinstance(getattr(info, key), kinds)]:
            raise ShearingError(f"{file}: {', '.join(wrong)} in its CheckpointInfo is not what it should be")
        return info
    missing = [DEFAULT.keys[size] for size in NEEDED if DEFAULT.keys[size] not in foreign]
    if missing:
        raise ShearingError(
            f"{file} has no CheckpointInfo (another program wrote it), so its shape must be given on the command line; "
            f"missing: {' '.join(f'{key}=' for key in missing)} (and {DEFAULT.keys[VOCAB]}=, {DEFAULT.keys[GROUPS]}= "
            f"and whatever else differs from the defaults of a {DEFAULT.name} config)"
        )
    try:
        config = AutoConfig.for_model(**{"model_type": DEFAULT.name, **foreign})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ShearingError(f"{file}: the shape on the command line makes no config: {of_config(error)}") from error
    return CheckpointInfo(plain_config(config), history=[f"read {file.name}, which does not tell how it was made"])


def _mapping(value: Any) -> Any:
    """A list of pairs, as callbacks/checkpoint_info.py writes it, as a dict; anything else as it is."""
    if not isinstance(value, list):
        return value
    pairs = all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)
    return dict(value) if pairs else value


def check_weights(where: str, weights: Mapping[str, LazyTensor], table: Table) -> LazyTensors:
    """Compare names and shapes with the table. Tied tensors must be equal, and become one.

    Raises:
        ShearingError: beginning with ``where``, and naming every tensor that does not belong.
    """
    weights = dict(weights)
    tied = {name: spec.alias for name, spec, _ in table.instances() if spec.alias}
    for name, alias in tied.items():
        if alias in weights:
            weights.setdefault(name, weights[alias])
    try:
        table.check({name: value.shape for name, value in weights.items()})
    except ShearingError as error:
        raise ShearingError(f"{where}: {error}") from error
    for name, alias in tied.items():
        one, other = weights[name], weights[alias]
        if one is not other and not torch.equal(one.make(), other.make()):
            raise ShearingError(f"{where}: {name} and {alias} differ, but the config ties them")
        weights[name] = other
    return LazyTensors(weights)
