"""Guard: stops a run whose loss or gradient is no longer finite, before the step that would spread it."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmshearing.data.mixture.dataset import MixtureDataset
from llmshearing.errors import ShearingError
from llmshearing.training.resilience.saver import Saver


class Guard(Callback):
    """Between backward pass and optimizer step: on all ranks, looks at every loss and gradient.

    Where one is not finite the state before the batch is saved, and the error names rank, domains and samples.

    Args:
        dataset: the training data. saver: None saves nothing.
    """

    def __init__(self, dataset: MixtureDataset, saver: Saver | None) -> None:
        self.dataset, self.saver = dataset, saver
        self._position: dict[str, Any] = {}
        self._losses: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        """Note where the data stand."""
        self._position = self.dataset.mixture.state_dict()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Note where the data stand: they run one batch ahead when the guard has to save."""
        self._position = self.dataset.mixture.state_dict()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Forget the last batch."""
        self._losses, self._rows = [], []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Note a microbatch's loss and samples."""
        self._losses.append(state.loss.detach().sum())
        self._rows.append((state.outputs["sample_loss"].detach(), state.batch["set"], state.batch["sample"]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Go on only if all is finite on every rank."""
        bad_loss = not torch.stack(self._losses).isfinite().all()
        scaled = state.precision == Precision.AMP_FP16  # its scaler expects and skips gradients that overflow
        bad = bad_loss or not (scaled or finite_gradients(state.model))
        anywhere = state.device.tensor_to_device(torch.tensor([int(bad)]))
        dist.all_reduce(anywhere, reduce_operation="MAX")
        if not anywhere.item():
            return
        found = dist.all_gather_object(self._describe(bad_loss) if bad else None)
        where = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None)
        self.dataset.mixture.load_state_dict(self._position)
        saved = self.saver.ensure(state, logger) if self.saver is not None else None
        kept = f"the state before this batch is in {saved}" if saved else "the state before this batch was not saved"
        raise ShearingError(
            f"training stopped before the step of batch {state.timestamp.batch.value + 1}: {where}; {kept}. Going on "
            "from there meets the same batch again: correct its data, lower optimizer.lr, or clip gradients"
        )

    def _describe(self, bad_loss: bool) -> str:
        """This rank's samples: those whose own loss is not finite, or else all of the batch."""
        loss, domain, sample = (torch.cat(column).cpu() for column in zip(*self._rows, strict=True))
        of_samples = loss.isfinite().logical_not()
        chosen = of_samples if of_samples.any() else torch.ones_like(of_samples)
        names = self.dataset.set_names
        ids: dict[str, list[str]] = {}
        for index, number in zip(domain[chosen].tolist(), sample[chosen].tolist(), strict=True):
            ids.setdefault(names[index] if names else "data", []).append(str(number))
        what = f"loss {torch.stack(self._losses).mean().item()}" if bad_loss else "a gradient that is not finite"
        return what + " with samples " + ", ".join(f"{name} {' '.join(numbers)}" for name, numbers in ids.items())


@torch.no_grad()
def finite_gradients(model: torch.nn.Module) -> bool:
    """Whether every gradient of this rank (its shards of them) is finite; one transfer from the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    norms = torch._foreach_norm([grad for grad in local if grad.numel()])
    return not norms or bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
