"""A zeroed model keeps its zeros through every step: their gradients are 0, and they are set to 0 after each step.

With LoRA the difference B A keeps them: rows of B and columns of A of closed units are 0, and stay so.

    mask of W [out, in] = rows of open outputs x columns of open inputs      (B A)_ij = sum_r B_ir A_rj = 0 elsewhere
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, TrainerCallback

from llmshearing.checkpoints.output import SELECTION
from llmshearing.errors import ShearingError
from llmshearing.families.table import Table
from llmshearing.fold.selection import Selection, load_selection, table_of
from llmshearing.fold.zeros import ZEROED, kept_elements


def zeroed_selection(directory: Path | str, config: PretrainedConfig) -> tuple[Selection, Table] | None:
    """The selection of a zeroed model and its table; None of any other model."""
    file = Path(directory) / SELECTION
    if not file.is_file():
        return None
    selection, about = load_selection(file)
    return (selection, table_of(config, selection)) if about.get(ZEROED) else None


def masks_of(model: nn.Module, table: Table, selection: Selection) -> dict[str, Tensor]:
    """Name of a parameter that is trained -> mask of what stays. Of the model, or of its LoRA adapter."""
    kept = dict(kept_elements(table, selection))
    masks: dict[str, Tensor] = {}
    conv1d = {name for name, (spec, _) in table.by_name.items() if spec.module.form == "conv1d"}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensor, matrix = _owner(name)
        mask = kept.get(tensor)
        if mask is None:  # of an adapter's parameter that is no factor of a matrix
            raise ShearingError(
                f"{name}: what of it would have to stay 0 is not known; train LoRA matrices or all weights"
            )
        if matrix is not None:
            mask = mask.T if tensor in conv1d else mask
            _check_outer(tensor, mask)
            mask = (
                mask.any(0).expand(parameter.shape) if matrix == "A" else mask.any(1)[:, None].expand(parameter.shape)
            )
        if not bool(mask.all()):
            masks[name] = mask
    return masks


def _owner(name: str) -> tuple[str, str | None]:
    """The tensor that a parameter is, or is a LoRA factor of; which factor."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for matrix in ("A", "B"):
        module, found, _ = name.partition(f".lora_{matrix}.")
        if found:
            return f"{module}.weight", matrix
    return name, None


def _check_outer(name: str, mask: Tensor) -> None:
    if not torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None]):
        raise ShearingError(f"{name}: what stays is no block of rows and columns; LoRA cannot keep its zeros")


class KeepZeros(TrainerCallback):
    """Holds the zeros of a model's parameters, by their masks."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        self.held = [(parameters[name], mask) for name, mask in masks.items()]
        for parameter, mask in self.held:
            parameter.register_hook(_Masked(mask))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is closed to 0."""
        for parameter, mask in self.held:
            parameter.masked_fill_(~mask.to(parameter.device), 0.0)

    def on_optimizer_step(self, *given: Any, **more: Any) -> None:
        self.apply()


class _Masked:
    """A gradient without what is closed; the norm that clipping looks at does not count it either."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self.mask = self.mask.to(gradient.device)
        return gradient.masked_fill(~self.mask, 0.0)
