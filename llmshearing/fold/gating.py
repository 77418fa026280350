"""Run a transformers model at the size of a selection: gating inside its own modules.

:func:`attach` swaps the class of every module that owns a tensor of the table for a subclass that gates and gathers its
weight on the fly. It swaps branches that look at numbers of heads or experts for ones that see the present numbers, and
decoder layers for ones that return their input while they are closed. No parameter is renamed, moved or copied.

    gating = attach(model, table)
    gating.set(selection)        # the next forward passes run the folded model; None: the whole model

Gated forms go by **exact class**: the table names the class of every module, and a module of another one, be it a
subclass, is refused by name. It may compute something else than the form does.

Shape legend: B batch, T tokens, d open hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmshearing.errors import ShearingError
from llmshearing.families.stored import as_stored
from llmshearing.families.table import Attribute, Module, Table, TensorSpec
from llmshearing.fold.fold import Cut, gate_and_gather, gather_columns, kept_experts, length, resolve
from llmshearing.fold.norm import layer_norm, rms_norm
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
        return values if self.selection is None else gather_columns(values, self._cuts[name])

    def padding(self, name: str) -> int:
        """How many hidden units that a norm of this name reads are 0, there to round their number up.

        Other units that are closed and kept, such as heads, are not 0 where a norm reads them: it counts them.
        """
        if self.selection is None or self.table.by_name[name][0].axes != ("hidden",):
            return 0
        return self._cuts[name].parts[-1].padding

    def layer_is_open(self, layer: int) -> bool:
        return self.selection is None or self.selection.layer_is_open(layer)

    def attribute(self, attribute: Attribute, layer: int) -> int | None:
        """The value of a module's attribute in a layer; None: as in the source."""
        if self.selection is None:
            return None
        number = length(self.table, attribute.axis, layer, self.selection)
        per = attribute.per
        each = per if isinstance(per, int) else length(self.table, per, layer, self.selection)
        return number // each if each else None

    def experts(self, layer: int) -> tuple[int, ...] | None:
        """Numbers of the experts that stay in a layer; None: all."""
        return None if self.selection is None else kept_experts(self.table, layer, self.selection)


# Modules that own tensors ------------------------------------------------------------------------------------------


class _Gated:
    """What every swapped module has: the gating, and the names of its parameters in the state dict."""

    gating: Gating
    tensor_names: dict[str, str]
    form: Module

    def gated(self, parameter: str) -> Tensor | None:
        value = getattr(self, parameter)
        return None if value is None else self.gating.apply(self.tensor_names[parameter], value)


class GatedLinear(_Gated):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.gated("weight"), self.gated("bias"))  # type: ignore[arg-type]


class GatedConv1D(_Gated):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.gated("weight").t(), self.gated("bias"))  # type: ignore[union-attr]


class GatedEmbedding(_Gated):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Look up first: B * T rows are fewer than the vocabulary, and the gradient to the table stays a scatter. What
        # the class does besides (a scale, an offset of positions) acts on whole rows.
        values = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.gating.apply_columns(self.tensor_names["weight"], values)


class _GatedNorm(_Gated):
    """A norm over the open units, in float32 or wider (transformers' own RMSNorms always drop to float32)."""

    def operands(self, x: Tensor) -> tuple[Tensor, float, torch.dtype, int]:
        """Weight, epsilon, dtype of the result, number of units that count."""
        # Several projections read this: under autocast, cast once here instead of once in each.
        device, dtype = x.device.type, x.dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        size = x.shape[-1] - self.gating.padding(self.tensor_names["weight"])
        weight = self.gated("weight")
        weight = weight + self.form.offset if self.form.offset else weight  # type: ignore[operator]
        return weight, getattr(self, self.form.eps), dtype, size  # type: ignore[return-value]


class GatedRMSNorm(_GatedNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, *self.operands(hidden_states))


