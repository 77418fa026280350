"""A model's modules under the names that checkpoints have, whatever the installed transformers calls them.

The tables describe what is on disk, and that is the same for every version of transformers: one matrix for each
projection of each expert. transformers 4.57 builds its modules like that. 5 renames some of them, and keeps the experts
of a layer in two tensors of three dimensions; it converts while it loads. :func:`as_stored` takes both back, so
that state dicts, gates and hooks meet one form.

Shape legend: B batch, T tokens, d hidden units, E experts, f intermediate units of one.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmshearing.compat import MODULES_AS_STORED
from llmshearing.families import FAMILIES, table_for
from llmshearing.families.names import LAYERS
from llmshearing.families.table import Experts

M = TypeVar("M", bound=nn.Module)


def as_stored(model: M) -> M:
    """The same model, changed in place: every tensor under its name in the family's table. Others stay as they are.

    Experts get parameters of their own; the fused ones go. Call it before an optimizer or a wrapper sees the model.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if MODULES_AS_STORED or family is None:
        return model
    layers = range(getattr(model.config, family.keys[LAYERS]))
    for new, old in family.renamed.items():
        for path in dict.fromkeys(old.format(layer=layer) for layer in layers):
            _rename(model, path, new.rpartition(".")[2])
    if family.projections is not None and (experts := table_for(model.config).experts) is not None:
        for layer in layers if experts.layers is None else experts.layers:
            _unfuse(model, experts, layer, family.projections)
    return model


_RENAMED: dict[tuple[type, str, str], type] = {}


def _rename(model: nn.Module, path: str, new: str) -> None:
    """Give the module at a path another name in its parent, whose own code finds it under the old one too."""
    above, _, old = path.rpartition(".")
    parent = model.get_submodule(above)
    if old not in parent._modules:
        return
    parent._modules = {new if name == old else name: child for name, child in parent._modules.items()}
    own = type(parent)
    if (own, old, new) not in _RENAMED:
        found: dict[str, Any] = {"__module__": own.__module__, old: property(lambda self: self._modules[new])}
        tied = getattr(own, "_tied_weights_keys", None)
        if isinstance(tied, dict):
            found["_tied_weights_keys"] = {_renamed(key, old, new): value for key, value in tied.items()}
        _RENAMED[own, old, new] = type(own.__name__, (own,), found)
    parent.__class__ = _RENAMED[own, old, new]


def _renamed(key: str, old: str, new: str) -> str:
    first, dot, rest = key.partition(".")
    return f"{new}{dot}{rest}" if first == old else key


def _unfuse(model: nn.Module, experts: Experts, layer: int, names: tuple[str, str, str]) -> None:
    above, _, name = experts.module.format(layer=layer).rpartition(".")
    parent = model.get_submodule(above)
    if not isinstance(block := parent._modules[name], StoredExperts):
        parent._modules[name] = StoredExperts(block, names)


class StoredExperts(nn.Module):
    """A mixture of experts out of the one that transformers 5 builds: a router, and a list of experts.

    Every token goes to the `top_k` experts of the largest probability. As there, these are in float32.
    """

    def __init__(self, block: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        router, fused = block.gate, block.experts
        self.top_k, self.num_experts = router.top_k, router.num_experts
        self.normalised = getattr(router, "norm_topk_prob", True)
        self.gate = _linear(router.weight)
        gates, ups = fused.gate_up_proj.chunk(2, dim=1)
        weights = zip(gates, ups, fused.down_proj, strict=True)
        self.experts = nn.ModuleList(Expert(names, each, fused.act_fn) for each in weights)
        self.train(block.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        shares = F.softmax(self.gate(states), dim=-1, dtype=torch.float)
        shares, chosen = shares.topk(self.top_k, dim=-1)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares.to(states.dtype)
        output = torch.zeros_like(states)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            if len(token):
                output.index_add_(0, token, (expert(states[token]) * shares[token, rank, None]).to(output.dtype))
        return output.reshape(hidden_states.shape)


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), its projections under the names that the family's checkpoints have."""

    def __init__(self, names: tuple[str, str, str], weights: tuple[Tensor, Tensor, Tensor], act: nn.Module) -> None:
        super().__init__()
        for name, weight in zip(names, weights, strict=True):
            self.add_module(name, _linear(weight))
        self.names, self.act_fn = names, act

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] -> [n, d]."""
        gate, up, down = (self._modules[name] for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))  # type: ignore[misc]


def _linear(weight: Tensor) -> nn.Linear:
    """A projection with a copy of this weight [out, in]."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    own = weight.detach().clone(memory_format=torch.contiguous_format)
    module.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
    return module
