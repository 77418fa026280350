"""The files of Megatron's ranks, in the layout that it calls `torch`.

    latest_checkpointed_iteration.txt          a number, or `release`
    iter_0000001 | release /
        mp_rank_00[_000]/model_optim_rng.pt    of tensor-parallel rank 00 (and pipeline stage 000)
            args                               a Namespace of Megatron's arguments
            checkpoint_version                 3.0
            model                              name -> this rank's part of a tensor

Of what a file pickles nothing is run: besides plain values and tensors an allow-list of names is taken, for which
stand-ins without behaviour are made. Every tensor stays on disk until it is asked for.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshearing.errors import ShearingError
from llmshearing.families.megatron import DECISIVE
from llmshearing.files import whole_folder, write_text
from llmshearing.storage import LazyTensor, write_torch_files
from llmshearing.storage.torch_file import TorchFile

LATEST, RELEASE = "latest_checkpointed_iteration.txt", "release"
FILE = "model_optim_rng.pt"
VERSION = 3.0
RECORD = "llmshearing"  # our own key in a file, which Megatron passes over
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?")
_ITERATION = re.compile(r"iter_\d{7}")
_EXTRA = "_extra_state"  # of Transformer Engine: scales of 8-bit numbers, no part of the model


class _StandIn:
    """In place of an object of Megatron's in its arguments: keeps nothing, runs nothing."""

    def __init__(self, *told: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# The names that megatron-core 0.16.1 itself allows in its checkpoints (megatron/core/safe_globals.py).
_NAMES = (
    "types.SimpleNamespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals", "_io.BytesIO",
    "megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope", "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
)  # fmt: skip
ALLOWED: tuple[Any, ...] = (argparse.Namespace, *((_StandIn, name) for name in _NAMES))


@dataclass(frozen=True)
class Shards:
    """What the files of all ranks hold."""

    path: Path
    arguments: Mapping[str, Any]
    """Megatron's, as rank 0 has them."""
    record: Any
    """What our own export told, or None."""
    stages: Sequence[Sequence[Mapping[str, LazyTensor]]]
    """[pipeline stage][tensor-parallel rank] name -> part."""


def is_shards(path: Path | str) -> bool:
    """Whether a folder is one of Megatron's checkpoints in this layout."""
    path = Path(path)
    return path.is_dir() and ((path / LATEST).is_file() or any(_RANK.fullmatch(item.name) for item in path.iterdir()))


def iteration_folder(path: Path | str) -> Path:
    """The folder of the newest iteration, or the folder itself where it is one.

    Raises:
        ShearingError: the file that names the iteration is damaged, or names a folder that is not there.
    """
    path = Path(path)
    if not (path / LATEST).is_file():
        return path
    said = (path / LATEST).read_text(errors="replace").strip()
    name = f"iter_{int(said):07d}" if said.isascii() and said.isdigit() else said
    if name != RELEASE and not _ITERATION.fullmatch(name):
        raise ShearingError(f"{path / LATEST} says {said[:40]!r}; it must be a number or {RELEASE!r}")
    if not (path / name).is_dir():
        raise ShearingError(f"{path / LATEST} names the iteration {said}, but there is no folder {name}")
    return path / name


def open_shards(path: Path | str) -> Shards:
    """Read what all ranks hold, and none of their tensors.

    Raises:
        ShearingError: files are missing, damaged, of another version of Megatron's layout, or tell different arguments.
    """
    folder = iteration_folder(path)
    found = sorted(item.name for item in folder.iterdir() if item.name.startswith("mp_rank_"))
    if not found:
        raise ShearingError(f"{folder} has no mp_rank_00: it is no checkpoint of Megatron's ranks")
    if strange := [name for name in found if not _RANK.fullmatch(name)]:
        raise ShearingError(
            f"{folder / strange[0]} is of a rank that is neither tensor- nor pipeline-parallel; save the checkpoint "
            "without expert parallelism first"
        )
    first = read_values(folder / found[0] / FILE)
    arguments, record = read_arguments(folder / found[0] / FILE, first), first.get(RECORD)
    tp, pp = (_count(folder, arguments, name) for name in ("tensor", "pipeline"))
    names = [[rank_name(rank, stage, pp) for rank in range(tp)] for stage in range(pp)]
    expected = {name for stage in names for name in stage}
    if missing := sorted(expected - {name for name in found if (folder / name / FILE).is_file()}):
        raise ShearingError(
            f"{folder}: {', '.join(f'{name}/{FILE}' for name in missing)} missing; its arguments say {tp} "
            f"tensor-parallel ranks and {pp} pipeline stages"
        )
    if beyond := sorted(set(found) - expected):
        raise ShearingError(
            f"{folder}: {', '.join(beyond)} too many; its arguments say {tp} tensor-parallel ranks and {pp} pipeline "
            "stages"
        )
    stages = [[_checked(folder / name / FILE, arguments) for name in stage] for stage in names]
    return Shards(folder, arguments, record, stages)


def rank_name(rank: int, stage: int, stages: int) -> str:
    """The folder of a rank."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def _count(folder: Path, arguments: Mapping[str, Any], kind: str) -> int:
    number = arguments.get(f"{kind}_model_parallel_size")
    if type(number) is not int or number < 1:
        raise ShearingError(f"{folder}: its arguments say {kind}_model_parallel_size = {number!r}")
    return number


def read_values(file: Path) -> dict[str, Any]:
    """The values of one file, a lazy tensor in place of each tensor.

    Raises:
        ShearingError: it is missing, damaged, or holds more than plain values and the names that are allowed.
    """
    if not file.is_file():
        raise ShearingError(f"{file} is missing")
    values = TorchFile(file, allowed=ALLOWED).subtree()
    if not isinstance(values, dict):
        raise ShearingError(f"{file} holds no checkpoint of Megatron")
    return values


def read_arguments(file: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments in a file.

    Raises:
        ShearingError: there are none, or the file's version is another than the one that is known.
    """
    if (version := values.get("checkpoint_version")) != VERSION:
        raise ShearingError(f"{file}: checkpoint_version = {version}; only {VERSION} can be read")
    if not isinstance(values.get("args"), argparse.Namespace):
        raise ShearingError(f"{file} has no arguments of Megatron (args)")
    return vars(values["args"])


def _checked(file: Path, arguments: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """The tensors of a rank whose arguments are those of the others."""
    values = read_values(file)
    own = read_arguments(file, values)
    if not isinstance(values.get("model"), dict):
        several = [str(key) for key in values if str(key).startswith("model")]
        why = f"it has {', '.join(several)}: virtual pipeline stages" if several else "it has none"
        raise ShearingError(f"{file}: there must be one model in it, and {why}")
    if off := [key for key in DECISIVE if own.get(key) != arguments.get(key)]:
        told = ", ".join(f"{key} = {own.get(key)}, not {arguments.get(key)}" for key in off[:4])
        raise ShearingError(f"{file} disagrees with the first rank: {told}")
    model = {str(name): value for name, value in values["model"].items() if _EXTRA not in str(name)}
    if other := [name for name, value in model.items() if not isinstance(value, LazyTensor)]:
        raise ShearingError(f"{file}: {other[0]} is no tensor")
    if not model or any(name.startswith("language_model.") for name in model):
        raise ShearingError(f"{file}: its tensors are not named as megatron-core names them")
    return model


def write_shards(
    path: Path,
    stages: Sequence[Sequence[Mapping[str, LazyTensor]]],
    arguments: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Callable[[], object] | None = None,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Write the files of all ranks, tensor by tensor, under a temporary name; then rename.

    Args:
        stages: [pipeline stage][tensor-parallel rank] name -> part. record: plain data of our own.
        progress: called after each part. extra: writes further files into the folder before it gets its name.

    Raises:
        ShearingError: the folder has something in it that may not be replaced, or cannot be written.
    """
    check_output(path, overwrite)
    with whole_folder(path) as folder:
        for stage, ranks in enumerate(stages):
            files = {}
            for rank, model in enumerate(ranks):
                values = {
                    "args": argparse.Namespace(**arguments), "checkpoint_version": VERSION, "iteration": 0,
                    "model": dict(model), RECORD: dict(record),
                }  # fmt: skip
                files[folder / RELEASE / rank_name(rank, stage, len(stages)) / FILE] = values
            write_torch_files(files, progress)
        write_text(folder / LATEST, RELEASE)
        if extra is not None:
            extra(folder)
    return path


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a folder with anything in it; with ``overwrite``, with anything that is no checkpoint of Megatron."""
    if path.exists() and not path.is_dir():
        raise ShearingError(f"output {path} is a file; give the name of a directory")
    names = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    ours = {LATEST, RELEASE, "selection.safetensors", "prune.json"}
    if foreign := [name for name in names if name not in ours and not _ITERATION.fullmatch(name)]:
        raise ShearingError(f"output {path} exists with something else in it: {', '.join(foreign[:3])}")
    if names and not overwrite:
        raise ShearingError(f"output {path} exists and holds a model; give another name, or --overwrite to replace it")
