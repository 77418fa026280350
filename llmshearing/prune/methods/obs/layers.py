"""Run a decoder one layer at a time. Hooks stop a pass as soon as they have what is wanted.

This code knows where the layers are, and nothing else of the model. It records the further arguments of a layer
(positions, masks) from transformers' own forward pass. One layer works at a time, wherever the model was placed. The
inputs of the layer and of its projections wait in the CPU's memory or on disk, so that no part of a layer runs twice:

    O, the projection out of attention:    norm, queries, keys, values, attention    -> what O reads
    D, the projection out of the MLP:      O on that, norm, projections into it      -> what D reads
    next layer:                            O and D on those                          -> what the next layer reads

Shape legend: N sequences, T tokens, B sequences in a batch, d hidden, n inputs of a projection.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.compat import RECORD_WITH_CACHE
from llmshearing.errors import ShearingError
from llmshearing.families.table import Table
from llmshearing.prune.calibration import Calibration
from llmshearing.prune.methods.decoder import first, patched

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# A Hessian is computed in strips of so many rows, from the diagonal to the right. The rest is their mirror image.
COLUMNS = 256


class _Stop(Exception):
    """Ends a forward pass."""


@dataclass
class Running:
    """states: what the current layer reads, [N, T, d]. arguments: of each layer, by the size of the batch.

    room: width -> an empty tensor [N, T, width]. read: projections of the current layer -> their recorded inputs.
    """

    layers: Sequence[nn.Module]
    arguments: Mapping[int, Sequence[Arguments]]
    states: Tensor
    batch_size: int
    device: torch.device
    room: Callable[[int], Tensor]
    read: dict[nn.Module, tuple[Tensor, bool]] = field(default_factory=dict)

    def hessian(self, number: int, linear: nn.Module, size: int, attention: bool) -> Tensor:
        """2 X X^T [n, n] of the ``size`` numbers that ``linear`` reads inside the current layer, float32 or wider.

        attention: whether it ends an attention. In transformers an attention returns its weights beside its output.
        """
        dtype = torch.promote_types(self.states.dtype, torch.float32)
        total = torch.zeros(size, size, dtype=dtype, device=self.device)
        read = self.room(size)
        for at, place in enumerate(read.split(self.batch_size)):
            inputs = self._until(number, at, linear)
            place.copy_(inputs.view(place.shape))  # some families join batch and tokens
            rows = inputs.flatten(0, -2).to(dtype)  # [B T, n]
            for start in range(0, size, COLUMNS):
                some = rows[:, start : start + COLUMNS]
                total[start : start + COLUMNS, start:].addmm_(some.t(), rows[:, start:], alpha=2)
        self.read[linear] = read, attention
        return total.triu_() + total.triu(1).t()

    def advance(self, number: int) -> None:
        """Go on to the next layer: ``states`` becomes what this one writes."""
        for at, batch in enumerate(self.states.split(self.batch_size)):
            batch.copy_(self.run(number, at))
        self.read.clear()

    def _until(self, number: int, at: int, linear: nn.Module) -> Tensor:
        """What ``linear`` reads of a batch; nothing behind it runs."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        hook = linear.register_forward_pre_hook(keep)
        try:
            self.run(number, at)
        except _Stop:
            pass
        finally:
            hook.remove()
        return seen[0]

    def run(self, number: int, at: int) -> Tensor:
        """Run the current layer on a batch. A module whose projection has recorded inputs starts from these."""
        batch = self.states.split(self.batch_size)[at]
        args, kwargs = self.arguments[len(batch)][number]
        known = {}
        for linear, (read, attention) in self.read.items():
            layer = self.layers[number]
            owner = next(module for module in layer.modules() if linear in module.children())
            if owner is layer:  # the projection stands in the layer itself: no forward of its own could start there
                continue
            known[owner] = partial(self._from_read, linear, read.split(self.batch_size)[at], attention)
        with patched(known):
            return first(self.layers[number](batch.to(self.device), *args, **kwargs))

    def _from_read(self, linear: nn.Module, read: Tensor, attention: bool, *args: Any, **kwargs: Any) -> Any:
        """What a module that ends in ``linear`` returns."""
        output = linear(read.to(self.device))
        return (output, None) if attention else output


def hidden_states(
    model: PreTrainedModel, table: Table, calibration: Calibration, count: int, offload: Path | str | None
) -> Running:
    """The first ``count`` layers, about to run layer 0. offload: directory for temporary files; None: memory."""
    layers = list(model.get_submodule(table.layers_path))[:count]  # type: ignore[arg-type]
    sizes = {len(ids): ids for ids in calibration.batches()}  # the last batch may be smaller
    arguments = {size: _record(model, layers, ids)[1] for size, ids in sizes.items()}
    room = partial(_room, calibration.select.shape, model.dtype, offload)
    states = room(model.get_input_embeddings().embedding_dim)
    for batch, ids in zip(states.split(calibration.batch_size), calibration.batches(), strict=True):
        batch.copy_(_record(model, layers[:1], ids)[0])
    return Running(layers, arguments, states, calibration.batch_size, model.device, room)


def _record(model: PreTrainedModel, layers: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, list[Arguments]]:
    """(input of the first layer, further arguments of each layer). The pass stops at the last of them."""
    states: list[Tensor] = []
    others: list[Arguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        # The cache itself is dropped.
        named |= {name: None for name in ("past_key_value", "past_key_values") if name in named}
        named |= {"use_cache": False} if "use_cache" in named else {}
        others.append((args[1:], named))
        if not states:
            states.append(args[0] if args else kwargs["hidden_states"])
        if len(others) == len(layers):
            raise _Stop

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids=ids.to(model.device), use_cache=RECORD_WITH_CACHE)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return states[0], others


def _room(tokens: torch.Size, dtype: torch.dtype, offload: Path | str | None, width: int) -> Tensor:
    """Room [N, T, width] in memory, or in a file without a name, which is gone with the tensor."""
    shape = torch.Size((*tokens, width))
    if offload is None:
        return torch.empty(shape, dtype=dtype)
    if not Path(offload).is_dir():
        raise ShearingError(f"offload {offload} is no directory")
    needed, free = shape.numel() * dtype.itemsize, shutil.disk_usage(offload).free
    if needed > free:  # a mapped file that cannot grow ends the process without a message
        raise ShearingError(f"offload {offload} has {free:,} bytes free; activations {list(shape)} need {needed:,}")
    with tempfile.NamedTemporaryFile(dir=offload, prefix=".obs-") as file:
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
