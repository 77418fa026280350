"""The layers of any decoder of transformers: find them, run the model without some of them, or one at a time.

Nothing is known of the model but the name of its layer list and that a layer maps hidden states to hidden states (alone
or as the first of a tuple). Layers are skipped by an instance attribute `forward`, which is removed again.

Shape legend: B sequences, T tokens, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmshearing.errors import ShearingError
from llmshearing.families.family import COMMON_LAYERS
from llmshearing.prune.calibration import IGNORED


@dataclass(frozen=True)
class Decoder:
    """path: of the layer list inside the model. tuples: whether a layer returns a tuple."""

    model: PreTrainedModel
    path: str
    layers: list[nn.Module]
    tuples: bool

    def loss(self, batch: Tensor, labels: Tensor | None = None) -> float:
        """See :func:`batch_loss`."""
        return batch_loss(self.model, batch, labels)

    def recorded(self, batch: Tensor) -> list[Tensor]:
        """What each layer reads, [B, T, d], and last what the last one writes."""
        states: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(_keep_input(states), with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(lambda module, inputs, out: states.append(first(out))))
        try:
            self.loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return states

    @contextmanager
    def without(self, drop: Collection[int]) -> Iterator[None]:
        """Run without these layers."""
        with patched({self.layers[layer]: self._identity for layer in drop}):
            yield

    @contextmanager
    def resumed(self, at: int, states: Tensor, drop: Collection[int] = ()) -> Iterator[None]:
        """Run from layer ``at`` + 1 on with these hidden states as what ``at`` writes, and without the layers ``drop``.

        What comes before ``at`` costs nothing: candidates that share their first layers compute them once.
        """
        replaced = {self.layers[layer]: self._identity for layer in {*range(at), *drop}}
        replaced[self.layers[at]] = lambda hidden_states, *args, **kwargs: self._wrap(states)
        with patched(replaced):
            yield

    def _identity(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(hidden_states)

    def _wrap(self, hidden_states: Tensor) -> Any:
        return (hidden_states,) if self.tuples else hidden_states


@torch.no_grad()
def batch_loss(model: PreTrainedModel, batch: Tensor, labels: Tensor | None = None) -> float:
    """Mean next-token cross-entropy of a batch [B, T], nats per token; of labels [B, T] those that are IGNORED do not
    count, None: all do. 0 where nothing counts."""
    ids = batch.to(model.device)
    labels = ids if labels is None else labels.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # [B, T - 1, V]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return loss.item() if weight(labels) else 0.0


def weight(labels: Tensor) -> float:
    """How many sequences' worth of tokens count in labels [B, T]: B where all do."""
    return int((labels[:, 1:] != IGNORED).sum()) / max(1, labels.shape[1] - 1)


def first(output: Any) -> Tensor:
    """Hidden states of a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def _keep_input(states: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    return keep


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


@contextmanager
def layer_by_layer(model: PreTrainedModel, layers: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Run a model that is on the CPU on ``device``, with one layer at a time there: memory for one is enough."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]

    def on_demand(forward: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            layer.to(device)
            try:
                return forward(*args, **kwargs)
            finally:
                layer.to("cpu")

        return run

    try:
        for module in outside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        with patched({layer: on_demand(layer.forward, layer) for layer in layers}):
            yield
    finally:
        model.to("cpu")


def find_decoder(
    model: PreTrainedModel, path: str | None = None, norm: str | None = None, count_key: str = COMMON_LAYERS
) -> Decoder:
    """The layers of a model.

    Args:
        path: of the layer list (`model.decoder.layers`); None looks for the outermost list of the config's length.
        norm: of the final norm; only checked to exist, since transformers' own forward applies it.
        count_key: the config's key for the number of layers.

    Raises:
        ShearingError: naming what of these the model does not have, and what it has.
    """
    count = getattr(model.config, count_key, None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    problems = []
    if not isinstance(count, int):
        numbers = [key for key, value in model.config.to_dict().items() if "layer" in key and isinstance(value, int)]
        problems.append(f"layer_num_field {count_key}: the config has no such number; it has {', '.join(numbers)}")
    if path is None:
        candidates = [name for name, module in lists.items() if len(module) == count]
        path = next((name for name in candidates if not any(name.startswith(f"{other}.") for other in lists)), None)
    if path not in lists:
        problems.append(f"model_decoder_layers {path}: no list of layers; there are {', '.join(lists) or 'none'}")
    elif isinstance(count, int) and len(lists[path]) != count:  # type: ignore[index]
        problems.append(f"model_decoder_layers {path}: {len(lists[path])} layers, but {count_key} is {count}")  # type: ignore[index]
    if norm is not None and norm not in (names := dict(model.named_modules())):
        near = [name for name in names if "norm" in name and not any(name.startswith(f"{other}.") for other in lists)]
        problems.append(f"layer_norm_field {norm}: no such module; there are {', '.join(near)}")
    if problems:
        raise ShearingError("\n".join(problems))
    layers = list(lists[path])  # type: ignore[index]
    return Decoder(model, str(path), layers, _returns_tuples(model, layers[0]))


@torch.no_grad()
def _returns_tuples(model: PreTrainedModel, layer: nn.Module) -> bool:
    found: list[bool] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: found.append(isinstance(output, tuple)))
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        hook.remove()
    return found[0]
