"""Tensors that are made when they are asked for: models larger than memory as ordinary mappings.

A reader describes a file as :class:`LazyTensors` and reads none of it; the fold makes lazy tensors of lazy tensors; a
writer asks for one after another. So one tensor at a time is in memory, however large the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from llmshearing.errors import ShearingError


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor's shape and dtype, and how to have it. Two names of one tensor (tied weights) share the object."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """A tensor of this shape and dtype on the CPU; made anew by each call."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor, each made on access; iterating over ``items()`` holds one at a time."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].make()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}


class Recent:
    """Lazy tensors, the last of which stay in memory, for makers of several tensors that look at the same ones.

    limit: bytes that stay; the newest one stays even where it alone is larger. Safe to use from several threads.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self._limit, self._lock = limit, Lock()
        self._kept: dict[LazyTensor, _Once] = {}

    def make(self, tensor: LazyTensor) -> Tensor:
        """The tensor, which nobody may change."""
        with self._lock:
            once = self._kept.pop(tensor, None) or _Once(tensor)
            self._kept[tensor] = once
            total = sum(kept.nbytes for kept in self._kept)
            for old in [*self._kept][:-1]:
                if total > self._limit:
                    total -= old.nbytes
                    del self._kept[old]
        return once.value()


class _Once:
    """A tensor that is made by the first who asks, while the others wait."""

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor, self._lock = tensor, Lock()
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        with self._lock:
            if self._value is None:
                self._value = self._tensor.make()
            return self._value


def lazily(weights: Mapping[str, Tensor]) -> LazyTensors:
    """Any state dict as lazy tensors; tensors that are one stay one."""
    if isinstance(weights, LazyTensors):
        return weights
    known: dict[tuple[object, ...], LazyTensor] = {}
    entries = {}
    for name, value in weights.items():
        same = (value.data_ptr(), value.dtype, value.shape, value.stride())
        entries[name] = known.setdefault(same, LazyTensor(tuple(value.shape), value.dtype, value.detach))
    return LazyTensors(entries)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, strictly and one at a time, where ``load_state_dict`` would hold all of them.

    Raises:
        ShearingError: naming every tensor that is missing, unexpected or of another shape.
    """
    targets, shapes = model.state_dict(), lazily(weights).shapes
    problems = [f"{name}: missing" for name in targets if name not in shapes]
    problems += [f"{name}: not of this model" for name in shapes if name not in targets]
    problems += [
        f"{name}: shape {list(shapes[name])}, the model has {list(target.shape)}"
        for name, target in targets.items()
        if name in shapes and shapes[name] != tuple(target.shape)
    ]
    if problems:
        raise ShearingError("weights do not fit the model:\n  " + "\n  ".join(problems))
    for name, target in targets.items():
        target.copy_(weights[name])
