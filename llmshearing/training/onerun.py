"""One run from source to compact model: `model.l0_module.fold_at`.

    trainer with masks --fold_at--> its checkpoint --handover--> pruned-<its name> --> trainer at the compact size

A run that starts again looks at its newest checkpoint: with masks it goes on with the first trainer (and hands over at
once, if that is due), without masks with the second.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.utils import dist

from llmshearing.config import Config
from llmshearing.errors import ShearingError
from llmshearing.training.handover import Folded, hand_over, is_folded, read_folded, without_masks
from llmshearing.training.resilience.resume import newest_whole, point_latest


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


def after_fold(cfg: Config, last: Path) -> tuple[Config, Folded]:
    """Fold the checkpoint ``last``; the configuration and what to go on from. The first rank works.

    Raises:
        ShearingError: as :func:`~llmshearing.training.handover.hand_over`.
    """
    gc.collect()  # the trainer before

    def work() -> Path:
        made = hand_over(last, last.with_name(f"pruned-{last.name}"), cfg)
        point_latest(cfg, made)
        return made

    path: Path = _first_rank(work)
    return replace(without_masks(cfg), autoresume=False, load_path=str(path)), read_folded(path)


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
