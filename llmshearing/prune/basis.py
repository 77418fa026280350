"""The subspace of hidden units in which the readers of every norm lose least: `turn --basis output`.

What is kept of the stream at norm n are the directions P [d, k]. From them the best linear prediction of what the norm
gives is C P (P^T C P)^-1 P^T x^. Its error, as the loss feels it through the readers' gradients g, is to first order

    e_n(P) = 1 - tr(G C P (P^T C P)^-1 P^T C) / tr(G C)              C = E[x^ x^^T], G = E[g g^T] at norm n

and P minimises sum_n tr(G_n C_n) e_n(P): by Adam on a free matrix whose QR decomposition is P, from the directions of
most energy on. Statistics take one pass forward and backward, and 2 d^2 numbers a norm (docs/research/recover.md,
section 4, steps 2 and 3).

Shape legend: d hidden units, k kept directions, 2L + 1 norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.families.table import Table
from llmshearing.fold.turn import stream_norms
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import IGNORED, Calibration
from llmshearing.prune.energy import normed_rows
from llmshearing.prune.method import frozen

STEPS, RATE = 300, 3e-3
SETTLED, PATIENCE = 1e-3, 30  # it ends early where this many steps lower the least error by less than this part
RIDGE = 1e-6  # of P^T C P, whose mean eigenvalue is near 1


@dataclass
class NormStatistics:
    """Sums over tokens at one norm, float32 on the CPU, [d, d] each: of x^ x^^T and of g g^T."""

    states: Tensor
    gradients: Tensor
    tokens: int = 0


def norm_statistics(model: PreTrainedModel, table: Table, calibration: Calibration) -> dict[str, NormStatistics]:
    """Name of each norm's weight, which must be 1 (`llmshearing.fold.turn`) -> its statistics."""
    size = table.axes["hidden"].length
    names = [name for name, spec, _ in table.instances() if spec in stream_norms(table)]
    found = {name: NormStatistics(torch.zeros(size, size), torch.zeros(size, size)) for name in names}
    with frozen(model), _recorded(model, found):
        for batch, labels in tqdm([*calibration.labelled()], desc="states and gradients at norms", unit="batch"):
            ids, wanted = batch.to(model.device), labels[:, 1:].to(model.device)
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                losses = F.cross_entropy(
                    logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                losses.backward()
    return found


@contextmanager
def _recorded(model: PreTrainedModel, found: dict[str, NormStatistics]) -> Iterator[None]:
    def watch(name: str) -> Any:
        sums = found[name]

        def backward(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).float()
            sums.gradients += (rows.T @ rows).cpu()

        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = normed_rows(inputs[0].detach())
            sums.states += (rows.T @ rows).cpu()
            sums.tokens += len(rows)
            output.register_hook(backward)

        return model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook)

    # No parameter asks for gradients: the stream begins with a leaf that does.
    start = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    hooks = [start, *(watch(name) for name in found)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class OutputError:
    """The objective above, as a function of P; 0 where nothing is lost, 1 where all is."""

    def __init__(self, statistics: Mapping[str, NormStatistics]) -> None:
        self.states = torch.stack([sums.states / sums.tokens for sums in statistics.values()])  # C [norms, d, d]
        gradients = torch.stack([sums.gradients for sums in statistics.values()])
        self.both = self.states @ gradients @ self.states  # C G C: all that the objective needs of G
        traces = (gradients * self.states).sum((1, 2))  # tr(G C)
        self.whole = traces.sum()

    def __call__(self, kept: Tensor) -> Tensor:
        """Error of the directions P [d, k] (orthonormal columns)."""
        ridge = RIDGE * torch.eye(kept.shape[1], dtype=kept.dtype)
        inner = kept.T @ self.states @ kept + ridge
        told = torch.linalg.solve(inner, kept.T @ self.both @ kept)
        return 1 - told.diagonal(dim1=1, dim2=2).sum() / self.whole


@torch.no_grad()
def by_energy(directions: Tensor, covariance: Tensor) -> Tensor:
    """The same span [d, m] in columns of falling energy, which are uncorrelated; float64."""
    _, turn = torch.linalg.eigh(directions.T @ covariance @ directions)
    return directions @ turn.flip(1)


def output_basis(statistics: Mapping[str, NormStatistics], covariance: Tensor, keep: int, steps: int = STEPS) -> Tensor:
    """Q [d, d] float64: ``keep`` directions that minimise the output error, then the others; both by energy.

    Args:
        covariance: sum over norms of E[x^ x^^T], float64 [d, d].
    """
    error = OutputError(statistics)
    start = torch.linalg.eigh(covariance)[1].flip(1)[:, :keep]
    free = start.float().clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=RATE)
    best, found = start, [float("inf")]
    with torch.enable_grad(), tqdm(total=steps, desc="directions by output error", unit="step") as bar:
        for _ in range(steps):
            kept = torch.linalg.qr(free).Q
            loss = error(kept)
            if loss.item() < found[-1]:
                best = kept.detach().double()
            found.append(min(loss.item(), found[-1]))  # the least so far
            if len(found) > PATIENCE + 1 and found[-1 - PATIENCE] - found[-1] < SETTLED * found[-1]:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(error=f"{loss.item():.4f}")
            bar.update()
    best = torch.linalg.qr(best).Q
    others = torch.linalg.qr(torch.cat([best, torch.eye(len(best), dtype=torch.float64)], 1)).Q[:, keep:]
    return torch.cat([by_energy(best, covariance), by_energy(others, covariance)], 1)
