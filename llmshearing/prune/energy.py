"""What the norms of a model see: the energy of each hidden unit, and how hidden units go together.

    x^ = x / rms(x)          share of unit i in a norm's energy:  e_i = E[x^_i^2] / d        covariance:  C = E[x^ x^^T]

One pass over the sequences; memory is d for each norm, or one d x d matrix for all. Shape legend: d hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmshearing.families.table import Table
from llmshearing.fold.turn import stream_norms
from llmshearing.progress import tqdm
from llmshearing.prune.calibration import Calibration


def norm_energy(model: PreTrainedModel, table: Table, calibration: Calibration) -> dict[str, Tensor]:
    """Name of each RMSNorm's weight -> shares [d] of the units in its energy, float64 on the CPU; they sum to 1."""
    shares: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        share = rows.square().mean(0, dtype=torch.float64).cpu()
        shares[name] = shares[name] + share if name in shares else share

    _run(model, table, calibration, add, "energy of hidden units")
    return {name: share / share.sum() for name, share in shares.items()}


def norm_covariance(model: PreTrainedModel, table: Table, calibration: Calibration) -> Tensor:
    """[d, d] float64: the sum over norms of E[x^ x^^T], on the CPU."""
    size = table.axes["hidden"].length
    total = torch.zeros(size, size, dtype=torch.float64)

    def add(name: str, rows: Tensor) -> None:
        total.add_((rows.T @ rows).to("cpu", torch.float64) / len(rows))

    _run(model, table, calibration, add, "covariance of hidden units")
    return total


def normed_rows(stream: Tensor) -> Tensor:
    """x^ = x / rms(x), float32 [tokens, d], of what a norm reads."""
    rows = stream.flatten(0, -2).float()
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def _run(
    model: PreTrainedModel, table: Table, calibration: Calibration, add: Callable[[str, Tensor], None], what: str
) -> None:
    """Give ``add`` the name of each norm's weight and its inputs over their root mean square, [tokens, d]."""
    with torch.no_grad(), _watched(model, table, add):
        for batch in tqdm([*calibration.batches()], desc=what, unit="batch"):
            model(input_ids=batch.to(model.device), use_cache=False)


@contextmanager
def _watched(model: PreTrainedModel, table: Table, add: Callable[[str, Tensor], None]) -> Iterator[None]:
    norms = [spec for spec in stream_norms(table) if spec.module.form == "rms_norm"]

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            add(name, normed_rows(inputs[0]))

        return model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook)

    hooks = [watch(name) for name, spec, _ in table.instances() if spec in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
