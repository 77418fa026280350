"""Turn the residual stream into another basis: the same function, with other hidden units.

An RMSNorm divides by a length, which no orthogonal Q changes. Once each norm's weight is multiplied into the tensors
that read it, hidden units can be turned by one Q for the whole model (SliceGPT, arXiv 2401.15024, turns each layer
apart and needs an architecture of its own for it):

    embedding E -> E Q        readers W -> W diag(w) Q        writers W -> Q^T W, b -> Q^T b        norms -> 1

Which tensors read and which write hidden units stands in the table. Norms inside heads stay as they are.

Shape legend: d hidden units; Q [d, d].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.table import Table, TensorSpec, axes_of

HIDDEN = "hidden"


def stream_norms(table: Table) -> list[TensorSpec]:
    """The rows of norms of hidden units."""
    return [spec for spec in table.tensors if spec.module.form.endswith("norm") and spec.axes == (HIDDEN,)]


def check_turnable(table: Table) -> None:
    """Refuse families whose hidden units cannot be turned.

    Raises:
        ShearingError: a norm subtracts the mean, which is a direction of its own, or stands behind a branch, where its
            weights would have to follow Q.
    """
    norms = stream_norms(table)
    if other := sorted({spec.module.form for spec in norms if spec.module.form != "rms_norm"}):
        raise ShearingError(
            f"hidden units of the {table.family} family cannot be turned: its norms ({', '.join(other)}) subtract the "
            "mean"
        )
    if behind := [spec.name for spec in norms if spec.scaled]:
        raise ShearingError(
            f"hidden units of the {table.family} family cannot be turned: {behind[0]} stands behind a branch, so that "
            "its weights belong to single hidden units"
        )


def turn(weights: Mapping[str, Tensor], table: Table, basis: Tensor, *, untie: bool = False) -> dict[str, Tensor]:
    """All tensors of the turned model; computed in float64, in the dtypes of ``weights``.

    Args:
        basis: Q, orthogonal; its columns are the new hidden units.
        untie: a head that is the embedding becomes a tensor of its own, since the final norm's weight goes into it.

    Raises:
        ShearingError: the family's hidden units cannot be turned; the head is tied and ``untie`` is not given; or Q is
            not orthogonal.
    """
    check_turnable(table)
    check_tied(table, untie)
    wide = basis.to(torch.float64)
    if not torch.allclose(wide.T @ wide, torch.eye(len(wide), dtype=torch.float64, device=wide.device), atol=1e-8):
        raise ShearingError("the basis to turn hidden units into is not orthogonal")
    factors = _factors(weights, table)
    turned = {}
    for name, spec, layer in table.instances():
        tensor = weights[name].to(torch.float64)
        if spec in stream_norms(table):
            tensor = torch.full_like(tensor, 1.0 - spec.module.offset)
        else:
            if spec.read() == HIDDEN and (spec.block, layer) in factors:
                tensor = _times(tensor, factors[spec.block, layer], spec.reads or 0)
            for dim, dimension in enumerate(spec.axes):
                if axes_of(dimension) == (HIDDEN,):
                    tensor = torch.tensordot(tensor, wide, dims=([dim], [0])).movedim(-1, dim)
        turned[name] = tensor.to(weights[name].dtype).contiguous()
    return turned


def check_tied(table: Table, untie: bool) -> None:
    """Refuse to turn a tied model in silence: it gets a head of its own."""
    heads = [spec for spec in table.tensors if spec.alias is not None]
    if heads and not untie:
        rows, hidden = (table.length(dimension) for dimension in heads[0].axes)
        raise ShearingError(
            f"{heads[0].name} is {heads[0].alias}. Turning multiplies the final norm into the head alone, so that they "
            f"part: {rows:,} x {hidden:,} parameters more, or as many rows of the width that is left. Say --untie"
        )


def _factors(weights: Mapping[str, Tensor], table: Table) -> dict[tuple[str | None, int | None], Tensor]:
    """(block, layer) -> what its norm multiplies by, which all readers of hidden units in the block read."""
    return {
        (spec.block, layer): weights[name].to(torch.float64) + spec.module.offset
        for name, spec, layer in table.instances()
        if spec in stream_norms(table)
    }


def _times(tensor: Tensor, factor: Tensor, dim: int) -> Tensor:
    return tensor * factor.reshape([-1 if at == dim else 1 for at in range(tensor.dim())])
