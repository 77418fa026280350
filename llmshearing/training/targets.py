"""What a student is given to follow, and what gives it.

    Guide.ask(batch) -> Answer(targets, states)          a live teacher, or a cache of one

Shape legend: B sequences, T tokens, V vocabulary, k entries of a sparse target, D hidden units of the teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from llmshearing.fold.selection import Units

if TYPE_CHECKING:
    from llmshearing.training.hidden import HiddenStates


@dataclass(frozen=True)
class Dense:
    """The whole distribution of the next token."""

    logits: Tensor
    """[B, T, V], before any temperature."""


@dataclass(frozen=True)
class Sparse:
    """Part of the distribution of the next token, or a sample of it.

    An entry of probability 0 counts for nothing, whatever its id; no other id may come twice in one token's entries.
    Probabilities are those of the teacher's logits divided by the temperature of the :class:`Guide`.
    """

    ids: Tensor
    """Integer [B, T, k]."""
    probs: Tensor
    """[B, T, k], floating-point."""
    rest: Tensor | None = None
    """[B, T]: probability of all other tokens together, compared with the student's own; None: nobody asks for it."""


Targets = Dense | Sparse


@dataclass(frozen=True)
class View:
    """Hidden states to tell: those after ``layers``, of the kept ``units`` (None: all)."""

    layers: tuple[int, ...]
    units: Units | None = None


@dataclass(frozen=True)
class Answer:
    """``targets`` of every position; ``states``: layer -> [B, T, kept units] as the :class:`View` asked."""

    targets: Targets
    states: Mapping[int, Tensor] = field(default_factory=dict)


class Guide(ABC):
    """What a student follows.

    Args:
        weight: of the divergence. ce: of the cross-entropy beside it. temperature: both sides' logits are divided by
            it. hidden: how hidden states are followed too; None: they are not. Only a live teacher can tell them.
    """

    def __init__(
        self, weight: float = 1.0, ce: float = 0.0, temperature: float = 1.0, hidden: HiddenStates | None = None
    ) -> None:
        self.weight, self.ce, self.temperature, self.hidden = weight, ce, temperature, hidden

    @abstractmethod
    def ask(self, batch: Mapping[str, Tensor], view: View | None = None) -> Answer:
        """Targets of a batch, without gradient, on the device of its ``input_ids`` [B, T].

        batch: as the data set makes it; besides ``input_ids`` also ``set`` and ``sample`` [B], which a cache may go by.
        """
