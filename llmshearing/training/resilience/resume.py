"""Before a run goes on: find its newest checkpoint that is whole, set damaged ones aside, let `latest` lead there.

Composer's own loading takes a checkpoint with missing or foreign keys, and unpickles it; here the first rank reads the
file first, as plain data, and compares its keys with the run's.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, format_name_with_dist

from llmshearing import files as durable
from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.config import Config
from llmshearing.errors import ShearingError
from llmshearing.masks.l0 import L0Masks, no_energy
from llmshearing.storage import Archive, open_archive
from llmshearing.storage.torch_file import plain_types
from llmshearing.training.groups import OPTIMIZERS
from llmshearing.training.resilience.saver import WRITING
from llmshearing.training.source import Source
from llmshearing.training.start import check_start

log = logging.getLogger(__name__)

DAMAGED = ".damaged"
# What the state of a run holds beside its model; a converted checkpoint has none of it.
TRAINING = ("optimizers", "schedulers", "timestamp", "dataset_state", "callbacks")
SHARDED = "ep{epoch}-ba{batch}"  # Composer's name for the folder of a sharded checkpoint


# Plain data ------------------------------------------------------------------------------------------------------


@contextmanager
def plain_data_only(trust: bool = False) -> Iterator[None]:
    """Within the block ``torch.load`` accepts plain data alone, also where Composer asks it to unpickle anything.

    trust: leave torch and Composer as they are.

    Raises:
        ShearingError: a file holds anything else.
    """
    if trust:
        yield
        return
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(plain_types()):
            yield
    except pickle.UnpicklingError as error:
        raise ShearingError(
            f"the checkpoint holds more than plain data, and loading that may run any code: {str(error)[:200]}. "
            "Only if you made it yourself: trust_checkpoint=true"
        ) from error
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def check_files(cfg: Config) -> None:
    """Refuse before anything is built what Composer tells only later: no checkpoint to load, others in the way.

    Raises:
        ShearingError: the masks' start or load_path is not there, or save_folder holds an earlier run that would be
            mixed with this one.
    """
    if cfg.autoresume:
        return
    if cfg.load_path is None:  # masks may come from a checkpoint, and then need no start
        check_start(cfg.model.l0_module)
    if cfg.load_path is not None:
        path = Path(format_name_with_dist(cfg.load_path, cfg.run_name or ""))
        if "://" not in cfg.load_path:
            if not path.exists():
                raise ShearingError(f"load_path = {path}: no such file; give a run's checkpoint, or leave it out")
            check_load_path(cfg, path)
    elif cfg.save_folder is not None and not cfg.save_overwrite:
        names = sorted(path.name for path in Path(cfg.save_folder).glob(re.sub(r"{[^}]*}", "*", cfg.save_filename)))
        if names:
            raise ShearingError(
                f"save_folder = {cfg.save_folder} has checkpoints of an earlier run ({', '.join(names[:3])}): go on "
                "with it (autoresume=true), replace it (save_overwrite=true), or give another folder"
            )


def check_load_path(cfg: Config, path: Path) -> None:
    """Refuse a checkpoint that could run code when Composer loads it.

    Raises:
        ShearingError: it is damaged, holds more than plain data, or is a folder (whose index is a pickle) that is not
            this run's own.
    """
    if cfg.trust_checkpoint:
        return
    own = cfg.save_folder is not None and Path(cfg.save_folder).resolve() in path.resolve().parents
    if path.is_dir() and not own:
        raise ShearingError(
            f"load_path = {path} is a sharded checkpoint from outside save_folder: its index is a pickle, and loading "
            "it may run any code. Only if you made it yourself: trust_checkpoint=true"
        )
    read_checkpoint(path)


# The newest whole checkpoint -------------------------------------------------------------------------------------


def prepare(cfg: Config, source: Source, masks: L0Masks | None) -> Path | None:
    """What ``autoresume`` will go on from, the same on all ranks; None: nothing was saved yet. The first rank works.

    Raises:
        ShearingError: checkpoints are there but none is whole, or the newest is of another model.
    """
    if not cfg.autoresume or cfg.save_folder is None:
        return None
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = _prepare(cfg, source, masks)
        except ShearingError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    found, problem = answer
    if problem is not None:
        raise ShearingError(problem)
    return found


def newest_whole(cfg: Config) -> tuple[Path, Archive] | None:
    """The newest checkpoint in ``save_folder`` that is whole; damaged ones are set aside. None: nothing was saved yet.

    Raises:
        ShearingError: checkpoints are there but none is whole.
    """
    folder = Path(cfg.save_folder or "")
    shutil.rmtree(folder / WRITING, ignore_errors=True)  # of a save that was cut short
    candidates = checkpoints(folder, cfg.save_filename)
    for path in candidates:
        try:
            archive = verify(path)
        except ShearingError as error:
            aside = _set_aside(path)
            log.error("%s; it is kept as %s, and the one before it is used", error, aside.name)
            continue
        return path, archive
    if damaged := sorted(path.name for path in folder.glob(f"*{DAMAGED}*")):
        raise ShearingError(
            f"autoresume: no checkpoint in {folder} is whole; kept there: {', '.join(damaged)}. Repair or remove them, "
            "or begin anew in another save_folder"
        )
    return None


def _prepare(cfg: Config, source: Source, masks: L0Masks | None) -> Path | None:
    found = newest_whole(cfg)
    if found is None:
        return None
    path, archive = found
    _check_kind(cfg, path)
    check_same_run(archive, source, masks)
    _check_optimizer(cfg, archive)
    point_latest(cfg, path)
    return path


def point_latest(cfg: Config, path: Path) -> None:
    """Let `latest` lead to a checkpoint."""
    name = cfg.save_latest_filename.format(rank=0, local_rank=0, node_rank=0)
    durable.point(Path(cfg.save_folder or "") / name, path)


def checkpoints(folder: Path, filename: str) -> list[Path]:
    """Files of ``filename``'s pattern, and folders of sharded checkpoints, newest (by batch) first."""
    patterns = [name_pattern(filename), name_pattern(SHARDED)]
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        for pattern, is_kind in zip(patterns, (path.is_file(), path.is_dir()), strict=True):
            if is_kind and not path.is_symlink() and (match := pattern.fullmatch(path.name)):
                found.append((int(match["batch"]), path))
    return [path for _, path in sorted(found, reverse=True)]


