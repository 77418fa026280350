"""What a model of a table costs to run, in closed form. Plain arithmetic, no torch.

    FLOPs of a sequence of T tokens = T * (2 * out * in, over the matrices)  +  T^2 * (4 * query, over the layers)

A multiply-add is two. Embeddings are looked up, norms, biases and activations are not counted, and neither are rotary
angles. Attention counts each pair of positions, as torch's counter does; a kernel that skips the future does half of
that. Of a mixture of experts the experts that a token goes to count. `query`: query heads x width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from llmshearing.families.table import EXPERT, Table, TensorSpec

MATRICES = ("linear", "conv1d")
"""Forms of modules that multiply matrices."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass, by what they grow with."""

    per_token: int
    """Of all matrices, for one token."""
    per_pair: int
    """Of attention, for one pair of positions, in all layers."""
    kv_elements: int
    """Keys and values that one token leaves in the cache, in all layers. A sliding window bounds how many tokens do."""

    def sequence(self, length: int) -> int:
        """FLOPs of a sequence of so many tokens."""
        return length * self.per_token + length**2 * self.per_pair


def cost_of(table: Table) -> Cost:
    """The cost of a table's model."""
    per_token = sum(
        Fraction(2 * math.prod(table.tensor_shape(spec, layer))) * _share(table, spec, layer)
        for _, spec, layer in table.instances()
        if spec.reads is not None and spec.module.form in MATRICES  # a bias has the module of its weight
    )
    axes = [table.at_layer(layer).axes for layer in range(table.layers)]
    per_pair = sum(4 * of_layer["query"].length for of_layer in axes)
    return Cost(int(per_token), per_pair, sum(2 * of_layer["kv"].length for of_layer in axes))


def _share(table: Table, spec: TensorSpec, layer: int | None) -> Fraction | int:
    """The part of a tensor that one token meets: all of it, or what the experts that are chosen are of all."""
    if table.experts is None or not (spec.stacked or spec.expert is not None):
        return 1
    number = table.at_layer(layer).kinds[EXPERT].size
    if spec.expert is not None and spec.expert >= number:  # layers may have different numbers of them
        return 0
    return Fraction(min(table.experts.chosen, number), number)
