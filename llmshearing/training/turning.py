"""`model.turn`: a run's hidden units are turned before anything else looks at the source.

    sequences of the training split -> the first rank: basis Q -> all ranks: every load of the source is turned by Q

Q rides in the run's checkpoints. A run that goes on takes it from there: nothing is turned twice, and a teacher that is
the run's own source is turned as it was.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.core import Callback
from composer.utils import dist, format_name_with_dist
from torch import Tensor

from llmshearing.config import Config
from llmshearing.config.schema import Turn
from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.prune.calibration import Calibration, spread
from llmshearing.prune.methods.turn import ORDER, OUTPUT, find_basis
from llmshearing.storage import open_archive
from llmshearing.training.source import Source, kept_units, load_model

log = logging.getLogger(__name__)

KEY = "model.turn"
STATE = "TurnedBasis"  # in checkpoints


class TurnedBasis(Callback):
    """Keeps the basis that a run was turned into in its checkpoints. The run has read it before this is loaded."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def state_dict(self) -> dict[str, Any]:
        """Q, float64 [d, d]."""
        return {"basis": self.basis}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the source was turned by it before the model was built."""


def turned(source: Source, cfg: Config, data: MixtureDataset, device: str, found: Path | None) -> Source:
    """The source with the basis that this run turns it into; without ``model.turn`` as it is.

    Args:
        data: training data, of which evenly spread samples are looked at. device: where the model runs ("cpu", "gpu").
        found: the checkpoint that ``autoresume`` goes on from.

    Raises:
        ShearingError: too few tokens, or a checkpoint to go on from that was not turned.
    """
    if cfg.model.turn is None:
        return source
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            path = found or _given(cfg)
            answer[0] = saved_basis(path) if path is not None else _computed(cfg.model.turn, source, cfg, data, device)
        except ShearingError as error:
            answer[1] = f"{KEY}: {error}"
    dist.broadcast_object_list(answer, src=0)
    basis, problem = answer
    if problem is not None:
        raise ShearingError(problem)
    if cfg.model.turn.basis != OUTPUT:
        return replace(source, basis=basis)
    return replace(source, basis=basis, config=_by_order(source.config), stored=_by_order(source.stored))


def _by_order(config: Any) -> Any:
    """The config of a model whose first hidden units are to be kept."""
    if config is not None:
        config = copy.deepcopy(config)
        setattr(config, ORDER, True)
    return config


def _given(cfg: Config) -> Path | None:
    """A local checkpoint that ``load_path`` gives."""
    if cfg.load_path is None or "://" in cfg.load_path:
        return None
    return Path(format_name_with_dist(cfg.load_path, cfg.run_name or ""))


def saved_basis(path: Path) -> Tensor:
    """The basis in a run's checkpoint, float64 [d, d].

    Raises:
        ShearingError: the run did not turn its source.
    """
    entry = open_archive(path).subtree("state", "callbacks", STATE)
    if not isinstance(entry, dict) or "basis" not in entry:
        raise ShearingError(f"{path} is of a run that did not turn its source: leave {KEY} out, or begin a new run")
    return entry["basis"].make()


def _computed(turn: Turn, source: Source, cfg: Config, data: MixtureDataset, device: str) -> Tensor:
    calibration = sequences(cfg, data, turn.samples)
    log.info("turning hidden units, by %d sequences of %d tokens", *calibration.select.shape)
    model = load_model(source, cfg).eval().to("cuda" if device == "gpu" else device)
    keep = kept_units(source) if turn.basis == OUTPUT else None
    basis, energy = find_basis(model, source.stored_table, calibration, keep, untie=turn.untie)
    first = keep or len(energy) // 2
    share = 100 * energy[:first].sum() / energy.sum()
    log.info("turned: the first %d of %d hidden units carry %.1f %% of the energy", first, len(energy), share)
    return basis.cpu()


def sequences(cfg: Config, data: MixtureDataset, samples: int) -> Calibration:
    """Evenly spread samples of the training split."""
    ids, mask = spread(data.streams, samples)
    name = "the training split"
    return Calibration(ids, ids[:1], name, name, cfg.device_eval_batch_size, select_mask=mask)