def name_pattern(template: str) -> re.Pattern[str]:
    """What Composer's placeholders in a name may become; ``batch`` is a group."""
    parts = []
    for text, field, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(text))
        if field is not None:
            parts.append(r"(?P<batch>\d+)" if field == "batch" else "[^/]*")
    return re.compile("".join(parts))


def verify(path: Path) -> Archive:
    """Read a checkpoint whole, and see that it is the state of a training run.

    Raises:
        ShearingError: damaged, cut short, empty, or something else.
    """
    read_checkpoint(path)
    archive = open_archive(path)
    if missing := [key for key in TRAINING if archive.subtree("state", key) is None]:
        raise ShearingError(f"checkpoint {path} is not the state of a training run: it has no {', '.join(missing)}")
    return archive


def check_same_run(archive: Archive, source: Source, masks: L0Masks | None) -> None:
    """Every key of model and optimizer, strictly.

    Raises:
        ShearingError: the checkpoint is another run's.
    """
    model, optimizers = archive.subtree("state", "model"), archive.subtree("state", "optimizers")
    tensors = {name.removeprefix("module."): tuple(value.shape) for name, value in model.items()}
    table = source.table
    wanted = {f"model.{name}": table.tensor_shape(spec, layer) for name, spec, layer in table.instances()}
    tied = {f"model.{name}" for name, spec, _ in source.table.instances() if spec.alias is not None}
    buffers: set[str] = set()
    if masks is not None:
        if "masks.energy" in tensors and masks.energy is None:
            masks.count_energy(no_energy(masks.table))
        buffers = {f"masks.{name}" for name, _ in masks.named_buffers()}
        wanted |= {f"masks.{name}": tuple(value.shape) for name, value in masks.state_dict().items()}
    differ = [name for name in sorted({*wanted, *tensors} - tied) if wanted.get(name) != tensors.get(name)]
    trained = {name for optimizer in optimizers.values() for name in optimizer["state"]}
    differ += sorted(trained.symmetric_difference(set(wanted) - tied - buffers)) if not differ and trained else []
    if differ:
        first = differ[0]
        raise ShearingError(
            f"autoresume: {archive.path} is of another run: {len(differ)} tensors differ, such as {first} of shape "
            f"{tensors.get(first, 'none')}, here {wanted.get(first, 'none')}. Give this run a save_folder of its own, "
            "or the configuration that the checkpoint was made with"
        )


def _check_optimizer(cfg: Config, archive: Archive) -> None:
    """Composer begins with a fresh state where the checkpoint's is of another optimizer."""
    kind, found = OPTIMIZERS[cfg.optimizer.name].__qualname__, list(archive.subtree("state", "optimizers"))
    if found != [kind]:
        raise ShearingError(
            f"autoresume: optimizer.name = {cfg.optimizer.name} is {kind}, but {archive.path} holds the state of "
            f"{', '.join(found) or 'none'}: go on with the same optimizer, or begin anew in another save_folder"
        )


def _check_kind(cfg: Config, path: Path) -> None:
    """Composer loads a folder only where it saves folders, and a file only where it saves files."""
    saves_folders = cfg.fsdp_config is not None and cfg.fsdp_config.state_dict_type == "sharded"
    if path.is_dir() != saves_folders:
        here, needed = ("a sharded folder", "sharded") if path.is_dir() else ("one file", "full")
        raise ShearingError(
            f"autoresume: {path} is {here}: go on with fsdp_config.state_dict_type = {needed}, or another save_folder"
        )


def _set_aside(path: Path) -> Path:
    """Rename, so that neither we nor Composer take it for a checkpoint; never over an earlier one."""
    number, aside = 1, path.with_name(path.name + DAMAGED)
    while aside.exists():
        number, aside = number + 1, path.with_name(f"{path.name}{DAMAGED}.{number}")
    durable.move(path, aside)
    return aside
