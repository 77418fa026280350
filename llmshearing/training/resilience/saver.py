"""Saver: Composer's CheckpointSaver, whose checkpoints appear whole or not at all.

    <folder>/.writing/<name>  --flush-->  rename to <folder>/<name>  -->  `latest` moves  -->  the oldest is removed

`<name>` is a file, or a folder where FSDP saves sharded. The checksums are inside: each record of the zips that
torch.save writes has one.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint, dist, reproducibility
from torch.distributed.checkpoint.api import CheckpointException

from llmshearing import files as durable
from llmshearing.errors import ShearingError

log = logging.getLogger(__name__)

WRITING = ".writing"


class Saver(CheckpointSaver):
    """Saves at Composer's intervals and names; local folders only.

    A save that fails (disk full, no permission) leaves the checkpoint before it and `latest` as they were, is logged as
    an error, and is tried again at the next interval; only where the run's last save fails does the run fail.

    Args:
        folder, filename, latest_filename, save_interval, overwrite, num_checkpoints_to_keep: as in CheckpointSaver.
    """

    def __init__(
        self,
        folder: str,
        filename: str,
        latest_filename: str,
        save_interval: str,
        *,
        overwrite: bool = False,
        num_checkpoints_to_keep: int = -1,
    ) -> None:
        super().__init__(
            folder, filename, filename, latest_filename, latest_filename, save_interval,
            overwrite=overwrite, num_checkpoints_to_keep=num_checkpoints_to_keep,
        )  # fmt: skip
        self.problem: str | None = None
        """Why the newest save failed; None: it did not."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse a folder that holds checkpoints of later batches."""
        try:
            super().fit_start(state, logger)
        except FileExistsError as error:
            raise ShearingError(
                f"save_folder = {self.folder} has checkpoints of an earlier run: go on with it (autoresume=true), "
                f"replace it (save_overwrite=true), or give another folder. {error}"
            ) from error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Earlier checkpoints that are still here count among those to keep."""
        super().load_state_dict(state)
        known = [self._unit(Path(name)) for name in self.all_saved_checkpoints_to_timestamp]
        here = [Path(self.folder, path.name) for path in known]
        self.saved_checkpoints = [str(path) for path in dict.fromkeys(here) if path.exists()]

    def target(self, state: State) -> Path:
        """File, or folder of a sharded checkpoint, that the state's checkpoint is called by."""
        placeholders = self.filename.format(state, keep_placeholders=True)
        path = Path(checkpoint.get_save_filename(state, placeholders))
        return path.parent if state.fsdp_sharded_state_dict_enabled else path

    @staticmethod
    def _unit(path: Path) -> Path:
        return path.parent if path.suffix == ".distcp" else path

    def ensure(self, state: State, logger: Logger) -> Path | None:
        """Save this state unless it is saved; returns where it is, None where that failed."""
        target = self.target(state)
        if not dist.all_gather_object(target.exists())[0]:
            self._save_checkpoint(state, logger)
        return target if self.problem is None else None

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        target = self.target(state)
        temporary = target.parent / WRITING / target.name
        self.all_saved_checkpoints_to_timestamp[str(target)] = state.timestamp  # the file names itself among them
        write = _write_sharded if state.fsdp_sharded_state_dict_enabled else _write
        # All ranks learn of a failure on any: nothing gets its name before all have written, and none goes on before.
        self.problem = _on_any_rank(write(state, temporary))
        if self.problem is None:
            first = dist.get_global_rank() == 0
            self.problem = _on_any_rank(self._publish(temporary, target, state) if first else None)
        if self.problem is not None:
            del self.all_saved_checkpoints_to_timestamp[str(target)]
            if dist.get_global_rank() == 0:
                _remove(temporary)
            log.error("checkpoint %s was not saved: %s. %s", target, self.problem, self._kept())
            return
        self.saved_checkpoints.append(str(target))
        if dist.get_global_rank() == 0 and target.is_file():
            logger.upload_file(target.name, target, overwrite=self.overwrite)
        if self.num_checkpoints_to_keep >= 0:
            self._rotate_checkpoints()

    def _kept(self) -> str:
        before = self.saved_checkpoints[-1] if self.saved_checkpoints else "no checkpoint of this run"
        return f"Kept: {before}; training goes on, and saves again after the next interval"

    def _publish(self, temporary: Path, target: Path, state: State) -> str | None:
        """Give the written checkpoint its name, then move `latest`; what failed, or None."""
        try:
            if target.is_dir() and self.overwrite:
                _remove(target)
            durable.move(temporary, target)
            with suppress(OSError):
                temporary.parent.rmdir()
            if self.latest_filename is not None:
                durable.point(Path(self.latest_filename.format(state)), target)
        except OSError as error:
            return _reason(error)
        return None

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        while len(self.saved_checkpoints) > self.num_checkpoints_to_keep:
            oldest = self.saved_checkpoints.pop(0)
            if dist.get_global_rank() == 0:
                _remove(Path(oldest))

    def fit_end(self, state: State, logger: Logger) -> None:
        """The run's last save must have succeeded."""
        if self.problem is not None:
            before = self.saved_checkpoints[-1] if self.saved_checkpoints else "none"
            raise ShearingError(
                f"the run ended at batch {state.timestamp.batch.value}, but its last checkpoint was not saved: "
                f"{self.problem}. Newest checkpoint: {before}; make room and go on from it (autoresume=true)"
            )


def _on_any_rank(problem: str | None) -> str | None:
    """The first problem that any rank has, on all of them."""
    return next((found for found in dist.all_gather_object(problem) if found is not None), None)


def _write(state: State, path: Path) -> str | None:
    """Write one file, on the first rank; what failed, or None. Gathering the state takes all ranks."""
    whole = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
    if dist.get_global_rank() != 0:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(whole, file)
        durable.sync(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns an OSError into a RuntimeError
        return _reason(error, path)
    return None


def _write_sharded(state: State, folder: Path) -> str | None:
    """Write this rank's part of a folder, through Composer; what failed here, or None."""
    if dist.get_global_rank() == 0:
        _remove(folder)
    dist.barrier()
    try:
        checkpoint.save_checkpoint(state, str(folder))
    except (OSError, RuntimeError, CheckpointException) as error:
        return _reason(error, folder)
    return None


def _reason(error: BaseException, path: Path | None = None) -> str:
    """The error in one line, with the room that is left where it was to be written."""
    cause = error if isinstance(error, OSError) else error.__context__ or error
    text = (str(cause).splitlines() or [type(cause).__name__])[0]
    if path is None or not path.parent.is_dir():
        return text
    return f"{text} ({shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free in {path.parent.parent})"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()
