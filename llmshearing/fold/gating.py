"""Run a transformers model at the size of a selection: gating inside its own modules.

:func:`attach` swaps the class of every module that owns a tensor of the table (Linear, Embedding, norm) for a subclass
that gates and gathers its weight on the fly, of attention for one that keeps its group size, and of the decoder layers
for one that returns its input when the layer is closed. No parameter is renamed, moved or copied.

    gating = attach(model, table)
    gating.set(selection)        # the next forward passes run the folded model; None: the whole model

Shape legend: B batch, T tokens, d open hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmshearing.errors import ShearingError
from llmshearing.families.table import Table
from llmshearing.fold.fold import Cut, gate_and_gather, length, resolve
from llmshearing.fold.norm import rms_norm
from llmshearing.fold.selection import Selection


class Gating:
    """The live selection of one model, resolved to a cut per tensor."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.selection: Selection | None = None
        self._cuts: dict[str, Cut] = {}

    def set(self, selection: Selection | None) -> None:
        """Use a selection from now on.

        Everything is resolved here, outside the layers: recomputation under checkpointing then sees the same tensors.

        Raises:
            ShearingError: the selection cuts the vocabulary, which needs new token ids: fold it.
        """
        if selection is not None and "vocab" in selection.units:
            raise ShearingError("a selection of vocabulary can be folded, not run: fold it first")
        self.selection = selection
        self._cuts = {} if selection is None else resolve(self.table, selection)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The tensor of this name as the folded model has it, in the dtype of autocast where that is on."""
        if self.selection is None:
            return weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and weight.dim() == 2 else None
        return gate_and_gather(weight, self._cuts[name], dtype)

    def apply_columns(self, name: str, values: Tensor) -> Tensor:
        """Rows that were looked up in the 2-D tensor of this name, as the folded model has them: [..., d]."""
        return values if self.selection is None else gate_and_gather(values, Cut(self._cuts[name].parts[1:]))

    def padding(self, name: str) -> int:
        """How many elements of the last dimension of the tensor of this name are 0, there to round their number up."""
        return 0 if self.selection is None else self._cuts[name].parts[-1].padding

    def layer_is_open(self, layer: int) -> bool:
        return self.selection is None or self.selection.layer_is_open(layer)

    def heads_per_group(self, layer: int) -> int | None:
        """Query heads that share a KV head in a layer; None: as in the source."""
        if self.selection is None:
            return None
        query, kv = (length(self.table, axis, layer, self.selection) for axis in self.table.attention_axes)
        return query // kv if kv else None


class _Gated:
    """What every swapped module has: the gating, and the names of its parameters in the state dict."""

    gating: Gating
    tensor_names: dict[str, str]

    def gated(self, parameter: str) -> Tensor | None:
        value = getattr(self, parameter)
        return None if value is None else self.gating.apply(self.tensor_names[parameter], value)


class GatedLinear(_Gated, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.gated("weight"), self.gated("bias"))  # type: ignore[arg-type]


class GatedEmbedding(_Gated, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        # Look up first: B * T rows are fewer than the vocabulary, and the gradient to the table stays a scatter.
        values = F.embedding(input, self.weight, self.padding_idx)
        return self.gating.apply_columns(self.tensor_names["weight"], values)


class GatedRMSNorm(_Gated):
    """RMSNorm over the open units, in float32 or wider (transformers' own always drops to float32)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Several projections read this: under autocast, cast once here instead of once in each.
        device, dtype = hidden_states.device.type, hidden_states.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        size = hidden_states.shape[-1] - self.gating.padding(self.tensor_names["weight"])
        return rms_norm(hidden_states, self.gated("weight"), self.variance_epsilon, dtype, size)  # type: ignore[arg-type,attr-defined]


class GatedAttention(_Gated):
    """Any attention of transformers whose KV heads are shared; sets the number of query heads per KV head."""

    layer: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        per_group = self.gating.heads_per_group(self.layer)  # 0 where every query head is closed and KV heads stay
        self.num_key_value_groups = self.source_groups if per_group is None else per_group  # type: ignore[attr-defined]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class GatedLayer(_Gated):
    """A decoder layer that costs nothing while it is closed."""

    layer: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.gating.layer_is_open(self.layer):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return _ZeroGradients.apply(hidden_states, *self.parameters())  # type: ignore[attr-defined]


class _ZeroGradients(torch.autograd.Function):
    """Identity that gives the parameters of a closed layer a gradient of zeros.

    Without one DDP stops at the next step, AdamW skips momentum and decay, and resuming finds no optimizer state.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.parameters)
        return (gradient, *zeros)


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _subclass(mixin: type, original: type) -> type:
    """The gated form of a class; one for all modules, so that isinstance and compilation see one type."""
    key = (mixin, original)
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = type(f"Gated{original.__name__}", key, {})
    return _SUBCLASSES[key]


def _gated_class(module: nn.Module, name: str) -> type:
    if isinstance(module, nn.Linear):
        return _subclass(GatedLinear, type(module))
    if isinstance(module, nn.Embedding):
        return _subclass(GatedEmbedding, type(module))
    if hasattr(module, "variance_epsilon"):
        return _subclass(GatedRMSNorm, type(module))
    raise ShearingError(f"{name}: no gated form of {type(module).__name__}; there are Linear, Embedding and RMSNorm")


def attach(model: nn.Module, table: Table) -> Gating:
    """Make a transformers model follow a selection. Call before any sharding wrapper.

    Raises:
        ShearingError: the state dict and the table differ, a module has no gated form, or the model is gated already.
    """
    if any(isinstance(module, _Gated) for module in model.modules()):
        raise ShearingError("the model is gated already: use the Gating that attach returned the first time")
    table.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    gating = Gating(table)
    modules = dict(model.named_modules())
    for tensor_name, _, layer in table.instances():
        path, _, parameter = tensor_name.rpartition(".")
        module = modules[path]
        if not isinstance(module, _Gated):
            _swap(module, _gated_class(module, path), gating)
            module.tensor_names = {}  # type: ignore[assignment]
        module.tensor_names[parameter] = tensor_name  # type: ignore[operator,index]
        if layer is not None:
            _attach_layer(modules, path, layer, gating)
    return gating


def _attach_layer(modules: dict[str, nn.Module], path: str, layer: int, gating: Gating) -> None:
    """Swap the decoder layer and the attention that hold the module at ``path``."""
    parts = path.split(".")
    layer_path = ".".join(parts[: parts.index(str(layer)) + 1])
    for name in (layer_path, path.rpartition(".")[0]):
        module = modules[name]
        if isinstance(module, _Gated):
            continue
        if name == layer_path:
            _swap(module, _subclass(GatedLayer, type(module)), gating)
        elif hasattr(module, "num_key_value_groups"):
            _swap(module, _subclass(GatedAttention, type(module)), gating)
            module.source_groups = module.num_key_value_groups
        module.layer = layer  # type: ignore[assignment]


def _swap(module: nn.Module, to: type, gating: Gating) -> None:
    module.__class__ = to
    module.gating = gating  # type: ignore[assignment]


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`: the modules' own classes again. Parameters were never touched."""
    for module in model.modules():
        if isinstance(module, GatedAttention):
            module.num_key_value_groups = module.source_groups  # type: ignore[attr-defined]
        if isinstance(module, _Gated):
            module.__class__ = type(module).__bases__[1]
            for name in ("gating", "tensor_names", "layer", "source_groups"):
                module.__dict__.pop(name, None)
