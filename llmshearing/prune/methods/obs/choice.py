"""Intermediate units by optimal brain surgery, the choice alone: no weight changes (`fisher --units obs`).

    W: the projection out of the MLP, its rows of kept hidden units        H = X X^T of what it reads in the source

Groups of units go whose removal costs least after the others have made up for it (`linalg`). Then the moved weights are
dropped: a refit, or training, does that work on the cut model (docs/research/recover.md, section 4, step 5).

One layer works at a time. Memory is one H and the inputs of a layer and of its projection, for all sequences.
Shape legend: h kept hidden units; f intermediate units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.names import INTERMEDIATE, MLP
from llmshearing.families.table import Kind, Table
from llmshearing.fold.selection import Units
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.methods.obs.layers import hidden_states
from llmshearing.prune.methods.obs.linalg import damped_inverse, remove_units
from llmshearing.prune.methods.obs.method import projections

DAMPING = 0.01  # of the mean of H's diagonal
GROUP, ROUNDS = 8, 64  # units that go at once; wide layers take larger groups, so that rounds stay few


def check_choosable(table: Table) -> None:
    """Refuse families whose intermediate units belong to experts.

    Raises:
        ShearingError: with the family's name.
    """
    if any(axis.of_expert and axis.kind == INTERMEDIATE for axis in table.axes.values()):
        raise ShearingError(
            f"units by obs: those of the {table.family} family belong to experts, each of which sees tokens of its "
            "own; leave it at --units fisher"
        )


@torch.no_grad()
def choose_units(
    model: PreTrainedModel,
    table: Table,
    rows: Sequence[tuple[Kind, int]],
    calibration: Calibration,
    hidden: Tensor | None = None,
    offload: Path | str | None = None,
) -> tuple[Units, ...]:
    """Kept intermediate units of every layer; ``model`` stays as it is.

    Args:
        rows: of every layer, the kind and how many units stay in a row. hidden: kept hidden units, int64 [h]; None:
            all. offload: directory where activations wait; None: in memory.

    Raises:
        ShearingError: the units belong to experts; or an H is singular, with the layer and the tensor.
    """
    check_choosable(table)
    kept = []
    running = hidden_states(model, table, calibration, table.layers, offload)
    for layer, (kind, number) in enumerate(tqdm(rows, desc="units by OBS", unit="layer")):
        [projection] = [one for one in projections(table.at_layer(layer)) if one.spec.block == MLP]
        module = projection.module(model, layer)
        hessian = running.hessian(layer, module, projection.inputs(model, layer), attention=False).double()
        weight = projection.matrix(model, layer).to(hessian)
        weight = weight if hidden is None else weight.index_select(0, hidden.to(weight.device))
        remove = kind.size - number
        group = max(GROUP, remove // ROUNDS)
        try:
            inverse = damped_inverse(hessian, DAMPING)
            units, _ = remove_units(weight, inverse, remove, rows=kind.rows or 1, largest=group, smallest=group)
        except ShearingError as error:
            raise ShearingError(f"layer {layer}, {projection.name(layer)}: {error}") from error
        kept.append(Units(units.cpu()))
        if layer + 1 < table.layers:
            running.advance(layer)
    return tuple(kept)
