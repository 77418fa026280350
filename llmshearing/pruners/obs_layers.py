"""Running a decoder one layer at a time, with hooks that stop as soon as what is wanted is there.

Nothing but the layers' names is known of the model. What else a layer is called with (positions, masks) is recorded
from transformers' own forward. Only one layer is at work at a time, wherever the model was placed; hidden states wait
in the CPU's memory or on disk.

Shape legend: N sequences, T tokens, B sequences in a batch, d hidden, n inputs of a projection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.axes import Table
from llmshearing.errors import ShearingError
from llmshearing.pruners.calibration import Calibration
from llmshearing.pruners.decoder import first

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass."""


@dataclass(frozen=True)
class Running:
    """states: what the current layer reads, [N, T, d]. arguments: of each layer, by the size of the batch."""

    layers: Sequence[nn.Module]
    arguments: Mapping[int, Sequence[Arguments]]
    states: Tensor
    batch_size: int
    device: torch.device

    def hessian(self, number: int, linear: nn.Linear) -> Tensor:
        """2 X X^T [n, n] of what ``linear`` reads inside the current layer, in float32 or wider."""
        size, dtype = linear.in_features, torch.promote_types(linear.weight.dtype, torch.float32)
        total = torch.zeros(size, size, dtype=dtype, device=self.device)

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].flatten(0, -2).to(dtype)  # [B T, n]
            total.addmm_(inputs.t(), inputs, alpha=2)
            raise _Stop

        hook = linear.register_forward_pre_hook(add)
        try:
            for batch in self.states.split(self.batch_size):
                try:
                    self._run(number, batch)
                except _Stop:
                    continue
        finally:
            hook.remove()
        return total

    def advance(self, number: int) -> None:
        """Go on to the next layer: ``states`` becomes what this one writes."""
        for batch in self.states.split(self.batch_size):
            batch.copy_(self._run(number, batch))

    def _run(self, number: int, batch: Tensor) -> Tensor:
        args, kwargs = self.arguments[len(batch)][number]
        return first(self.layers[number](batch.to(self.device), *args, **kwargs))


@contextmanager
def hidden_states(
    model: PreTrainedModel, table: Table, calibration: Calibration, count: int, offload: Path | str | None
) -> Iterator[Running]:
    """The first ``count`` layers, about to run layer 0. offload: directory for a temporary file; None: memory."""
    prefix = next(spec.name for spec in table.tensors if spec.per_layer).partition("{layer}")[0]
    layers = list(model.get_submodule(prefix.rstrip(".")))[:count]  # type: ignore[arg-type]
    sizes = {len(ids): ids for ids in calibration.batches()}  # the last batch may be smaller
    arguments = {size: _record(model, layers, ids)[1] for size, ids in sizes.items()}
    with _storage(model, calibration, offload) as states:
        for batch, ids in zip(states.split(calibration.batch_size), calibration.batches(), strict=True):
            batch.copy_(_record(model, layers[:1], ids)[0])
        yield Running(layers, arguments, states, calibration.batch_size, model.device)


def _record(model: PreTrainedModel, layers: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, list[Arguments]]:
    """(what the first of the layers reads, what else each of them is called with); stops at the last one."""
    states: list[Tensor] = []
    others: list[Arguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        # With a cache transformers leaves the causal mask to the attention kernel; the cache itself is not wanted.
        named |= {name: None for name in ("past_key_value", "past_key_values") if name in named}
        named |= {"use_cache": False} if "use_cache" in named else {}
        others.append((args[1:], named))
        if not states:
            states.append(args[0] if args else kwargs["hidden_states"])
        if len(others) == len(layers):
            raise _Stop

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids=ids.to(model.device), use_cache=True)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return states[0], others


@contextmanager
def _storage(model: PreTrainedModel, calibration: Calibration, offload: Path | str | None) -> Iterator[Tensor]:
    """Room for hidden states [N, T, d] in memory, or in a file that is gone afterwards."""
    shape = torch.Size((*calibration.select.shape, model.get_input_embeddings().embedding_dim))
    if offload is None:
        yield torch.empty(shape, dtype=model.dtype)
        return
    if not Path(offload).is_dir():
        raise ShearingError(f"offload {offload} is no directory")
    with tempfile.NamedTemporaryFile(dir=offload, prefix=".obs-") as file:
        yield torch.from_file(file.name, shared=True, size=shape.numel(), dtype=model.dtype).view(shape)
