"""A head that is the embedding again, after a turn has parted them.

Turning multiplies the final norm's weight g into the head alone: embedding E, head E diag(g). Turned by Q, and cut to
the columns P of Q, they are E P and H = E diag(g) P. A tied model can compute E P diag(n) in place of H, where n is its
final norm's weight. How near that comes depends on the axes inside the subspace of P, which are free: any rotation R
of the kept units turns E P into E P R and H into H R. The best symmetric M,

    M = argmin ||E P M - H||_F        (a Sylvester equation; closed in the eigenvectors of the Gram matrix of E P)

is diagonal in its own eigenvectors. With these as R, and its eigenvalues as n, E P R diag(n) = E P M R comes as near to
H R as a symmetric M allows. Where g is nearly constant nothing is lost (0.0004 nats on the quickstart's source).

Shape legend: V tokens, d hidden units, w of them kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmshearing.errors import ShearingError
from llmshearing.families.table import Table, TensorSpec, axes_of
from llmshearing.fold.turn import HIDDEN, stream_norms

MOST = 0.5
"""Share of the head's energy that tying may miss. A head of its own right, never tied, is missed nearly whole."""


def tying_rotation(embedding: Tensor, head: Tensor) -> Tensor:
    """R [w, w], orthogonal, float64: axes in which a diagonal brings ``embedding`` [V, w] nearest to ``head``."""
    embedding, head = embedding.double(), head.double()
    values, vectors = torch.linalg.eigh(embedding.T @ embedding)
    mixed = vectors.T @ (embedding.T @ head) @ vectors
    sums = values[:, None] + values[None, :]
    symmetric = vectors @ ((mixed + mixed.T) / sums.clamp_min(sums.max() * 1e-12)) @ vectors.T
    return torch.linalg.eigh(symmetric).eigenvectors


def ends_of(table: Table) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """(embedding, final norm, head).

    Raises:
        ShearingError: the residual stream does not begin and end as the tie needs it.
    """
    outside = [spec for spec in table.tensors if not spec.per_layer]
    whole = [spec for spec in outside if [axes_of(d) for d in spec.axes] == [("vocab",), (HIDDEN,)]]
    embeddings = [spec for spec in whole if spec.module.form == "embedding"]
    heads = [spec for spec in whole if spec.module.form == "linear"]
    norms = [spec for spec in stream_norms(table) if not spec.per_layer and spec.module.form == "rms_norm"]
    if len(embeddings) != 1 or len(norms) != 1 or len(heads) != 1:
        raise ShearingError(
            f"the {table.family} family does not have one embedding, one final RMSNorm and one head of hidden units"
        )
    return embeddings[0], norms[0], heads[0]


def tied(weights: Mapping[str, Tensor], table: Table) -> tuple[dict[str, Tensor], float]:
    """(tensors whose head is the embedding, share of the head's energy that this misses: 0 to 1).

    Args:
        table: of the model with a head of its own.

    Raises:
        ShearingError: the head is the embedding already, or is far from it; or see :func:`ends_of`.
    """
    embedding, norm, head = ends_of(table)
    if head.alias is not None:
        raise ShearingError(f"{head.name} is {head.alias} already")
    wide = weights[embedding.name].double()
    wanted = weights[head.name].double() * (weights[norm.name].double() + norm.module.offset)
    factor = (wide * wanted).sum(0) / wide.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    missed = ((wide * factor - wanted).square().sum() / wanted.square().sum()).item()
    if missed > MOST:
        raise ShearingError(
            f"{head.name} is not {embedding.name} times a factor for each hidden unit: the best factors miss "
            f"{missed:.0%} of its energy. A model is tied again that was turned with --tie_at and cut to that width"
        )
    changed = {
        norm.name: (factor - norm.module.offset).to(weights[norm.name].dtype),
        head.name: weights[embedding.name].clone(),
    }
    return {**weights, **changed}, missed
