"""Where a run's masks start: open, as a selection file says, or as a one-shot pruner chooses on the run's own data.

The first rank reads or chooses and hands the others the log alphas. A run that goes on from a checkpoint does neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, format_name_with_dist

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.config import Config
from llmshearing.config.schema import OPEN, L0Module
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.families.names import GROUPS, HEADS
from llmshearing.fold.selection import Selection, load_selection
from llmshearing.masks.l0 import L0Masks
from llmshearing.masks.start import inform
from llmshearing.prune.calibration import Calibration, spread
from llmshearing.prune.methods import METHODS, Choice
from llmshearing.prune.targets import resolve_target
from llmshearing.training.source import Source, load_model

log = logging.getLogger(__name__)

KEY = "model.l0_module.start"


def check_start(l0: L0Module | None) -> None:
    """Refuse a start that is neither a method nor a file, and a method without a shape to choose for.

    Raises:
        ShearingError: naming the key and what would be right.
    """
    if l0 is None or l0.start == OPEN:
        return
    if l0.start in METHODS:
        if l0.target_model is None:
            raise ShearingError(f"{KEY} = {l0.start}: a method chooses for a shape; give target_model, or start={OPEN}")
    elif not Path(l0.start).is_file():
        known = f"{OPEN}, a method ({', '.join(METHODS)}), or the path of a selection.safetensors"
        raise ShearingError(f"{KEY} = {l0.start}: no such method or file; give {known}")


def goes_on(cfg: Config, found: Path | None) -> bool:
    """Whether the masks come from a checkpoint. found: what ``autoresume`` goes on from."""
    if found is not None or cfg.load_path is None or "://" in cfg.load_path:
        return found is not None
    path = Path(format_name_with_dist(cfg.load_path, cfg.run_name or ""))
    return bool(read_checkpoint(path, verify=False).masks)


def start_masks(
    masks: L0Masks, source: Source, cfg: Config, data: MixtureDataset, device: str, found: Path | None
) -> None:
    """Set log alpha to the configured start, the same on all ranks.

    Args:
        data: training data, which a method sees evenly spread samples of. device: where it runs ("cpu", "gpu").
        found: the checkpoint that ``autoresume`` goes on from.

    Raises:
        ShearingError: file, method and target do not go together, as the message says.
    """
    l0 = cfg.model.l0_module
    if l0 is None or l0.start == OPEN or goes_on(cfg, found):
        return
    check_start(l0)
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            selection, about = _chosen(l0, source, cfg, data, device)
            inform(masks, selection, about, l0.start_spread)
            answer[0] = {kind: a.detach().cpu() for kind, a in masks.log_alpha.items()}
        except ShearingError as error:
            answer[1] = f"{KEY} = {l0.start}: {error}"
    dist.broadcast_object_list(answer, src=0)
    values, problem = answer
    if problem is not None:
        raise ShearingError(problem)
    with torch.no_grad():
        for kind, value in values.items():
            masks.log_alpha[kind].copy_(value)
    log.info("the masks start from %s", l0.start)


def _chosen(
    l0: L0Module, source: Source, cfg: Config, data: MixtureDataset, device: str
) -> tuple[Selection, Mapping[str, Any]]:
    """Selection and what is told of it: scores, where there are some."""
    if l0.start not in METHODS:
        return load_selection(l0.start)
    choice = choose(l0.start, source, cfg, data, device, l0.start_samples)
    return choice.selection, choice.about


def choose(name: str, source: Source, cfg: Config, data: MixtureDataset, device: str, samples: int) -> Choice:
    """What a one-shot method would keep. It works on a copy of the source, which some methods change."""
    method, table = METHODS[name], source.table
    wanted = _wanted(source)
    target = resolve_target(wanted, table, method)
    ids = spread(data.streams, samples)
    calibration = Calibration(ids, ids[:1], "the training split", "the training split", cfg.device_eval_batch_size)
    log.info("%s: choosing where the masks start, by %d sequences of %d tokens", name, *ids.shape)
    model = load_model(source, cfg).eval().to("cuda" if device == "gpu" else device)
    return method.choose(model, table, target.shape, calibration)


def _wanted(source: Source) -> dict[str, int]:
    """The sizes that the target changes, with both counts of heads where it changes one."""
    own, keys = source.table.shape(), source.table.keys
    target = source.target or {}
    changed = {key for key, size in target.items() if size != own[key]}
    heads = {keys[size] for size in (HEADS, GROUPS) if size in keys}
    changed |= heads if changed & heads else set()
    return {key: target[key] for key in target if key in changed}
