"""Where a run's masks start: open, as a selection file says, or as a one-shot pruner chooses on the run's own data.

The first rank reads or chooses, measures what norms are to count, and hands the others log alphas and shares of energy.
A run that goes on from a checkpoint does neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, format_name_with_dist
from torch import Tensor

from llmshearing.checkpoints.checkpoint import read_checkpoint
from llmshearing.config import Config
from llmshearing.config.schema import OPEN, L0Module
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.families.names import GROUPS, HEADS, HIDDEN
from llmshearing.fold.selection import Selection, load_selection
from llmshearing.masks.l0 import L0Masks, energy_norms, no_energy
from llmshearing.masks.start import inform
from llmshearing.prune.energy import norm_energy
from llmshearing.prune.methods import METHODS, Choice
from llmshearing.prune.run import counting_energy
from llmshearing.prune.targets import resolve_target
from llmshearing.training.source import Source, load_model
from llmshearing.training.turning import sequences

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
    """Set log alpha to the configured start, and what norms count; the same on all ranks.

    Args:
        data: training data, which a method sees evenly spread samples of. device: where it runs ("cpu", "gpu").
        found: the checkpoint that ``autoresume`` goes on from.

    Raises:
        ShearingError: file, method and target do not go together, as the message says.
    """
    l0 = cfg.model.l0_module
    if l0 is None or (l0.start == OPEN and not counts_energy(cfg, masks) and not _is_plain(cfg, found)):
        return
    answer: dict[str, Any] = {}
    begins = not goes_on(cfg, found)
    if begins:
        check_start(l0)
    if dist.get_global_rank() == 0:
        try:
            answer = _started(masks, source, cfg, data, device) if begins else _saved(masks, cfg, found)
        except ShearingError as error:
            answer = {"problem": str(error)}
    told = [answer]
    dist.broadcast_object_list(told, src=0)
    if (problem := told[0].get("problem")) is not None:
        raise ShearingError(problem)
    with torch.no_grad():
        for kind, value in told[0]["log_alpha"].items():
            masks.log_alpha[kind].copy_(value)
    masks.count_energy(told[0]["energy"])
    if begins and l0.start != OPEN:
        log.info("the masks start from %s", l0.start)
    if begins and masks.energy is not None:
        log.info("norms count the energy of the hidden units that are open")


def _is_plain(cfg: Config, found: Path | None) -> bool:
    """Whether a checkpoint to go on from can be looked at: one that is trusted may hold more than plain data."""
    if found is not None or cfg.load_path is None or "://" in cfg.load_path:
        return True
    try:
        read_checkpoint(Path(format_name_with_dist(cfg.load_path, cfg.run_name or "")), verify=False)
    except ShearingError:
        return False
    return True


def _started(masks: L0Masks, source: Source, cfg: Config, data: MixtureDataset, device: str) -> dict[str, Any]:
    """``log_alpha`` by kind and ``energy`` by norm (None: norms count units) of a run that begins."""
    l0 = cfg.model.l0_module
    if l0 is None or (l0.start == OPEN and not counts_energy(cfg, masks)):
        return {"log_alpha": {}, "energy": None}
    energy: Mapping[str, Tensor] = {}
    if l0.start != OPEN:
        try:
            selection, about = _chosen(l0, source, cfg, data, device)
            inform(masks, selection, about, l0.start_spread)
        except ShearingError as error:
            raise ShearingError(f"{KEY} = {l0.start}: {error}") from error
        energy = selection.energy
    if counts_energy(cfg, masks) and set(energy_norms(masks.table)) - set(energy):
        model = load_model(source, cfg).eval().to("cuda" if device == "gpu" else device)
        samples = cfg.model.turn.samples if cfg.model.turn is not None else l0.start_samples
        energy = norm_energy(model, source.table, sequences(cfg, data, samples))
    values = {kind: a.detach().cpu() for kind, a in masks.log_alpha.items()}
    return {"log_alpha": values, "energy": energy if counts_energy(cfg, masks) else None}


def _saved(masks: L0Masks, cfg: Config, found: Path | None) -> dict[str, Any]:
    """Room for what the checkpoint will fill in."""
    path = found or Path(format_name_with_dist(cfg.load_path or "", cfg.run_name or ""))
    known = "energy" in read_checkpoint(path, verify=False).masks
    return {"log_alpha": {}, "energy": no_energy(masks.table) if known else None}


def counts_energy(cfg: Config, masks: L0Masks) -> bool:
    """Whether a run that begins measures what its norms count.

    Raises:
        ShearingError: it is asked to, and its norms cannot.
    """
    l0 = cfg.model.l0_module
    if l0 is None or l0.norms == "units" or HIDDEN not in masks.kinds:
        return False
    able = bool(energy_norms(masks.table))
    if l0.norms == "energy" and not able:
        raise ShearingError(
            f"model.l0_module.norms = energy: norms of the {masks.table.family} family subtract the mean"
        )
    return able and (l0.norms == "energy" or cfg.model.turn is not None or l0.start != OPEN)


def _chosen(
    l0: L0Module, source: Source, cfg: Config, data: MixtureDataset, device: str
) -> tuple[Selection, Mapping[str, Any]]:
    """Selection and what is told of it: scores, where there are some."""
    if l0.start not in METHODS:
        selection, about = load_selection(l0.start)
        if cfg.model.turn is not None and HIDDEN in selection.units:
            raise ShearingError(
                "its hidden units are of the model that it was made for, and model.turn makes others: give that model "
                "as model.path and leave model.turn out, or start from a method"
            )
        return selection, about
    choice = choose(l0.start, source, cfg, data, device, l0.start_samples)
    return choice.selection, choice.about


def choose(name: str, source: Source, cfg: Config, data: MixtureDataset, device: str, samples: int) -> Choice:
    """What a one-shot method would keep, with the norms' energy, found on a copy of the source, which some change."""
    method, table = METHODS[name], source.table
    wanted = _wanted(source)
    target = resolve_target(wanted, table, method)
    calibration = sequences(cfg, data, samples)
    log.info("%s: choosing where the masks start, by %d sequences of %d tokens", name, *calibration.select.shape)
    model = load_model(source, cfg).eval().to("cuda" if device == "gpu" else device)
    choice = method.choose(model, table, target.shape, calibration)
    return counting_energy(choice, model, table, calibration)


def _wanted(source: Source) -> dict[str, int]:
    """The sizes that the target changes, with both counts of heads where it changes one."""
    own, keys = source.table.shape(), source.table.keys
    target = source.target or {}
    changed = {key for key, size in target.items() if size != own[key]}
    heads = {keys[size] for size in (HEADS, GROUPS) if size in keys}
    changed |= heads if changed & heads else set()
    return {key: target[key] for key in target if key in changed}
