"""Importance by squared gradients (Fisher): what the loss loses, to second order, when a gate of 1 closes.

    score of a unit = sum over sequences of (d loss / d gate)^2 at gate 1

The loss of a sequence is the sum over its tokens that count, divided by all of them: sequences with few answers weigh
little.

The empirical Fisher information of the gates (Molchanov et al., arXiv 1906.10771; Kwon et al., arXiv 2204.09656). All
kinds of units come from one forward and backward pass a sequence, through the gating of `llmshearing.fold.gating`. In a
turned model (`llmshearing.prune.methods.turn`) hidden units go by their energy instead, or by their order where it was
turned for a number of them. Intermediate units can go by optimal brain surgery
(`llmshearing.prune.methods.obs.choice`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.names import INTERMEDIATE
from llmshearing.families.table import Table
from llmshearing.fold.gating import attach, detach
from llmshearing.fold.selection import Selection, layer_gates
from llmshearing.masks.l0 import selection_from_gates
from llmshearing.progress import tqdm
from llmshearing.prune.balance import add_tp, check_balance, keep_balanced
from llmshearing.prune.calibration import IGNORED, Calibration, labels_of
from llmshearing.prune.energy import norm_energy
from llmshearing.prune.method import ALL_SIZES, Choice, Method, frozen
from llmshearing.prune.methods.depth import drop_least
from llmshearing.prune.methods.obs.choice import check_choosable, choose_units
from llmshearing.prune.methods.turn import goes_by_order, is_turned
from llmshearing.prune.targets import rows_to_cut

ENERGY, FISHER, ORDER, OBS = "energy", "fisher", "order", "obs"


def choose(
    model: PreTrainedModel,
    table: Table,
    target: Mapping[str, Any],
    calibration: Calibration | None,
    *,
    hidden: str | None = None,
    tp: int = 1,
    units: str = FISHER,
    offload: Path | str | None = None,
    drop_layers: Sequence[int] | None = None,
) -> Choice:
    """Keep the units of each row, and the layers, that the loss would miss most.

    Args:
        hidden: score of hidden units, "fisher", "energy" or "order" (the first stay); None: what suits the model.
        tp: see :mod:`llmshearing.prune.balance`.
        units: how intermediate units are chosen, "fisher" or "obs". offload: a directory, where activations wait for
            "obs"; None: in memory.

    Raises:
        ShearingError: there is no calibration; or intermediate units go by "obs", and none are cut or they belong to
            experts.
    """
    if calibration is None:
        raise ShearingError("fisher scores need sequences to look at: --calibration")
    cut = rows_to_cut(table, target)
    check_balance(table, cut, tp)
    if units == OBS:
        check_choosable(table)
        if tp > 1:
            raise ShearingError(f"--units {OBS} with --tp {tp}: its choice knows no balance; take --units {FISHER}")
        if INTERMEDIATE not in cut:
            raise ShearingError(f"--units {OBS}: the target cuts no intermediate units; leave it out")
    drops = drop_layers is None and target[table.layers_key] < table.layers
    scores = fisher_scores(model, table, calibration, [*cut, *(["layer"] if drops else [])])
    if "hidden" in cut and (by := hidden or _suited(model, table)) != FISHER:
        scores["hidden"] = _order(table) if by == ORDER else _energy(model, table, calibration)
    kept = {}
    for name, rows in cut.items():
        by_layer = [scores[name]] if rows[0][0].rows is None else scores[name]
        kept[name] = tuple(
            keep_balanced(table, score, kind, number, tp) for score, (kind, number) in zip(by_layer, rows, strict=True)
        )
    if units == OBS:
        of_hidden = kept["hidden"][0].index if "hidden" in kept else None
        kept[INTERMEDIATE] = choose_units(model, table, cut[INTERMEDIATE], calibration, of_hidden, offload)
    if drops:
        drop_layers = drop_least(scores["layer"], table.layers - target[table.layers_key])
    about = {"scores": {name: score.tolist() for name, score in scores.items()}, "units": units}
    return Choice(Selection(kept, layer_gates(table.layers, drop_layers)), about)


def _suited(model: PreTrainedModel, table: Table) -> str:
    if goes_by_order(model, table):
        return ORDER
    return ENERGY if is_turned(model, table) else FISHER


def _order(table: Table) -> Tensor:
    return torch.arange(table.axes["hidden"].length, 0, -1, dtype=torch.float64)


def _energy(model: PreTrainedModel, table: Table, calibration: Calibration) -> Tensor:
    return torch.stack([*norm_energy(model, table, calibration).values()]).sum(0)


def fisher_scores(
    model: PreTrainedModel, table: Table, calibration: Calibration, kinds: Sequence[str]
) -> dict[str, Tensor]:
    """Mask kind -> scores of all units, float64 on the CPU, in the kind's full shape ([L] for "layer").

    The model's own parameters get no gradients.

    Raises:
        ShearingError: layers differ in size, so that gates of all layers make no rows of one length.
    """
    if table.of_layer:
        raise ShearingError("fisher scores need layers of one size: pad the model first (llmshearing.prune.pad)")
    shapes = {kind: (table.layers,) if kind == "layer" else table.kinds[kind].shape(table.layers) for kind in kinds}
    total = {kind: torch.zeros(shape, dtype=torch.float64) for kind, shape in shapes.items()}
    gating = attach(model, table)
    try:
        with frozen(model):
            labels = labels_of(calibration.select, calibration.select_mask)
            rows = [*zip(calibration.select, labels, strict=True)]
            for ids, wanted in tqdm(rows, desc="fisher scores", unit="sequence"):
                found = _gradients(model, table, gating, ids.to(model.device), wanted.to(model.device), shapes)
                for kind, gradient in found.items():
                    total[kind] += gradient.double().square().cpu()
    finally:
        detach(model)
    return total


def _gradients(
    model: PreTrainedModel,
    table: Table,
    gating: Any,
    ids: Tensor,
    labels: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Gradient of the loss of one sequence [T] with its labels to every gate, at 1."""
    gates = {
        kind: torch.ones(shape, dtype=model.dtype, device=ids.device, requires_grad=True)
        for kind, shape in shapes.items()
    }
    with torch.enable_grad():
        gating.set(selection_from_gates(table, gates))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if (labels[1:] == IGNORED).any():
            loss = F.cross_entropy(wide, labels[1:], ignore_index=IGNORED, reduction="sum") / len(wide)
        else:
            loss = F.cross_entropy(wide, labels[1:])
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    return {
        kind: torch.zeros_like(gate) if gradient is None else gradient
        for (kind, gate), gradient in zip(gates.items(), found, strict=True)
    }


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hidden",
        choices=(ENERGY, FISHER, ORDER),
        help="score of hidden units (in a turned model energy, or order with turn --basis output; else fisher)",
    )
    add_tp(parser)
    parser.add_argument(
        "--units",
        choices=(FISHER, OBS),
        default=FISHER,
        help="score of intermediate units; obs: least error after the others make up for it, the choice alone "
        "(%(default)s)",
    )
    parser.add_argument(
        "--offload",
        type=Path,
        metavar="DIR",
        help="with --units obs: keep activations, 4 (hidden + intermediate) bytes a token, in temporary files in DIR",
    )


METHOD = Method(
    name="fisher",
    choose=choose,
    help="squared gradients of the gates; in a turned model hidden units by energy",
    sizes=ALL_SIZES,
    add_options=_add_options,
)
