"""The folded model in its source's shape: what a selection closes is 0, what it keeps lies where it was.

    source [d_out, d_in]  --fold-->  [k_out, k_in]  --put back-->  [d_out, d_in], 0 outside the kept rows and columns

Which elements are kept is asked of the one fold: it folds the numbers of the elements. The zeroed model computes what
the folded one does where nothing counts closed units. Norms over hidden units do, routers choose among experts: these
are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.names import BLOCKS
from llmshearing.families.table import EXPERT, Table, axes_of
from llmshearing.fold.fold import fold, fold_lazily, renamed
from llmshearing.fold.selection import Selection, choice_of

ZEROED = "zeroed"
"""Key of what a selection's file tells: the model beside it has its source's shape, and zeros where it closes."""
NORM = "norms count hidden units, and would count the closed ones"
WHY_NOT = {
    "hidden": NORM,
    EXPERT: "a router would still send tokens to closed experts",
    "vocab": "the closed tokens would keep a share of every probability",
}


def check_zeroable(table: Table, selection: Selection) -> None:
    """Refuse a selection whose zeroed model would compute something else than the folded one, or that closes nothing.

    Raises:
        ShearingError: naming the kinds of units, and why.
    """
    problems, cut = [], [*selection.units]
    normed = {
        kind
        for spec in table.tensors
        if spec.module.form.endswith("norm")
        for axis in axes_of(spec.axes[0])
        if (kind := table.axes[axis].kind) is not None and kind != "hidden"
    }
    for kind in cut:
        if _is_whole(table, selection, kind):
            continue
        if kind in WHY_NOT:
            problems.append(f"{kind}: {WHY_NOT[kind]}")
        elif kind in normed:
            problems.append(f"{kind}: a norm runs over them, and would count the closed ones")
    if problems:
        raise ShearingError("cannot be zeroed, only cut: " + "; ".join(problems))
    blocks = all(selection.is_open(block, layer) for block in BLOCKS for layer in range(table.layers))
    if blocks and all(_is_whole(table, selection, kind) for kind in cut):
        raise ShearingError("the selection closes nothing: there is nothing to zero")


def _is_whole(table: Table, selection: Selection, kind: str) -> bool:
    rows = selection.units[kind]
    per_layer = table.kinds[kind].rows is not None
    sizes = [table.at_layer(row if per_layer else None).kinds[kind] for row in range(len(rows))]
    return all(len(units.index) == of.size * (of.rows or 1) for units, of in zip(rows, sizes, strict=True))


class _Numbers(Mapping[str, Tensor]):
    """For each tensor of a table one of its shape, of the numbers of its elements: exact in float64."""

    def __init__(self, table: Table) -> None:
        self.shapes = {name: table.tensor_shape(spec, layer) for name, spec, layer in table.instances()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def kept_numbers(table: Table, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """(name, numbers int64 of the elements that stay, in the folded tensor's shape); a tied tensor comes once.

    Tensors of which nothing stays come with an empty one.
    """
    chosen = choice_of(selection)
    left = {name for name, spec, _ in table.instances() if spec.alias is None}
    makers = fold_lazily(_Numbers(table), table, chosen)
    for (name, _, spec, _), (_, make) in zip(renamed(table, chosen), makers, strict=True):
        if spec.alias is None:
            left.discard(name)
            yield name, make().long()
    for name in sorted(left):
        yield name, torch.zeros(0, dtype=torch.int64)


def kept_elements(table: Table, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """(name, mask of the tensor's shape: whether an element stays), as :func:`kept_numbers`."""
    shapes = _Numbers(table).shapes
    for name, numbers in kept_numbers(table, selection):
        mask = torch.zeros(torch.Size(shapes[name]).numel(), dtype=torch.bool)
        mask[numbers.flatten()] = True
        yield name, mask.view(shapes[name])


def zeroed(weights: Mapping[str, Tensor], table: Table, selection: Selection) -> dict[str, Tensor]:
    """The state dict of the source's shape that computes what the folded model does: gates multiplied in, the rest 0.

    Raises:
        ShearingError: see :func:`check_zeroable`, and :func:`llmshearing.fold.fold.fold_lazily`.
    """
    check_zeroable(table, selection)
    small = fold(weights, table, selection)
    new_names = {name: new for name, new, _, _ in renamed(table, selection)}
    result: dict[str, Tensor] = {}
    for name, numbers in kept_numbers(table, selection):
        result[name] = torch.zeros_like(weights[name])
        if name in new_names:
            result[name].view(-1)[numbers.flatten()] = small[new_names[name]].flatten()
    for name, spec, _ in table.instances():
        if spec.alias is not None:
            result[name] = result[spec.alias]
    return result


def check_zeros(weights: Mapping[str, Tensor], table: Table, selection: Selection) -> None:
    """Raises ShearingError where an element that the selection closes is not 0, naming tensors."""
    wrong = [
        name
        for name, mask in kept_elements(table, selection)
        if bool((weights[name].cpu().masked_select(~mask) != 0).any())
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ShearingError(f"what the selection closes is not 0 in {', '.join(wrong[:3])}{more}")
