"""Tie head and embedding again, which turning had parted: V x d parameters less.

Nothing else is cut. `turn --tie_at WIDTH` chooses axes in which it costs least, for a model cut to WIDTH hidden units.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection
from llmshearing.fold.tie import tied
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.method import Choice, Method

log = logging.getLogger(__name__)


@torch.no_grad()
def choose(
    model: PreTrainedModel,
    table: Table,
    target: Mapping[str, Any],
    calibration: Calibration | None,
    *,
    drop_layers: None = None,
) -> Choice:
    """Tie ``model`` in place.

    Raises:
        ShearingError: see :func:`llmshearing.fold.tie.tied`.
    """
    weights, missed = tied({name: value.cpu() for name, value in model.state_dict().items()}, table)
    model.load_state_dict(weights, strict=True)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    log.info("the tied head misses %.2g of the head's energy", missed)
    return Choice(Selection(), {"missed": missed}, config={"tie_word_embeddings": True})


METHOD = Method(
    name="tie",
    choose=choose,
    help="make the output head the embedding again after turn; nothing else is cut",
    sizes=(),
    ratio=(),
    needs_calibration=lambda options: False,
)
