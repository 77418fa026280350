"""Hidden states of the source as a target, beside its logits (docs/research/recover.md, section 4).

    loss = mean over kept layers j and tokens of  |h_j / |h_j| - S H_e(j) / |S H_e(j)||^2        of each sequence

h_j: the student's residual stream after its layer j. H_e: the source's after its layer e, where e(j) is the layer just
before the next one that the student kept (of the last: the last). So a kept layer learns what the dropped layers behind
it did. S takes the units that the student kept, times their gates: what the student's stream holds where both agree.

Directions are compared, as the norms that read the stream see it: it is between 0 and 4, and twice 1 - cosine. The
stream of the first token may be a hundred times as long as the others (20,500 against 200 in SmolLM2-135M). Relative to
the energy of a sequence, that token would be all that counts. Relative to each token's own, a student that puts such a
length elsewhere has a distance of thousands there, and that is all that its step follows.

With a loss mask the squares are summed over positions whose next token is an answer.

A compact model follows one fixed selection. While masks train, the selection of the step is followed.

Shape legend: B sequences, T tokens, D hidden units of the source, d kept ones, L layers of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from llmshearing.config.schema import Distill
from llmshearing.errors import ShearingError
from llmshearing.families import table_for
from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection, Units, load_selection, table_of
from llmshearing.training.targets import View

HIDDEN = "hidden"


class HiddenStates:
    """How a student follows hidden states: whose units and layers it has, and how much they count now.

    Args:
        selection: what made the student out of the teacher; None: that of the step, while masks train. It may be
            replaced on the way, as by a run that folds itself.
        layers: L. weight: at the start. until: when it has fallen to 0, in a straight line (a time string).
    """

    def __init__(self, selection: Selection | None, layers: int, weight: float = 1.0, until: str = "1dur") -> None:
        self.selection, self.layers, self.full, self.until = selection, layers, weight, until
        self.progress = 0.0
        """Elapsed part of ``until``; training sets it before each batch, so that resuming needs no state."""

    @property
    def weight(self) -> float:
        """What the loss counts now."""
        return self.full * max(0.0, 1.0 - self.progress)

    def views(self, of_step: Selection | None) -> tuple[View, View] | None:
        """(the student's, the teacher's) for the next batch, layers in pairs; None where nothing counts.

        of_step: what the student is gated by. A gated student has all the source's layers and gives its open units; a
        compact one (None) has the kept layers alone.
        """
        selection = self.selection if of_step is None else of_step
        if selection is None or not self.weight:
            return None
        own, theirs = pairs(selection, self.layers)
        if not own:
            return None
        units = selection.units[HIDDEN][0] if HIDDEN in selection.units else None
        return View(own if of_step is not None else tuple(range(len(own)))), View(theirs, units)


def pairs(selection: Selection, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kept layers of the source, and for each the layer whose output it is to have."""
    kept = selection.kept_layers(layers)
    ends = [following - 1 for _, following in pairwise([*kept, layers])]
    return tuple(kept), tuple(ends)


@contextmanager
def recorded(layers: Sequence[nn.Module], view: View | None) -> Iterator[Mapping[int, Tensor]]:
    """Residual stream after the layers of a view, in the passes inside the block: layer -> [B, T, units].

    Layers that are recomputed afterwards are not recorded again. layers: of a transformers decoder, all of them.
    """
    states: dict[int, Tensor] = {}
    wanted = View(()) if view is None else view

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            states[layer] = stream if wanted.units is None else chosen(stream, wanted.units)

        return hook

    handles = [layers[layer].register_forward_hook(keep(layer)) for layer in wanted.layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def chosen(stream: Tensor, units: Units) -> Tensor:
    """S h: the kept units [..., d] of a stream [..., D], times their gates, which get no gradient from here."""
    part = stream.index_select(-1, units.index.to(stream.device))
    return part if units.gate is None else part * units.gate.detach().to(part)


def hidden_losses(
    own: Mapping[int, Tensor], theirs: Mapping[int, Tensor], views: tuple[View, View], counted: Tensor | None = None
) -> Tensor:
    """Loss of each sequence [B], by the formula above. own, theirs: layer -> [B, T, d].

    counted: bool [B, T-1], positions whose states alone are compared; 0 for a sequence without any. None: all T.
    """
    losses = []
    for layer, end in zip(views[0].layers, views[1].layers, strict=True):
        wide = torch.promote_types(own[layer].dtype, torch.float32)
        h, target = own[layer].to(wide), theirs[end].to(wide)
        apart = (normalize(h, dim=-1) - normalize(target, dim=-1)).square().sum(-1)
        if counted is None:
            losses.append(apart.mean(1))
        else:
            kept = torch.where(counted, apart[:, :-1], 0.0)
            losses.append(kept.sum(1) / counted.sum(1).clamp_min(1))
    return torch.stack(losses).mean(0)


def build_hidden(asked: Distill, teacher: Any, student: Table) -> HiddenStates | None:
    """How ``distill.hidden`` follows hidden states; None where it is 0.

    Args:
        teacher: its config. student: the table of the model that is trained.

    Raises:
        ShearingError: the selection is not one of the teacher, or made another model than the student.
    """
    if not asked.hidden:
        return None
    whole = table_for(teacher)
    layers, selection = whole.layers, None
    if asked.selection is not None:
        selection = _selection(asked.selection, teacher, student)
    elif (found := (layers, whole.axes[HIDDEN].length)) != (own := (student.layers, student.axes[HIDDEN].length)):
        raise ShearingError(
            f"distill.hidden = {asked.hidden}: the teacher has {found[0]} layers of {found[1]} hidden units, the model "
            f"under masks {own[0]} of {own[1]}; leave distill.teacher out"
        )
    return HiddenStates(selection, layers, asked.hidden, asked.hidden_until)


def _selection(path: str, teacher: Any, student: Table) -> Selection:
    selection, _ = load_selection(path)
    try:
        table = table_of(teacher, selection)
    except ShearingError as error:
        raise ShearingError(f"distill.selection = {path} is not one of the teacher: {error}") from error
    kept = selection.units[HIDDEN][0].index if HIDDEN in selection.units else range(table.axes[HIDDEN].length)
    found = len(kept), len(selection.kept_layers(table.layers))
    if found != (want := (student.axes[HIDDEN].length, student.layers)):
        raise ShearingError(
            f"distill.selection = {path} keeps {found[0]} hidden units and {found[1]} layers of the teacher, the model "
            f"has {want[0]} and {want[1]}: name the selection that made it"
        )
    return selection
