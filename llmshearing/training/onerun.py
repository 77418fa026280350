"""One run from source to compact model: `model.l0_module.fold_at`.

    trainer with masks --fold_at--> its checkpoint --handover--> pruned-<its name> --> trainer at the compact size

A run that starts again looks at its newest checkpoint: with masks it goes on with the first trainer (and hands over at
once, if that is due), without masks with the second.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmshearing.checkpoints.checkpoint import CheckpointInfo
from llmshearing.config import Config
from llmshearing.config.schema import L0Module
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.families.stored import as_stored
from llmshearing.fold.fold import fold
from llmshearing.fold.selection import Selection
from llmshearing.prune.refit import refit
from llmshearing.storage import load_weights
from llmshearing.training.handover import Folded, hand_over, is_folded, read_folded, without_masks
from llmshearing.training.resilience.resume import newest_whole, point_latest
from llmshearing.training.source import Source, load_model
from llmshearing.training.turning import saved_basis, sequences


def reached(cfg: Config) -> Folded | None:
    """What the run has come to, where it has folded itself before; None: masks are to be trained, or there are none.

    Raises:
        ShearingError: the newest checkpoint is of another run, or none is whole.
    """
    l0 = cfg.model.l0_module
    if l0 is None or l0.fold_at is None or not cfg.autoresume:
        return None

    def newest() -> Path | None:
        found = newest_whole(cfg)
        return found[0] if found is not None and is_folded(found[0]) else None

    path = _first_rank(newest)
    return None if path is None else read_folded(path)


def after_fold(cfg: Config, source: Source, last: Path, data: MixtureDataset, device: str) -> tuple[Config, Folded]:
    """Fold the checkpoint ``last``; the configuration and what to go on from. The first rank works.

    Args:
        source: the run's own. data: training data. device: where a refit runs ("cpu", "gpu").

    Raises:
        ShearingError: as :func:`~llmshearing.training.handover.hand_over`.
    """
    gc.collect()  # the trainer before

    l0 = cfg.model.l0_module
    refitting = partial(_refitted, cfg, source, last, data, device) if l0 is not None and l0.refit else None

    def work() -> Path:
        made = hand_over(last, last.with_name(f"pruned-{last.name}"), cfg, refitting)
        point_latest(cfg, made)
        return made

    path: Path = _first_rank(work)
    return replace(without_masks(cfg), autoresume=False, load_path=str(path)), read_folded(path)


def _refitted(
    cfg: Config, source: Source, last: Path, data: MixtureDataset, device: str, info: CheckpointInfo, choice: Selection
) -> dict[str, Tensor]:
    """The weights that the run's own source, turned as the run turned it, has after the cut and the fit."""
    l0 = cfg.model.l0_module or L0Module()
    basis = saved_basis(last) if cfg.model.turn is not None else None
    place = "cuda" if device == "gpu" else device
    model = load_model(replace(source, basis=basis), cfg).eval().to(place)
    compact = as_stored(AutoModelForCausalLM.from_config(info.config, dtype=torch.float32).eval())
    load_weights(compact, fold(model.state_dict(), source.table, choice))
    refit(model, compact.to(place), source.table, choice, sequences(cfg, data, l0.refit_samples), l0.refit_ridge)
    return {name: value.cpu() for name, value in compact.state_dict().items()}


def _first_rank(work: Callable[[], Any]) -> Any:
    """What the first rank's work gives, on all ranks; they raise what it raises."""
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = work()
        except ShearingError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ShearingError(answer[1])
    return answer[0]