class GatedLayerNorm(_GatedNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, epsilon, dtype, size = self.operands(input)
        return layer_norm(input, weight, self.gated("bias"), epsilon, dtype, size)


FORMS: dict[str, type] = {
    "linear": GatedLinear,
    "conv1d": GatedConv1D,
    "embedding": GatedEmbedding,
    "rms_norm": GatedRMSNorm,
    "layer_norm": GatedLayerNorm,
}


# Branches and layers -----------------------------------------------------------------------------------------------


class _ConfigView:
    """A config as one module sees it: a few keys of its own, all else the model's."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "whole":  # copies and pickles ask before there is a whole
            raise AttributeError(name)
        return getattr(self.whole, name)


class GatedBranch(_Gated):
    """A module that looks at numbers of heads or experts; sets them for what is open now."""

    layer: int
    attributes: tuple[Attribute, ...]
    source: dict[str, Any]
    experts_name: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for attribute in self.attributes:
            owner, name = _owner(self, attribute)
            number = self.gating.attribute(attribute, self.layer)
            setattr(owner, name, self.source[attribute.name] if number is None else number)
        if self.experts_name is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._with_experts(self.experts_name, *args, **kwargs)

    def _with_experts(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run with the open experts under new numbers. Those that no token goes to get gradients of zeros."""
        whole: nn.ModuleList = self._modules[name]  # type: ignore[attr-defined]
        kept = self.gating.experts(self.layer)
        # An attribute of the instance is found before the child module, which stays where it is.
        self.__dict__[name] = [*whole] if kept is None else [whole[expert] for expert in kept]
        try:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__[name]
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = _ZeroGradients.apply(first, *whole.parameters())
        return (first, *rest) if rest else first


def _owner(module: Any, attribute: Attribute) -> tuple[Any, str]:
    """What holds an attribute, and its name there."""
    config, dot, name = attribute.name.partition(".")
    return (getattr(module, config), name) if dot else (module, attribute.name)


class GatedLayer(_Gated):
    """A decoder layer that costs nothing while it is closed."""

    layer: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        tuples = self.gating.table.layer_tuple
        if self.gating.layer_is_open(self.layer):
            output = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            if isinstance(output, tuple) != tuples:  # the model would take a batch's first sequence for its states
                raise ShearingError(f"layer {self.layer} returns a {type(output).__name__}; layer_tuple is {tuples}")
            return output
        passed = _ZeroGradients.apply(hidden_states, *self.parameters())  # type: ignore[attr-defined]
        return (passed,) if tuples else passed


class _ZeroGradients(torch.autograd.Function):
    """Identity that gives parameters which take no part a gradient of zeros.

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


# Attaching ---------------------------------------------------------------------------------------------------------

_SUBCLASSES: dict[tuple[type, type], type] = {}


def _subclass(mixin: type, original: type) -> type:
    """The gated form of a class; one for all modules, so that isinstance and compilation see one type."""
    key = (mixin, original)
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = type(f"Gated{original.__name__}", key, {})
    return _SUBCLASSES[key]


def attach(model: nn.Module, table: Table) -> Gating:
    """Make a transformers model follow a selection. Call before any sharding wrapper.

    Raises:
        ShearingError: the state dict and the table differ, a module is of another class than the table says, or the
            model is gated already.
    """
    if any(isinstance(module, _Gated) for module in model.modules()):
        raise ShearingError("the model is gated already: use the Gating that attach returned the first time")
    as_stored(model)
    table.check({name: tuple(value.shape) for name, value in model.state_dict().items()})
    modules = dict(model.named_modules())
    if problems := list(_foreign(modules, table)):
        raise ShearingError(
            f"the {table.family} family's table knows the modules of transformers' own model. Others may compute "
            "something else:\n  " + "\n  ".join(problems)
        )
    gating = Gating(table)
    for name, spec, _ in table.instances():
        path, _, parameter = name.rpartition(".")
        module = modules[path]
        if not isinstance(module, _Gated):
            _swap(module, FORMS[spec.module.form], gating)
            module.tensor_names, module.form = {}, spec.module  # type: ignore[assignment]
        module.tensor_names[parameter] = name  # type: ignore[operator,index]
    for layer in range(table.layers):
        _swap(modules[f"{table.layers_path}.{layer}"], GatedLayer, gating, layer=layer)
        _attach_branches(modules, layer, gating)
    return gating


def _foreign(modules: dict[str, nn.Module], table: Table) -> Iterator[str]:
    """Modules of another class than the table's, each once."""
    seen: dict[str, TensorSpec] = {name.rpartition(".")[0]: spec for name, spec, _ in table.instances()}
    for path, spec in seen.items():
        own = type(modules[path])
        if f"{own.__module__}.{own.__qualname__}" != spec.module.cls:
            yield f"{path}: a {own.__module__}.{own.__qualname__}, the table says {spec.module.cls}"


def _attach_branches(modules: dict[str, nn.Module], layer: int, gating: Gating) -> None:
    """Swap the branches of a layer that look at numbers of heads or experts."""
    table = gating.table
    by_path: dict[str, list[Attribute]] = {}
    for attribute in table.attributes:
        by_path.setdefault(attribute.module.format(layer=layer), []).append(attribute)
    experts = table.experts
    has_experts = experts is not None and (experts.layers is None or layer in experts.layers)
    for path, attributes in by_path.items():
        if path not in modules or (module := modules[path]) is None:
            continue
        if not all(hasattr(module, attribute.name.partition(".")[0]) for attribute in attributes):
            continue  # a layer of another sort, such as a dense MLP among mixtures of experts
        if any("." in attribute.name for attribute in attributes):
            module.config = _ConfigView(module.config)  # type: ignore[assignment]
        source = {attribute.name: getattr(*_owner(module, attribute)) for attribute in attributes}
        own = experts.list if has_experts and experts and path == experts.module.format(layer=layer) else None
        _swap(module, GatedBranch, gating, layer=layer, attributes=tuple(attributes), source=source, experts_name=own)


def _swap(module: nn.Module, mixin: type, gating: Gating, **more: Any) -> None:
    module.__class__ = _subclass(mixin, type(module))
    for name, value in {"gating": gating, **more}.items():
        object.__setattr__(module, name, value)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`: the modules' own classes again. Parameters were never touched."""
    for module in model.modules():
        if isinstance(module, GatedBranch):
            for attribute in module.attributes:
                owner, name = _owner(module, attribute)
                setattr(owner, name, module.source[attribute.name])
            if isinstance(getattr(module, "config", None), _ConfigView):
                module.config = module.config.whole  # type: ignore[attr-defined,assignment,union-attr]
        if isinstance(module, _Gated):
            module.__class__ = type(module).__bases__[1]
            for name in ("gating", "tensor_names", "form", "layer", "attributes", "source", "experts_name"):
                module.__dict__.pop(name, None)
