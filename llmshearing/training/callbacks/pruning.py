"""PruningCallback: how far the masks are, in the logs and on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmshearing import files as durable
from llmshearing.masks.l0 import L0Masks

log = logging.getLogger(__name__)


def mask_metrics(masks: L0Masks) -> dict[str, float]:
    """Expected and target sparsity, multipliers and open units of every mask kind; expected and target parameters.

    One transfer from the device.
    """
    with torch.no_grad():
        values: dict[str, torch.Tensor] = {}
        for kind, rows in masks.sparsity().items():
            values[f"expected_sparsity/{kind}"] = rows.mean()
            values[f"open_units/{kind}"] = (1 - rows).mean() * masks.row_size(kind)
        for kind in masks.lambda_1:
            values[f"lambda_1/{kind}"] = masks.lambda_1[kind].squeeze()
            values[f"lambda_2/{kind}"] = masks.lambda_2[kind].squeeze()
        values["expected_parameters"] = masks.expected_parameters()
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
    metrics = dict(zip(values, numbers, strict=True))
    metrics |= {f"target_sparsity/{kind}": value for kind, value in masks.targets_now().items()}
    metrics["target_parameters"] = masks.target_parameters()
    metrics["expected_sparsity/total"] = 1 - metrics["expected_parameters"] / masks.table.count(counted_only=True)
    return {f"pruning/{name}": value for name, value in metrics.items()}


def save_gates(masks: L0Masks, to_target: bool, path: Path) -> None:
    """Write deterministic gates and log alphas (``gate.<kind>``, ``log_alpha.<kind>``); temporary name, then rename."""
    tensors = {f"gate.{kind}": gate.cpu() for kind, gate in masks.deterministic(to_target).items()}
    tensors |= {f"log_alpha.{kind}": a.detach().cpu().contiguous() for kind, a in masks.log_alpha.items()}
    with durable.whole(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


class PruningCallback(Callback):
    """Logs the masks after every batch and saves the gates at every evaluation.

    Args:
        masks: the model's masks. to_target: whether evaluation runs at the target shape.
        folder: where ``gates-ba<step>.safetensors`` go; None saves nothing.
    """

    def __init__(self, masks: L0Masks, to_target: bool = False, folder: str | Path | None = None) -> None:
        self.masks, self.to_target = masks, to_target
        self.folder = Path(folder) if folder is not None else None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log."""
        logger.log_metrics(mask_metrics(self.masks))

    def eval_end(self, state: State, logger: Logger) -> None:
        """Save."""
        if self.folder is not None and dist.get_global_rank() == 0:
            path = self.folder / f"gates-ba{state.timestamp.batch.value}.safetensors"
            try:
                save_gates(self.masks, self.to_target, path)
            except (OSError, SafetensorError) as error:  # a full disk must not end training
                log.error("%s was not written: %s", path, error)
